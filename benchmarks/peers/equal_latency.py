"""What a contender must cut to be as much faster as wanted, by measuring: ONNX Runtime, interleaved, fastest form."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import edgepress as ep
from edgepress.benchmarks import latency, load
from edgepress.benchmarks.compare import Speedup, speedup
from edgepress.benchmarks.measurement import Measurement
from edgepress.compress.prune.budget import Costs
from edgepress.export.artifact import Artifact
from edgepress.export.backends import onnx as backend
from edgepress.models.workload import Workload

TOLERANCE = 0.02
MOST_TRIALS = 10
CLOSEST = 1 / 500
"""Shares that differ by less cut the same."""


@dataclass(frozen=True)
class Candidate:
    """A workload that is cut, and what then makes up for the loss without changing the shape of any layer."""

    cut: Workload
    finish: Callable[[], Workload]


@dataclass(frozen=True)
class Bench:
    """The original's artifact in its fastest graph form, and how everything is timed beside it."""

    original: Artifact
    target: str
    batch: int
    sequence: int
    queries: int
    known: dict[object, Speedup]
    """Speedups by the shape of what was measured: the weights' values make no difference."""

    def beside(self, artifact: Artifact, *, queries: int, memory: bool = False) -> tuple[Measurement, Measurement]:
        """The original and ``artifact`` in whichever graph form is faster, of one interleaved run."""
        candidates = [self.original, *(backend.in_form(artifact, form) for form in backend.FORMS)]
        original, *others = load.benchmark(
            candidates,
            target=self.target,
            batch=self.batch,
            sequence=self.sequence,
            min_queries=queries,
            min_seconds=120,
            memory=memory,
        )
        return original, min(others, key=lambda taken: taken.p50)

    def speedup(self, workload: Workload) -> Speedup:
        """How many times faster ``workload`` is than the original, from a short run; once for every shape."""
        shape = shape_of(workload)
        if shape not in self.known:
            with exported(workload) as artifact:
                self.known[shape] = speedup(*self.beside(artifact, queries=self.queries))
        return self.known[shape]

    def relative_time(self, workload: Workload) -> float:
        return 1 / self.speedup(workload).value

    def costs(self, workload: Workload) -> Costs:
        """What every unit of ``workload`` costs in milliseconds, from edgepress's own latency table."""
        table = latency.measure(workload, target=self.target, batch=self.batch, sequence=self.sequence)
        return table.costs(workload.structure)


@contextmanager
def exported(workload: Workload) -> Iterator[Artifact]:
    with tempfile.TemporaryDirectory(prefix="edgepress-peers-") as folder:
        yield ep.export(workload, Path(folder) / "artifact")


def shape_of(workload: Workload) -> tuple[object, ...]:
    counts = tuple((site.kind, site.layer, site.count) for site in workload.structure.sites)
    return workload.name, workload.params, workload.macs, counts


def fastest_form(artifact: Artifact, *, target: str, batch: int, sequence: int, queries: int) -> Artifact:
    forms = [backend.in_form(artifact, form) for form in backend.FORMS]
    taken = load.benchmark(
        forms, target=target, batch=batch, sequence=sequence, min_queries=queries, min_seconds=120, memory=False
    )
    return forms[min(range(len(forms)), key=lambda place: taken[place].p50)]


@dataclass(frozen=True)
class Found:
    channels: float
    heads: float
    candidate: Candidate
    speedup: Speedup


def search(cut: Callable[[float, float], Candidate], bench: Bench, wanted: float) -> Found:
    """The cut whose measured speedup is within ``TOLERANCE`` of ``wanted``, or the closest that was tried.

    ``cut`` takes the shares of channels and of heads to go. The two go together first; where whole heads are too coarse
    a step, the smallest share of heads that was too fast stays, and channels are given back.
    """
    trials: list[Found] = []

    def trial(channels: float, heads: float) -> float:
        candidate = cut(channels, heads)
        trials.append(Found(channels, heads, candidate, bench.speedup(candidate.cut)))
        return trials[-1].speedup.value

    high = _bisect(lambda share: trial(share, share), wanted, 0.99)
    if high is not None and len({found.heads for found in trials}) > 1:
        _bisect(lambda share: trial(share, high), wanted, high)
    return min(trials, key=lambda found: abs(found.speedup.value / wanted - 1))


def _bisect(measure: Callable[[float], float], wanted: float, high: float) -> float | None:
    """None once a share meets ``wanted``; else the smallest share found to be too fast.

    Latency is close to linear in the share, so the next trial is where the line between the ends of the bracket meets
    the wanted latency, and their middle after some trials.
    """
    low, time_low, time_high = 0.0, 1.0, 0.05
    for trial in range(MOST_TRIALS):
        on_line = (time_low - 1 / wanted) / max(time_low - time_high, 1e-6)
        share = low + (high - low) * (min(max(on_line, 0.1), 0.9) if trial < MOST_TRIALS // 2 else 0.5)
        found = measure(share)
        if abs(found / wanted - 1) <= TOLERANCE:
            return None
        if found < wanted:
            low, time_low = share, 1 / found
        else:
            high, time_high = share, 1 / found
        if high - low < CLOSEST:
            break
    return high
