"""Measurement: raw samples of one artifact on one target; every statistic is derived from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..models.metrics import Quality

MIN_FOR_P99 = 1000
RESAMPLES = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """One artifact on one target at one input shape.

    ``samples_ms`` are the latencies of single runs in the order of the rounds: sample i of two measurements of one
    interleaved run stand side by side. ``environment`` is the fingerprint of where they were taken.
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
    def p99(self) -> float | None:
        """None below 1,000 samples: fewer than ten of them would lie beyond it."""
        return float(np.percentile(self.samples, 99)) if len(self.samples) >= MIN_FOR_P99 else None

    @property
    def throughput(self) -> float:
        """Rows a second, one run after the other."""
        return self.batch * 1000.0 / self.p50

    def interval(self, percent: float = 50, seed: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval of a percentile of the latency, in ms."""
        rounds = resampled_rounds(len(self.samples), seed)
        low, high = np.percentile([np.percentile(self.samples[chosen], percent) for chosen in rounds], [2.5, 97.5])
        return float(low), float(high)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Measurement:
        """The inverse of :meth:`to_json`; InputError on anything else."""
        try:
            quality = Quality(**data["quality"]) if data["quality"] is not None else None
            samples = tuple(float(sample) for sample in data["samples_ms"])
            measurement = cls(**{**data, "samples_ms": samples, "quality": quality})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"This is not a measurement: {error!r}.") from error
        if not samples or not np.isfinite(samples).all() or min(samples) <= 0:
            raise InputError(f"The measurement '{measurement.name}' holds no samples, or some that are not times.")
        return measurement


def resampled_rounds(count: int, seed: int) -> list[NDArray[np.int64]]:
    """Bootstrap resamples of ``count`` rounds, drawn in blocks of neighbours.

    A machine's clock and load drift, so neighbouring rounds are alike; blocks of about count^(1/3) keep that likeness,
    and with it an honest interval (Künsch 1989, Annals of Statistics 17:3).
    """
    random = np.random.default_rng(seed)
    length = max(1, round(count ** (1 / 3)))
    blocks = -(-count // length)
    offsets = np.arange(length)
    starts = random.integers(0, count - length + 1, size=(RESAMPLES, blocks))
    return [(start[:, None] + offsets).ravel()[:count] for start in starts]
