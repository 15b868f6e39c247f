"""Measurement: raw samples of one artifact on one target; every statistic is derived from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, norm
from scipy.stats import t as student

from ..errors import InputError
from ..models.metrics import Quality
from . import runner

PERCENTILES = (50, 90, 95, 99)
MIN_FOR_P99 = 1000
RESAMPLES = 1000
CELLS = 1 << 20

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """One artifact on one target at one input shape.

    ``samples_ms`` are the latencies of single runs in the order of the rounds: sample i of two measurements of one
    interleaved run stand side by side. ``environment`` is the fingerprint of where they were taken, with what timing
    takes itself, which is subtracted (``clock_overhead_ns``), and how often the artifacts were opened (``openings``).
    """

    name: str
    artifact: str
    target: str
    precision: str
    params: int
    macs: int
    size_bytes: int
    load_ms: float | None
    peak_rss_bytes: int | None
    batch: int
    sequence: int
    samples_ms: tuple[float, ...]
    environment: Mapping[str, Any]
    quality: Quality | None = None
    past: int = 0
    """Tokens before, whose keys and values were given."""
    runtime: str = ""
    """What ran it, and how: "onnx", "torch compile", "onnx cuda"; empty where it was measured before that was kept."""
    scenario: str = "single-stream"
    """Or "offline", where a sample is the time from one answer to the next, or "server", where it counts from when a
    query was due."""
    per_slice: int = 1
    """Samples of one turn in an offline run."""
    rate: float | None = None
    """Queries a second that arrived at a server."""
    deadline_ms: float | None = None
    loads: tuple[float, ...] = ()
    """Of a server, in each quarter of the run: the share of the time between arrivals that the work takes."""
    early: bool = False
    """Whether the run ended as soon as it was precise enough."""
    energy_mj: float | None = None
    """Millijoules of one run, of all that the meter in ``environment["energy"]`` measures; None without one."""
    profile: Mapping[str, Any] | None = None
    """What ``runner.profile`` told; :func:`.profile.read` makes sense of it."""

    @cached_property
    def samples(self) -> Floats:
        return np.asarray(self.samples_ms, dtype=np.float64)

    @property
    def p50(self) -> float:
        return float(np.median(self.samples))

    @property
    def p90(self) -> float:
        return float(np.percentile(self.samples, 90))

    @property
    def p95(self) -> float:
        return float(np.percentile(self.samples, 95))

    @property
    def p99(self) -> float | None:
        """None below 1,000 samples: fewer than ten of them would lie beyond it."""
        return float(np.percentile(self.samples, 99)) if len(self.samples) >= MIN_FOR_P99 else None

    @cached_property
    def turns(self) -> Floats:
        """Milliseconds that stand side by side with those of other measurements: each sample, or each slice's mean."""
        return np.asarray(self.samples.reshape(-1, self.per_slice).mean(axis=1))

    @property
    def throughput(self) -> float:
        """Rows a second: one run after the other, over all of an offline run, or as they came in to a server."""
        if self.rate is not None:
            return self.batch * min(self.rate, self.rate / float(np.mean(self.loads)))
        return self.batch * 1000.0 / (float(self.samples.mean()) if self.scenario == "offline" else self.p50)

    @property
    def throughput_interval(self) -> tuple[float, float] | None:
        """95 % interval of an offline run's; None of others."""
        if self.scenario != "offline" or len(self.turns) < runner.SEGMENTS:
            return None
        _, half = runner.interval(runner.centres(np.log(self.turns), np.mean), 0.95)
        return self.throughput * float(np.exp(-half)), self.throughput * float(np.exp(half))

    @property
    def sustained(self) -> bool | None:
        """Whether a server was done with its work before more came, in every quarter of the run; else a queue grows."""
        return max(self.loads) < 1 if self.loads else None

    @property
    def within(self) -> float | None:
        """The share of queries that were answered by the deadline."""
        return None if self.deadline_ms is None else float(np.mean(self.samples <= self.deadline_ms))

    def interval(self, percent: float = 50, seed: int = 0) -> tuple[float, float | None]:
        """95 % interval of a percentile of the latency, in ms: by bootstrap, and after an early end by ``order``."""
        if self.early:
            return order(self.samples, percent)
        return self._bootstrap[percent] if percent in PERCENTILES and not seed else self._resampled([percent], seed)[0]

    @cached_property
    def _bootstrap(self) -> dict[float, tuple[float, float]]:
        return dict(zip(PERCENTILES, self._resampled(PERCENTILES, 0), strict=True))

    def _resampled(self, percents: Sequence[float], seed: int) -> list[tuple[float, float]]:
        """Intervals of percentiles over ``resampled_rounds``.

        They are made wider by as much as Student's is for as few blocks, counted as half of them, which simulations of
        drift and heavy tails ask for, and by as much as blocks of one series vary less than those of another would.
        """
        count = len(self.samples)
        blocks = count / block_length(count)
        drawn = [np.percentile(self.samples[some], percents, axis=1) for some in resampled_rounds(count, seed)]
        ends = np.percentile(np.concatenate(drawn, axis=1), [2.5, 97.5], axis=1)
        if blocks > 2:
            wider = student.ppf(0.975, blocks / 2) / norm.ppf(0.975) / np.sqrt(1 - 1 / blocks)
            value = np.percentile(self.samples, percents)
            ends = value * (ends / value) ** wider
        return [(float(low), float(high)) for low, high in ends.T]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Measurement:
        """The inverse of :meth:`to_json`; InputError on anything else."""
        try:
            quality = Quality(**data["quality"]) if data["quality"] is not None else None
            samples = tuple(float(sample) for sample in data["samples_ms"])
            loads = tuple(float(load) for load in data.get("loads", ()))
            measurement = cls(**{**data, "samples_ms": samples, "quality": quality, "loads": loads})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"This is not a measurement: {error!r}.") from error
        if not samples or not np.isfinite(samples).all() or min(samples) <= 0:
            raise InputError(f"The measurement '{measurement.name}' holds no samples, or some that are not times.")
        if type(measurement.per_slice) is not int or measurement.per_slice < 1 or len(samples) % measurement.per_slice:
            raise InputError(f"The measurement '{measurement.name}' has no slices of {measurement.per_slice} samples.")
        return measurement


