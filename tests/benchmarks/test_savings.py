"""From the latencies of a few counts to those of all."""

from __future__ import annotations

import numpy as np
import pytest
from edgepress.benchmarks.savings import curve, grid, half, step
from edgepress.models.structure import Site, Stack, Structure


def test_counts_to_measure() -> None:
    assert (step(12, 24), step(1536, 24), step(100, 24)) == (1, 64, 8)
    assert grid(12, 1, between=True) == list(range(1, 12))
    assert grid(100, 8, between=False) == list(range(8, 100, 8))
    off = set(grid(1536, 64, between=True)) - set(range(64, 1536, 64))
    assert off == {base + 2**power for base in (512, 1024) for power in range(6)}


def _kernel(kept: int) -> float:
    """Work in steps of 16, and a penalty for what is no multiple of 16: ms saved of 1,536 units."""
    return 0.01 * (1536 - 16 * -(-kept // 16)) / 16 - (0.3 if kept % 16 else 0.0)


def test_a_curve_learns_what_kernels_like() -> None:
    saved = {kept: _kernel(kept) for kept in grid(1536, 64, between=True)} | {0: 1.5}
    found = curve(1536, saved, 0, 64)
    assert found[0] == 1.5
    assert found[1536] == 0
    assert [found[k] for k in range(64, 1536, 64)] == pytest.approx([_kernel(k) for k in range(64, 1536, 64)])
    assert [found[k] for k in range(80, 1536, 16)] == pytest.approx([_kernel(k) for k in range(80, 1536, 16)])
    assert all(found[k] < found[16 * -(-k // 16)] for k in range(65, 1520) if k % 16), (
        "a multiple of 16 is never dearer"
    )


def test_noise_is_smoothed_out() -> None:
    random = np.random.default_rng(0)
    truth = np.linspace(1.2, 0.0, 13)
    saved = {kept: truth[kept] + random.normal(0, 0.1) for kept in range(1, 12)}
    found = curve(12, saved, 1, 1)
    assert (np.diff(found) <= 1e-12).all()
    assert found[0] == found[1], "one must stay"
    assert np.abs(found[1:] - truth[1:]).mean() < np.abs([saved[k] - truth[k] for k in saved]).mean()


def test_noise_is_hardly_a_penalty() -> None:
    random = np.random.default_rng(0)
    less = []
    for _ in range(200):
        saved = {kept: 1536 - kept + random.normal(0, 30) for kept in grid(1536, 64, between=True)}
        less.append(1536 - 1001 - curve(1536, saved, 0, 64)[1001])
    assert np.mean(less) < 22  # the largest of what each power of two seems to cost, one after the other, gives 29


def test_a_full_count_that_is_no_multiple() -> None:
    saved = {kept: (100 - kept) * 0.01 - (0.0 if kept % 8 == 0 else 0.2) + 0.2 for kept in grid(100, 8, between=True)}
    found = curve(100, saved, 1, 8)
    assert found[100] == 0
    assert found[96] == pytest.approx(0.24)
    assert found[97] == pytest.approx(0.2 - found[99], abs=0.25)


def test_curves_of_nothing() -> None:
    assert curve(1, {}, 1, 1).tolist() == [0, 0]
    assert curve(1, {0: 0.5}, 0, 1).tolist() == [0.5, 0]


def test_half_of_the_blocks_but_never_all_of_a_stack() -> None:
    blocks = tuple(Site("block", layer, 1) for layer in range(6))
    structure = Structure("bart", (Stack("a", 0, 1), Stack("b", 1, 2), Stack("c", 3, 3)), blocks)
    assert [site.layer for site in half(structure, blocks)] == [1, 3, 4]
