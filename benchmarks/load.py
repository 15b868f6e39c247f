"""Measure artifacts on a target: prepare the job, run the timing loop over there, read the raw samples back."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnavailableError, UsageError
from ..export import reference
from ..export.artifact import Artifact, Axis
from . import imitation, meters, profilers, runner, targets
from .imitation import DoesNotFitError
from .measurement import Measurement
from .targets import Target

Feeds = dict[str, NDArray[Any]]
Progress = Callable[[int, int, str], None]

RUNNER = Path(runner.__file__)
SHIPPED = (RUNNER, Path(meters.__file__), Path(profilers.__file__), imitation.SOURCE)
PROFILED_RUNS = 100
SLICE_SECONDS = 1.0
"""Of energy: meters count anew every millisecond (RAPL) or tenth of a second (NVML), which is little beside it."""
ENERGY_TOLD = ("meter", "idle_watts", "why")


def benchmark(
    artifacts: Sequence[Artifact],
    *,
    target: str = "cpu",
    batch: int = 1,
    sequence: int = 128,
    past: int = 0,
    min_queries: int = 1000,
    min_seconds: float = 10.0,
    memory: bool = True,
    energy: bool = False,
    profile: bool = False,
    progress: Progress | None = None,
) -> list[Measurement]:
    """Latency of all ``artifacts``, interleaved in one process, and the memory of each in a process of its own.

    After these come, if asked for, the energy of each where the target has a meter, and the time of its operators, in a
    process that times nothing else.

    It ends after ``min_queries`` runs of each, or ``min_seconds`` for each if that comes first. Inputs without tokens
    have no ``sequence``: it is 0 in what is returned. After a ``past`` of so many tokens their keys and values are
    given. Raises UsageError where the shape lies outside the range that an artifact was proven in, and UnavailableError
    where its runtime cannot be measured, or not in operators. DoesNotFitError names those that need more memory than an
    imitated device has. On a device it raises what ``targets.connect`` does, and ParityError where an
    artifact that came with references does not answer there as it did where it was proven.
    """
    if not artifacts:
        raise UsageError("There is nothing to measure: no artifact was given.")
    where = targets.parse(target)
    for artifact in artifacts:
        if where.runtime not in {"onnx", artifact.manifest.runtime}:
            raise UsageError(f"{artifact.folder} is for {artifact.manifest.runtime}; the target '{where}' is not.")
        if artifact.manifest.runtime not in runner.RUNTIMES:
            raise UnavailableError(
                f"{artifact.folder} is for {artifact.manifest.runtime}, which cannot be measured yet in this version "
                f"(what can: {', '.join(runner.RUNTIMES)})."
            )
        package = runner.RUNTIMES[artifact.manifest.runtime][0].partition(".")[0]
        if where.host == "local" and find_spec(package) is None:
            raise UnavailableError(
                f"{artifact.folder} runs on {package}, which is missing: "
                f"pip install 'edgepress[{artifact.manifest.runtime}]' brings it."
            )
        _check_shape(artifact, batch, sequence, past)
    if profile:
        _check_profilers(artifacts)
    if not _has_axis(artifacts[0], "sequence"):
        sequence = 0
    runtimes = (artifact.manifest.runtime for artifact in artifacts)
    with targets.connect(where, *runtimes) as (host, where), tempfile.TemporaryDirectory() as folder:
        for at, artifact in enumerate(artifacts):  # pruned models have keys and values of other sizes
            np.savez(Path(folder) / f"feeds{at}.npz", **arbitrary(artifact, batch, sequence, past))  # type: ignore[arg-type]
        for source in SHIPPED:
            shutil.copy(source, folder)
        place = host.put(Path(folder))
        jobs = [
            {
                "runtime": artifact.manifest.runtime,
                "model": f"{host.put(artifact.folder, artifact.needed, progress)}/{artifact.manifest.model_file}",
                "disabled_optimizers": list(artifact.manifest.session.disabled_optimizers),
                "inference_precision": artifact.manifest.session.inference_precision,
                "dynamic_quantization": artifact.manifest.session.dynamic_quantization,
                "feeds": f"{place}/feeds{at}.npz",
                "inputs": list(artifact.manifest.inputs),
            }
            for at, artifact in enumerate(artifacts)
        ]

        def run(held: imitation.Imitation = where.imitation, **job: Any) -> Any:
            text = json.dumps({"threads": where.threads, "device": where.device, **job})
            command, processes = ["python", f"{place}/{RUNNER.name}", text], len(job["artifacts"])
            told, by = held.run(host, place, command, _relay(progress), processes=processes)
            held_by.add(by)
            return told

        held_by: set[str | None] = set()
        if where.address:
            for artifact, job in zip(artifacts, jobs, strict=True):
                _hold_to_reference(artifact, job, host, where, partial(run, imitation.Imitation()))
        uses = [partial(run, mode="memory", artifacts=[job]) for job in jobs]
        memories = _all_fitting(artifacts, uses) if memory or where.imitation.memory else [{} for _ in jobs]
        timed = run(mode="latency", artifacts=jobs, min_queries=min_queries, min_seconds=min_seconds)
        spent = run(mode="energy", artifacts=jobs, seconds=SLICE_SECONDS) if energy else {"millijoules": None}
        profiles = [run(mode="profile", artifacts=[job], runs=PROFILED_RUNS) if profile else None for job in jobs]
        found = {
            "watch": timed["watch"],
            "energy": {name: value for name, value in spent.items() if name in ENERGY_TOLD},
            "imitation": where.imitation.to_json(by=next(filter(None, held_by), None)),
        }
        environment = {**host.environment(where.threads), **{name: value for name, value in found.items() if value}}
    return [
        Measurement(
            name=artifact.name,
            artifact=str(artifact.folder),
            target=str(where),
            precision=artifact.precision,
            params=artifact.manifest.params,
            macs=artifact.manifest.macs,
            size_bytes=artifact.size_bytes,
            load_ms=used["load_ns"] / 1e6 if used else None,
            peak_rss_bytes=used["peak_rss_bytes"] if used else None,
            batch=batch,
            sequence=sequence,
            past=past,
            samples_ms=tuple(ns / 1e6 for ns in taken),
            environment=environment,
            energy_mj=spent["millijoules"][at] if spent["millijoules"] else None,
            profile=told,
        )
        for at, (artifact, used, taken, told) in enumerate(
            zip(artifacts, memories, timed["samples_ns"], profiles, strict=True)
        )
    ]


def fitting(artifacts: Sequence[Artifact], unfit: list[str] | None, **options: Any) -> list[Measurement]:
    """As :func:`benchmark`; with a list ``unfit``, those alone that have the memory that they need on an imitated
    device, while a sentence about the others is added to the list."""
    try:
        return benchmark(artifacts, **options)
    except DoesNotFitError as error:
        if unfit is None:
            raise
        unfit.append(str(error))
        return benchmark(error.fitting, **options) if error.fitting else []


def _check_profilers(artifacts: Sequence[Artifact]) -> None:
    for artifact in artifacts:
        if artifact.manifest.runtime not in runner.PROFILERS:
            raise UnavailableError(
                f"{artifact.folder} is for {artifact.manifest.runtime}, which does not tell what its operators take "
                f"(what does: {', '.join(runner.PROFILERS)})."
            )


def _all_fitting(artifacts: Sequence[Artifact], uses: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each of ``uses`` gives, in a process that has the imitated device's memory for one artifact alone; once all
    have been tried, DoesNotFitError for those that needed more."""
    found, fit, said = [], [], []
    for artifact, use in zip(artifacts, uses, strict=True):
        try:
            found.append(use())
            fit.append(artifact)
        except DoesNotFitError as error:
            said.append(f"{artifact.folder} does not fit {error}")
    if said:
        unfit = DoesNotFitError(f"{'; '.join(said)}.")
        unfit.fitting = tuple(fit)
        raise unfit
    return found


