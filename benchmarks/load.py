"""Measure artifacts on a target: prepare the job, run the timing loop over there, read the raw samples back."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnavailableError, UsageError
from ..export import reference
from ..export.artifact import Artifact, Axis
from . import imitation, meters, profilers, runner, targets
from .compare import share
from .imitation import DoesNotFitError
from .measurement import Measurement
from .subjects import Original, shown_as
from .targets import Target

Feeds = dict[str, NDArray[Any]]
Progress = Callable[[int, int, str], None]

RUNNER = Path(runner.__file__)
SCENARIOS = ("single-stream", "offline", "server")
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
    scenario: str = "single-stream",
    rate: float | None = None,
    deadline_ms: float | None = None,
    confidence_width: float | None = None,
    seed: int = 0,
    energy: bool = False,
    profile: bool = False,
    progress: Progress | None = None,
) -> list[Measurement]:
    """Latency of all ``artifacts``, interleaved in one process, and the memory of each in a process of its own.

    After these come, if asked for, the energy of each where the target has a meter, and the time of its operators, in a
    process that times nothing else.

    It ends after ``min_queries`` runs of each, or ``min_seconds`` for each if that comes first. Artifacts without
    tokens have no ``sequence``: it is 0 in what is returned of them. After a ``past`` of so many tokens their keys and
    values are given. ``scenario`` is "single-stream", "offline" or "server", for which queries, of ``batch`` rows each,
    come at random, ``rate`` a second, the same for all that have the same ``seed``; see ``runner``. A single-stream run
    with a ``confidence_width``, 0.01 for 1 %, ends as soon as it is as precise (``runner.timed_rounds``). Raises
    UsageError where these do not fit together or the shape lies outside the range that an artifact was proven in, and
    UnavailableError where its runtime cannot be measured, or not in operators. DoesNotFitError names those that need
    more memory than an imitated device has; where energy or profiles alone do, what is returned is without them, and
    its environment says why. On a device it raises what ``targets.connect`` does, and ParityError where an artifact
    that came with references does not answer there as it did where it was proven.
    """
    if not artifacts:
        raise UsageError("There is nothing to measure: no artifact was given.")
    _check_scenario(scenario, rate, deadline_ms, confidence_width, min_seconds)
    where = targets.parse(target)
    check(artifacts, where)
    for artifact in artifacts:
        check_shape(artifact, batch, sequence, past)
    if profile:
        _check_profilers(artifacts)
    runtimes = (artifact.manifest.runtime for artifact in artifacts)
    with targets.connect(where, *runtimes) as (host, where), tempfile.TemporaryDirectory() as folder:
        place, jobs = _sent(artifacts, where, host, Path(folder), (batch, sequence, past), progress=progress)

        def run(held: imitation.Imitation = where.imitation, **job: Any) -> Any:
            text = json.dumps({"threads": where.threads, "device": where.device, **job})
            command, processes = ["python", f"{place}/{RUNNER.name}", text], len(job["artifacts"])
            told, by = held.run(host, place, command, _relay(progress), processes=processes)
            held_by.add(by)
            return told

        held_by: set[str | None] = set()
        if where.address or where.device != "cpu":
            for artifact, job in zip(artifacts, jobs, strict=True):
                _hold_to_reference(artifact, job, host, where, partial(run, imitation.Imitation()))
        uses = [partial(run, mode="memory", artifacts=[job]) for job in jobs]
        memories = _all_fitting(artifacts, uses) if memory or where.imitation.memory else [{} for _ in jobs]
        options: dict[str, Any] = {"scenario": scenario, "rate": rate, "seed": seed}
        options |= {"min_queries": min_queries, "min_seconds": min_seconds, "confidence_width": confidence_width}
        timed = _together(artifacts, partial(run, mode="latency", artifacts=jobs, **options))
        spent = _spent(partial(run, mode="energy", artifacts=jobs, seconds=SLICE_SECONDS)) if energy else {}
        uses = [partial(run, mode="profile", artifacts=[job], runs=PROFILED_RUNS) for job in jobs]
        profiles, unprofiled = _profiled(artifacts, uses) if profile else ([None for _ in jobs], [])
        seen = {
            "watch": timed["watch"],
            "energy": {name: value for name, value in spent.items() if name in ENERGY_TOLD},
            "unprofiled": unprofiled,
            "imitation": where.imitation.to_json(by=next(filter(None, held_by), None)),
        }
        environment = {
            **host.environment(where.threads),
            "clock_overhead_ns": timed["clock_ns"],
            "openings": timed["openings"],
            **{name: value for name, value in seen.items() if value},
        }
    services = timed.get("service_ns") or [()] * len(jobs)
    return [
        Measurement(
            **_described(artifact, where, job["precision"]),
            load_ms=used["load_ns"] / 1e6 if used else None,
            peak_rss_bytes=used["peak_rss_bytes"] if used else None,
            batch=batch,
            sequence=sequence if _has_tokens(artifact) else 0,
            past=past,
            samples_ms=tuple(ns / 1e6 for ns in taken),
            environment=environment,
            scenario=scenario,
            per_slice=timed["per_slice"],
            rate=rate,
            deadline_ms=deadline_ms,
            loads=_loads(services[at], rate) if rate else (),
            early=timed["early"],
            energy_mj=spent["millijoules"][at] if spent.get("millijoules") else None,
            profile=profiles[at],
        )
        for at, (artifact, job, used, taken) in enumerate(
            zip(artifacts, jobs, memories, timed["samples_ns"], strict=True)
        )
    ]


def _sent(
    artifacts: Sequence[Artifact],
    where: Target,
    host: Any,
    folder: Path,
    sizes: tuple[int, int, int],
    *,
    progress: Progress | None,
) -> tuple[str, list[dict[str, Any]]]:
    """Where the runner and inputs of ``sizes``, batch, sequence and past, are over there, and what it is told of each
    of ``artifacts``; all of them pass through ``folder``."""
    for at, artifact in enumerate(artifacts):  # pruned models have keys and values of other sizes
        np.savez(folder / f"feeds{at}.npz", **arbitrary(artifact, *sizes))  # type: ignore[arg-type]
    for source in SHIPPED:
        shutil.copy(source, folder)
    for runtime in {artifact.manifest.runtime for artifact in artifacts}:
        shutil.copy(RUNNER.parent / "runtimes" / f"{runtime}.py", folder / f"runtime_{runtime}.py")
    place = host.put(folder)
    return place, [
        {
            "model": f"{host.put(artifact.folder, artifact.needed, progress)}/{artifact.manifest.model_file}",
            "feeds": f"{place}/feeds{at}.npz",
            **_told(artifact, where),
        }
        for at, artifact in enumerate(artifacts)
    ]


def quick(artifacts: Sequence[Artifact], *, rounds: int = 200, seconds: float = 4.0, **where: Any) -> list[Measurement]:
    """As :func:`benchmark`, the latencies alone and as short as does to decide what is done next."""
    return benchmark(artifacts, min_queries=rounds, min_seconds=seconds, memory=False, **where)


def fastest(artifacts: Sequence[Artifact], **options: Any) -> int:
    """The place of the fastest of ``artifacts``, which are timed as :func:`quick` does: by their ratios to the first
    of the same rounds, in which what slows the machine down for a while cancels."""
    first, *others = quick(artifacts, **options)
    shares = [1.0, *(share(first, other) for other in others)]
    return shares.index(min(shares))


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


def _together(artifacts: Sequence[Artifact], use: Callable[[], Any]) -> Any:
    """What ``use`` tells of all ``artifacts``; DoesNotFitError names them where an imitated device has no memory."""
    try:
        return use()
    except DoesNotFitError as error:
        names = " and ".join(str(one.folder) for one in artifacts)
        said = "do not fit, opened together," if len(artifacts) > 1 else "does not fit"
        raise DoesNotFitError(f"{names} {said} {error}.") from error


def _spent(use: Callable[[], Any]) -> dict[str, Any]:
    """What ``runner.energy`` tells; on an imitated device that has no memory for it, why there is none."""
    try:
        found: dict[str, Any] = use()
    except DoesNotFitError as error:
        return {"why": f"measuring it does not fit {error}"}
    return found


def _profiled(artifacts: Sequence[Artifact], uses: Sequence[Callable[[], Any]]) -> tuple[list[Any], list[str]]:
    """The profile of each that an imitated device has memory for, else None; and a sentence about the others."""
    found, said = [], []
    for artifact, use in zip(artifacts, uses, strict=True):
        try:
            found.append(use())
        except DoesNotFitError as error:
            found.append(None)
            said.append(f"{artifact.folder} has no profile: telling it does not fit {error}")
    return found, said


def check(artifacts: Sequence[Artifact], where: Target) -> None:
    """Raise UsageError where an artifact does not run on the target, UnavailableError for what is missing here."""
    for artifact in artifacts:
        runtime = artifact.manifest.runtime
        if runtime not in runner.RUNTIMES or (runtime == "torch" and not isinstance(artifact, Original)):
            raise UnavailableError(
                f"{artifact.folder} is for {runtime}, which cannot be measured yet in this version "
                f"(what can: {', '.join(runner.RUNTIMES)})."
            )
        devices = targets.RUNS_ON[runtime].split()
        if where.device not in devices:
            also = " and ".join({"cpu": "cpu", "cuda": "tensorrt"}[one] for one in devices)
            raise UsageError(f"{artifact.folder} is for {runtime}; the target '{where}' is not, but {also} is.")
        if where.runtime in {"openvino", "tensorrt"} and runtime not in {where.runtime, "torch"}:
            raise UsageError(f"{artifact.folder} is for {runtime}; the target '{where}' is not.")
        if where.address:
            if runtime in targets.AT_HOME:
                raise UsageError(
                    f"{artifact.name} runs in {targets.TITLES[runtime]}, which is measured on this machine alone, not "
                    f"on {where.where}: export it, or install edgepress there."
                )
        elif lacks := targets.missing.here(runtime, where.device, where.way(runtime)[0]):
            first, *others = lacks
            if others or not first.command:
                raise UnavailableError(f"{artifact.folder} cannot run here: {targets.missing.sentence(lacks)}")
            raise UnavailableError(
                f"{artifact.folder} runs on {first.what}, which is missing: {first.command} brings it."
            )
    if where.runtime == "torch" and not any(isinstance(artifact, Original) for artifact in artifacts):
        raise UsageError(f"The target '{where}' runs models in PyTorch, and none is given: name one: zoo:vit-fashion.")


def _told(artifact: Artifact, where: Target) -> dict[str, Any]:
    """What the runtime is told of ``artifact``, and how it is to run on the target."""
    manifest = artifact.manifest
    form, precision = where.way(manifest.runtime)
    return {
        "runtime": manifest.runtime,
        "device": where.device,
        "form": form,
        "precision": precision if manifest.runtime == "torch" else manifest.precision,
        "function": artifact.function if isinstance(artifact, Original) else "",
        "disabled_optimizers": list(manifest.session.disabled_optimizers),
        "inference_precision": manifest.session.inference_precision,
        "dynamic_quantization": manifest.session.dynamic_quantization,
        "inputs": list(manifest.inputs),
    }


def _described(artifact: Artifact, where: Target, precision: str) -> dict[str, Any]:
    """What a measurement says of an artifact that was run in ``precision``, whatever was measured."""
    return {
        "name": artifact.name,
        "artifact": shown_as(artifact),
        "target": str(where),
        "runtime": _called(artifact, where),
        "precision": precision,
        "params": artifact.manifest.params,
        "macs": artifact.manifest.macs,
        "size_bytes": artifact.size_bytes // (2 if precision != artifact.precision else 1),  # in half precision
    }


def _called(artifact: Artifact, where: Target) -> str:
    """The runtime, and how it runs: "onnx", "onnx cuda", "torch cuda compile"."""
    runtime = artifact.manifest.runtime
    device = where.device if where.device != "cpu" and runtime != "tensorrt" else ""
    return " ".join(filter(None, (runtime, device, where.way(runtime)[0])))


def _check_scenario(
    scenario: str, rate: float | None, deadline_ms: float | None, confidence_width: float | None, min_seconds: float
) -> None:
    if not 0 <= min_seconds < 1e9:
        raise UsageError(f"{min_seconds:g} s is no time to measure for; it must be 0 or more and below 1,000,000,000.")
    if scenario not in SCENARIOS:
        raise UsageError(f"There is no scenario '{scenario}' (known: {', '.join(SCENARIOS)}).")
    if (scenario == "server") != (rate is not None):
        raise UsageError("The scenario 'server' needs a rate of queries a second, and only that has one.")
    if rate is not None and not 0 < rate < 1e6:
        raise UsageError(f"The rate is {rate:g} queries a second; it must be over 0 and below 1,000,000.")
    if rate is not None and rate * min_seconds < runner.LEAST:
        raise UsageError(
            f"In {min_seconds:g} s come {rate * min_seconds:g} queries, fewer than {runner.LEAST}: measure for "
            f"{runner.LEAST / rate:g} s."
        )
    if deadline_ms is not None and (scenario != "server" or not 0 < deadline_ms < math.inf):
        raise UsageError("A deadline is a positive time, and only the scenario 'server' has one.")
    if confidence_width is not None and (scenario != "single-stream" or not 0 < confidence_width < 1):
        raise UsageError("A confidence width is a share between 0 and 1, and only 'single-stream' has one.")


def _loads(service_ns: Sequence[int], rate: float) -> tuple[float, ...]:
    """Mean time of work times rate, in each quarter of a run: from 1 on, more comes than is done."""
    return tuple(float(np.mean(part)) / 1e9 * rate for part in np.array_split(service_ns, 4))


def _has_axis(artifact: Artifact, name: str) -> bool:
    return any(axis.name == name for spec in artifact.manifest.inputs.values() for axis in spec.axes.values())


def _has_tokens(artifact: Artifact) -> bool:
    """Whether a length of sequences says something about it: an encoder-decoder may have that of the decoder alone."""
    return any(
        axis.name.endswith("sequence") for spec in artifact.manifest.inputs.values() for axis in spec.axes.values()
    )


def _size(axis: Axis, batch: int, sequence: int, past: int) -> int:
    known = {"batch": batch, "past_sequence": past, "total_sequence": past + sequence}
    return known.get(axis.name, sequence)


def check_shape(artifact: Artifact, batch: int, sequence: int, past: int) -> None:
    """Raise UsageError where ``artifact`` was not proven for these sizes."""
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
    model = f"{artifact.manifest.files[artifact.manifest.model_file]} {where.device} {job['form']}"
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
        words = text.split()  # libraries say something too, and empty lines
        if progress and words[:1] == ["progress"] and len(words) == 3:
            progress(int(words[1]), int(words[2]), "rounds")
        elif progress and words == ["waiting"]:
            progress(0, 0, "waiting for another measurement to end there")

    return line
