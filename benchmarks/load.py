"""Measure artifacts on a target: prepare the job, run the timing loop over there, read the raw samples back."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UnavailableError, UsageError
from ..export import reference
from ..export.artifact import Artifact, Axis
from . import runner, targets
from .measurement import Measurement
from .targets import Target

Feeds = dict[str, NDArray[Any]]
Progress = Callable[[int, int, str], None]

RUNNER = Path(runner.__file__)
SCENARIOS = ("single-stream", "offline", "server")


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
    progress: Progress | None = None,
) -> list[Measurement]:
    """Latency of all ``artifacts``, interleaved in one process, and the memory of each in a process of its own.

    It ends after ``min_queries`` runs of each, or ``min_seconds`` for each if that comes first. Inputs without tokens
    have no ``sequence``: it is 0 in what is returned. After a ``past`` of so many tokens their keys and values are
    given. ``scenario`` is "single-stream", "offline" or "server", for which queries, of ``batch`` rows each, come at
    random, ``rate`` a second, the same for all that have the same ``seed``; see ``runner``. A single-stream run with a
    ``confidence_width``, 0.01 for 1 %, ends as soon as it is as precise (``runner.timed_rounds``). Raises UsageError
    where these do not fit together or the shape lies outside the range that an artifact was proven in, and
    UnavailableError where its runtime cannot be measured. On a device it raises what ``targets.connect`` does, and
    ParityError where an artifact that came with references does not answer there as it did where it was proven.
    """
    if not artifacts:
        raise UsageError("There is nothing to measure: no artifact was given.")
    _check_scenario(scenario, rate, deadline_ms, confidence_width, min_seconds)
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
    if not _has_axis(artifacts[0], "sequence"):
        sequence = 0
    runtimes = (artifact.manifest.runtime for artifact in artifacts)
    with targets.connect(where, *runtimes) as (host, where), tempfile.TemporaryDirectory() as folder:
        for at, artifact in enumerate(artifacts):  # pruned models have keys and values of other sizes
            np.savez(Path(folder) / f"feeds{at}.npz", **arbitrary(artifact, batch, sequence, past))  # type: ignore[arg-type]
        shutil.copy(RUNNER, folder)
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

        def run(**job: Any) -> Any:
            text = json.dumps({"threads": where.threads, **job})
            return json.loads(host.run(["python", f"{place}/{RUNNER.name}", text], _relay(progress)))

        if where.address:
            for artifact, job in zip(artifacts, jobs, strict=True):
                _hold_to_reference(artifact, job, host, where, run)
        memories = [run(mode="memory", artifacts=[job]) if memory else {} for job in jobs]
        found = run(
            mode="latency",
            artifacts=jobs,
            min_queries=min_queries,
            min_seconds=min_seconds,
            scenario=scenario,
            rate=rate,
            confidence_width=confidence_width,
            seed=seed,
        )
        machine = host.environment(where.threads)
    environment = {**machine, "clock_overhead_ns": found["clock_ns"], "openings": found["openings"]}
    services = found.get("service_ns") or [()] * len(jobs)
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
            scenario=scenario,
            per_slice=found["per_slice"],
            rate=rate,
            deadline_ms=deadline_ms,
            loads=_loads(service, rate) if rate else (),
            early=found["early"],
        )
        for artifact, used, taken, service in zip(artifacts, memories, found["samples_ns"], services, strict=True)
    ]


def _check_scenario(
    scenario: str, rate: float | None, deadline_ms: float | None, confidence_width: float | None, min_seconds: float
) -> None:
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
        word, *numbers = text.split()
        if progress and word == "progress" and len(numbers) == 2:
            progress(int(numbers[0]), int(numbers[1]), "rounds")

    return line
