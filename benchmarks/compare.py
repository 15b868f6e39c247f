"""Compare: two measurements of one interleaved run, as a ratio with an interval and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import UsageError
from . import profile
from .environment import differences
from .measurement import Measurement, resampled_rounds


@dataclass(frozen=True)
class Speedup:
    """How many times faster, by medians, with its 95 % interval; the verdict is "no difference" where that spans 1."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low > 1:
            return "faster"
        return "slower" if self.high < 1 else "no difference"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def speedup(original: Measurement, other: Measurement, seed: int = 0) -> Speedup:
    """Median latency of ``original`` over that of ``other``, which were measured interleaved, round by round.

    The bootstrap draws the same rounds for both, so drift that hit both alike cancels. Raises UsageError where the two
    cannot be compared: other shapes, other machines, or another number of rounds.
    """
    reasons = differences(original.environment, other.environment)
    for field in ("target", "batch", "sequence", "past"):
        ours, theirs = getattr(original, field), getattr(other, field)
        if ours != theirs:
            reasons.append(f"{field} is {ours} and {theirs}")
    if len(original.samples) != len(other.samples):
        reasons.append(f"{len(original.samples)} and {len(other.samples)} rounds were taken")
    if reasons:
        raise UsageError(f"'{original.name}' and '{other.name}' cannot be compared: {'; '.join(reasons)}.")
    rounds = resampled_rounds(len(original.samples), seed)
    ratios = [np.median(original.samples[chosen]) / np.median(other.samples[chosen]) for chosen in rounds]
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Speedup(original.p50 / other.p50, float(low), float(high))


def rows(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """The ``row`` of each measurement, compared with the first, which is the original."""
    original = measurements[0]
    return [row(item, None if item is original else speedup(original, item)) for item in measurements]


def row(item: Measurement, faster: Speedup | None) -> dict[str, Any]:
    """A measurement in the stable fields of the command line's JSON."""
    quality = None
    if item.quality is not None:
        quality = asdict(item.quality)
    return {
        "name": item.name,
        "artifact": item.artifact,
        "target": item.target,
        "precision": item.precision,
        "params": item.params,
        "macs": item.macs,
        "size_bytes": item.size_bytes,
        "load_ms": item.load_ms,
        "peak_rss_bytes": item.peak_rss_bytes,
        "batch": item.batch,
        "sequence": item.sequence,
        "past": item.past,
        "latency_ms": {"p50": item.p50, "p90": item.p90, "p99": item.p99, "n": len(item.samples)},
        "latency_interval_ms": list(item.interval()),
        "speedup": faster.to_json() if faster else None,
        "quality": quality,
        "energy_mj": item.energy_mj,
        "energy_note": energy_note(item),
        "profile": profile.read(item).to_json() if item.profile else None,
    }


def energy_note(item: Measurement) -> str:
    """The meter that ``energy_mj`` was read from, or why there is none."""
    told = item.environment.get("energy")
    if told is None:
        return "not measured"
    return str(told["meter"]) if item.energy_mj is not None else f"not available: {told['why']}"