def block_length(count: int) -> int:
    return max(1, round(1.5 * count**0.5)) if count > 9 else 1


def resampled_rounds(count: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Bootstrap resamples of ``count`` rounds, one a row, drawn in blocks of neighbours; of all 1,000, so many at once
    as are no more than ``CELLS`` numbers.

    A machine's clock and load drift, so neighbouring rounds are alike; blocks of 1.5 times the square root of ``count``
    keep that likeness (Kuensch 1989, Annals of Statistics 17:3). After the last round comes the first, so that all are
    drawn equally often (Politis and Romano 1992).
    """
    random = np.random.default_rng(seed)
    length = block_length(count)
    starts = random.integers(0, count, size=(RESAMPLES, -(-count // length)))
    for some in np.array_split(starts, min(RESAMPLES, -(-RESAMPLES * count // CELLS))):
        yield ((some[:, :, None] + np.arange(length)) % count).reshape(len(some), -1)[:, :count]


def order(samples: Floats, percent: float, confidence: float = 0.95) -> tuple[float, float | None]:
    """Bounds of a percentile without resampling and for any distribution: two of the samples themselves.

    How many of n samples lie below the percentile is binomial, so the quantiles of that count, the bounds of Clopper
    and Pearson (1934, Biometrika 26:4), name the samples between which it lies. MLPerf's early stopping is the upper
    one of them (``loadgen/early_stopping.cc``; its figure for a p99 needs 662 queries at 99 %). The upper is None where
    there are too few samples for any to lie above it. They hold for independent samples.
    """
    ordered, count = np.sort(samples), len(samples)
    below = binom.ppf([(1 - confidence) / 2, (1 + confidence) / 2], count, percent / 100)
    low, high = max(int(below[0]), 1), int(below[1]) + 1
    return float(ordered[low - 1]), float(ordered[high - 1]) if high <= count else None
