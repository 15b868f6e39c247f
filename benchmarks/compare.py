"""Compare: two measurements of one interleaved run, as a paired ratio with an interval and a verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import UsageError
from . import profile, runner
from .environment import differences
from .measurement import PERCENTILES, Measurement


@dataclass(frozen=True)
class Speedup:
    """How many times faster, with its 99 % interval; the verdict is "no difference" where that spans 1."""

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


def speedup(original: Measurement, other: Measurement) -> Speedup:
    """How many times longer ``original`` takes than ``other``, which was measured interleaved with it, round by round.

    What is compared is what stands side by side: the ratio of the two in each round or, offline, each pair of slices.
    What slows a machine down for a while cancels in it, as it does not from the medians of whole runs. The run is cut
    into ten segments with a median ratio each (offline a mean one); the value is their geometric mean, and its
    interval, at ``runner.CONFIDENCE``, that of ``runner.interval``, which says why it is honest where samples are no
    independent draws. A ``sequence`` is compared where both have one: what takes images, or tokens of one length alone,
    has none. Raises UsageError where the two cannot be compared: other shapes or scenarios, other machines,
    another number of rounds, or fewer than there are segments.
    """
    reasons = differences(original.environment, other.environment, (original.runtime, other.runtime))
    for field in ("target", "batch", "sequence", "past", "scenario", "per_slice", "rate"):
        ours, theirs = getattr(original, field), getattr(other, field)
        if ours != theirs and (field != "sequence" or (ours and theirs)):
            reasons.append(f"{field} is {ours} and {theirs}")
    if len(original.samples) != len(other.samples):
        reasons.append(f"{len(original.samples)} and {len(other.samples)} rounds were taken")
    elif len(original.turns) < runner.SEGMENTS:
        reasons.append(f"{len(original.turns)} rounds are fewer than {runner.SEGMENTS}")
    if reasons:
        raise UsageError(f"'{original.name}' and '{other.name}' cannot be compared: {'; '.join(reasons)}.")
    ratios = np.log(original.turns / other.turns)
    segments = runner.centres(ratios, np.mean if original.scenario == "offline" else np.median)
    mean, half = runner.interval(segments, runner.CONFIDENCE)
    return Speedup(math.exp(mean), math.exp(mean - half), math.exp(mean + half))


def share(first: Measurement, other: Measurement) -> float:
    """Latency of ``other`` as a share of that of ``first``: the median over rounds of their ratio.

    Runs of one round stand side by side in time, so what slows a machine down for a while slows down both.
    """
    return float(np.median(other.samples / first.samples))


def rows(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """The ``row`` of each measurement, compared with the first, which is the original."""
    original = measurements[0]
    return [row(item, None if item is original else speedup(original, item)) for item in measurements]


def row(item: Measurement, faster: Speedup | None) -> dict[str, Any]:
    """A measurement in the stable fields of the command line's JSON."""
    quality = None
    if item.quality is not None:
        quality = asdict(item.quality)
    told = [percent for percent in PERCENTILES if percent != 99 or item.p99 is not None]
    intervals = {f"p{percent}": item.interval(percent) if percent in told else None for percent in PERCENTILES}
    timed = {"p50": item.p50, "p90": item.p90, "p95": item.p95, "p99": item.p99, "n": len(item.samples)}
    figures = {
        "name": item.name,
        "artifact": item.artifact,
        "target": item.target,
        "runtime": item.runtime,
        "precision": item.precision,
        "params": item.params,
        "macs": item.macs,
        "size_bytes": item.size_bytes,
        "load_ms": item.load_ms,
        "peak_rss_bytes": item.peak_rss_bytes,
        "batch": item.batch,
        "sequence": item.sequence,
        "past": item.past,
        "scenario": item.scenario,
        "latency_ms": timed,
        "latency_interval_ms": list(item.interval()),
        "latency_intervals_ms": intervals,
        "intervals_by": "order statistics" if item.early else "bootstrap",
        "throughput": {"rows_per_s": item.throughput, "interval": item.throughput_interval},
        "speedup": faster.to_json() if faster else None,
        "quality": quality,
        "energy_mj": item.energy_mj,
        "energy_note": energy_note(item),
        "profile": profile.read(item).to_json() if item.profile else None,
    }
    if item.rate is not None:
        deadline = {"deadline_ms": item.deadline_ms, "within": item.within}
        figures["server"] = {"rate": item.rate, "loads": list(item.loads), "sustained": item.sustained, **deadline}
    return figures


def energy_note(item: Measurement) -> str:
    """The meter that ``energy_mj`` was read from, or why there is none."""
    told = item.environment.get("energy")
    if told is None:
        return "not measured"
    return str(told["meter"]) if item.energy_mj is not None else f"not available: {told['why']}"
