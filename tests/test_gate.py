"""What is chosen in the end: what meets the constraint, and among what cannot be told apart the smallest."""

from __future__ import annotations

import numpy as np
import pytest
from edgepress.benchmarks.measurement import Measurement
from edgepress.gate import Constraint, choose

from .benchmarks.test_measure import made_up

NOISE = np.exp(np.random.default_rng(0).normal(0, 0.01, (4, 400)))


def taken(*each: tuple[float, int]) -> list[Measurement]:
    """Measurements of so many milliseconds and megabytes."""
    drawn = enumerate(zip(each, NOISE, strict=False))
    return [made_up(ms * noise, name=str(at), size_bytes=mb * 10**6) for at, ((ms, mb), noise) in drawn]


@pytest.mark.parametrize(
    ("constraint", "each", "best"),
    [
        (Constraint(), [(10, 90), (6, 55), (4, 60)], 2),
        (Constraint(max_size_bytes=30_000_000), [(10, 90), (4, 55), (6, 25)], 2),
        (Constraint(max_size_bytes=30_000_000, min_speedup=2), [(10, 90), (4, 55), (6, 25), (8, 24)], 1),
        (Constraint(max_size_bytes=30_000_000), [(10, 90), (12, 25)], 1),
        (Constraint(min_speedup=1000), [(10, 90), (6, 20), (4, 60)], 2),
        (Constraint(), [(10, 90), (4, 60), (4.001, 20), (4.002, 40)], 2),  # no difference: the smallest
        (Constraint(), [(10, 90), (10.001, 40)], 1),  # the original wins by noise
        (Constraint(), [(10, 90), (10.001, 90)], 1),
        (Constraint(), [(10, 90), (12, 40)], 0),
        (Constraint(), [(10, 90)], 0),
    ],
)
def test_the_best_of_a_run(constraint: Constraint, each: list[tuple[float, int]], best: int) -> None:
    assert choose(constraint, taken(*each))[0] == best


def test_what_the_best_misses_is_told() -> None:
    _, missed = choose(Constraint(max_size_bytes=10_000_000, min_speedup=2), taken((10, 90), (4, 55), (6, 25)))
    assert missed == ["it has 55.0 MB, at most 10 MB was asked"]
    assert choose(Constraint(max_size_bytes=60_000_000), taken((10, 90), (4, 55)))[1] == []
