"""The gate: a stage's result is kept only where it pays, within the quality that may be lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .benchmarks.compare import Speedup, speedup
from .benchmarks.measurement import Measurement
from .models.measures import told
from .models.metrics import Quality


@dataclass(frozen=True)
class Constraint:
    """What the user allows and asks for; None where nothing was said.

    ``max_drop`` is in the metric's own unit (points of 100 for accuracy), ``max_latency_ms`` a median.
    """

    max_drop: float = 1.0
    max_latency_ms: float | None = None
    min_speedup: float | None = None
    max_size_bytes: int | None = None

    @property
    def asks_for_speed(self) -> bool:
        return self.max_latency_ms is not None or self.min_speedup is not None


@dataclass(frozen=True)
class Standing:
    """What the gate looks at in a variant: its measured quality, size and speed."""

    name: str
    quality: Quality
    size_bytes: int
    speedup: Speedup | None
    """Against what it is compared with; None for that one itself."""


def gate(before: Standing, after: Standing, constraint: Constraint) -> tuple[bool, str]:
    """Whether ``after`` is kept, and why, in one clause with both numbers.

    ``after.speedup`` is measured against ``before`` in one interleaved run. Quality is judged against the original.
    """
    assert after.speedup is not None
    drop = after.quality.drop or 0.0
    pace = f"{after.speedup.value:.2f}x against {before.name} ({after.speedup.verdict})"
    share = after.size_bytes / before.size_bytes
    if drop > constraint.max_drop:
        return False, f"{told(after.quality.metric, drop)}, {constraint.max_drop:.2f} are allowed ({pace})"
    if after.speedup.verdict == "slower":
        return False, f"is slower: {pace}"
    if after.speedup.verdict != "faster" and share >= 1:
        return False, f"is neither faster nor smaller: {pace}, {share:.0%} of its size"
    return True, f"{pace}, {share:.0%} of its size, {told(after.quality.metric, drop)}"


def unmet(constraint: Constraint, p50_ms: float, speedup: float, size_bytes: int) -> list[str]:
    """The parts of the constraint, other than quality, that a variant does not meet; each with both numbers."""
    reasons = []
    if constraint.max_latency_ms is not None and p50_ms > constraint.max_latency_ms:
        reasons.append(f"p50 is {p50_ms:.2f} ms, at most {constraint.max_latency_ms:g} ms was asked")
    if constraint.min_speedup is not None and speedup < constraint.min_speedup:
        reasons.append(f"it is {speedup:.2f}x faster, at least {constraint.min_speedup:g}x was asked")
    if constraint.max_size_bytes is not None and size_bytes > constraint.max_size_bytes:
        reasons.append(f"it has {size_bytes / 1e6:.1f} MB, at most {constraint.max_size_bytes / 1e6:g} MB was asked")
    return reasons


def choose(constraint: Constraint, measured: Sequence[Measurement]) -> tuple[int, list[str]]:
    """The place of the best of ``measured``, an interleaved run of the original and all that was kept, and what of the
    constraint it does not meet.

    It is the fastest of those that miss the fewest parts of the constraint. Where the run cannot tell others from it
    ("no difference"), it is the smallest of them all; the original only where it alone is left, for what was kept had
    been found to be faster or smaller.
    """
    original = measured[0]
    pace = [1.0, *(speedup(original, other).value for other in measured[1:])]
    missed = [unmet(constraint, item.p50, faster, item.size_bytes) for item, faster in zip(measured, pace, strict=True)]
    fewest = min(map(len, missed))
    left = [at for at, reasons in enumerate(missed) if len(reasons) == fewest]
    fastest = min(left, key=lambda at: measured[at].p50)
    alike = [at for at in left if at == fastest or _alike(measured[fastest], measured[at])]
    best = min(alike, key=lambda at: (at == 0, measured[at].size_bytes, measured[at].p50))
    return best, missed[best]


def _alike(one: Measurement, other: Measurement) -> bool:
    return speedup(one, other).verdict == "no difference"