def _has_axis(artifact: Artifact, name: str) -> bool:
    return any(axis.name == name for spec in artifact.manifest.inputs.values() for axis in spec.axes.values())


def _size(axis: Axis, batch: int, sequence: int, past: int) -> int:
    known = {"batch": batch, "past_sequence": past, "total_sequence": past + sequence}
    return known.get(axis.name, sequence)


def _check_shape(artifact: Artifact, batch: int, sequence: int, past: int) -> None:
    if past and not _has_axis(artifact, "past_sequence"):
        raise UsageError(f"{artifact.folder} takes no keys and values of tokens before: export it with --cache.")
    for name, spec in artifact.manifest.inputs.items():
        for axis in spec.axes.values():
            size = _size(axis, batch, sequence, past)
            if not axis.min <= size <= axis.max:
                raise UsageError(
                    f"'{name}' of {artifact.folder} was proven for {axis.name} {axis.min} to {axis.max}, not {size}."
                )


def arbitrary(artifact: Artifact, batch: int, sequence: int, past: int = 0) -> Feeds:
    """Inputs of arbitrary values and full masks: latency depends on the shape, not on the words."""
    random = np.random.default_rng(0)
    feeds: Feeds = {}
    for name, spec in artifact.manifest.inputs.items():
        shape = list(spec.shape)
        for place, axis in spec.axes.items():
            shape[int(place)] = _size(axis, batch, sequence, past)
        if "mask" in name:
            feeds[name] = np.ones(shape, dtype=spec.dtype)
        elif spec.below:
            feeds[name] = random.integers(0, spec.below, size=shape).astype(spec.dtype)
        else:
            feeds[name] = random.standard_normal(shape).astype(spec.dtype)
    return feeds


def _hold_to_reference(
    artifact: Artifact, job: Mapping[str, Any], host: Any, where: Target, run: Callable[..., Any]
) -> None:
    """Once in a connection: ParityError where a device does not compute what came with ``artifact``."""
    cases = reference.read(artifact)
    model = artifact.manifest.files[artifact.manifest.model_file]
    if not cases or model in host.verified:
        return
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "reference.npz", **_numbered(artifact, cases))  # type: ignore[arg-type]
        feeds = f"{host.put(Path(folder))}/reference.npz"
        told = run(mode="answers", artifacts=[{**job, "feeds": feeds}], values=reference.VALUES)["answers"]
    found = [[reference.Answer(tuple(one["shape"]), np.asarray(one["values"])) for one in case] for case in told]
    reference.judge(artifact, cases, found, where=f"on {where.where}")
    host.verified.add(model)


def _numbered(artifact: Artifact, cases: Sequence[reference.Case]) -> Feeds:
    """The inputs of ``cases`` as ``runner.answers`` takes them; keys and values of no tokens, where none are given."""
    feeds: Feeds = {}
    for number, case in enumerate(cases):
        rows = len(next(iter(case.feeds.values())))
        nothing = arbitrary(artifact, rows, 1, 0) if _has_axis(artifact, "past_sequence") else {}
        feeds |= {f"{number}.input.{name}": array for name, array in {**nothing, **case.feeds}.items()}
    return feeds


def _relay(progress: Progress | None) -> Callable[[str], None]:
    def line(text: str) -> None:
        word, *numbers = text.split() or [""]
        if progress and word == "progress" and len(numbers) == 2:
            progress(int(numbers[0]), int(numbers[1]), "rounds")
        elif progress and word == "waiting":
            progress(0, 0, "waiting for another measurement to end there")

    return line
