"""Savings: from the latencies of a model with a few counts of units to those of each site with every count.

Counts in between are interpolated. Where a layer has many units, the counts measured are multiples of a power of two;
how much dearer others are is learnt at a few counts, by the largest power of two that divides them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from ..compress.prune.budget import choices
from ..models.structure import Site, Structure

Floats = NDArray[np.float64]


def alike(structure: Structure) -> tuple[list[tuple[Site, ...]], list[tuple[Site, ...]]]:
    """Sites of the same kind and the same sizes, which share entries: those of units, and blocks."""
    groups: dict[tuple[str, int, int, int], list[Site]] = {}
    for site in choices(structure):
        groups.setdefault((site.kind, site.count, site.params, site.macs), []).append(site)
    found = [tuple(group) for group in groups.values()]
    return [g for g in found if g[0].kind != "block"], [g for g in found if g[0].kind == "block"]


def half(structure: Structure, blocks: Sequence[Site]) -> tuple[Site, ...]:
    """Half of ``blocks``, but never all blocks of a stack."""
    going: list[Site] = []
    for stack in structure.stacks:
        here = [site for site in blocks if site.layer in stack.layers]
        going += here[: min(-(-len(here) // 2), stack.count - 1)]
    return tuple(going)


def step(count: int, most: int) -> int:
    """The smallest power of two of which no more than ``most`` multiples fit into ``count``."""
    width = 1
    while count / width > most:
        width *= 2
    return width


def grid(count: int, width: int, *, between: bool) -> list[int]:
    """The counts to measure below ``count``: multiples of ``width``, and if asked some ``between``.

    These lie each smaller power of two above a multiple, at a third and at two thirds of the count.
    """
    found = set(range(width, count, width))
    for third in (1, 2) if between else ():
        base = round(third * count / 3 / width) * width
        found |= {base + 2**power for power in range(width.bit_length() - 1)}
    return sorted(kept for kept in found if 0 < kept < count)


def curve(count: int, saved: Mapping[int, float], least: int, width: int) -> Floats:
    """What is saved by keeping 0 … ``count`` units, from what was ``saved`` at some counts; [count + 1].

    Through the multiples of ``width``: decreasing in the units kept (isotonic regression takes out the noise) and
    linear in between. Other counts save less, by what the measured ones of the same largest power of two do on average,
    and no less than those of a larger one.
    """
    ks = np.arange(count + 1)
    fineness = np.minimum(ks & -ks, width)
    on = sorted(k for k in saved if k and k % width == 0)
    if not on:
        return np.array([saved.get(0, 0.0), *[0.0] * count])
    line = np.interp(ks, on, [saved[k] for k in on])
    inside = {k: line[k] - gain for k, gain in saved.items() if on[0] < k < on[-1]}
    less = _dearer(
        {fine: [lost for k, lost in inside.items() if fineness[k] == fine] for fine in set(fineness.tolist())}, width
    )
    on.append(count)
    gains = [saved[k] for k in on[:-1]] + [less[int(fineness[count])]]
    weights = np.ones(len(on))
    weights[-1] = 1e3 * len(on)  # nothing is saved at the full count: that is known, not measured
    smooth: Floats = isotonic_regression(gains, weights=weights, increasing=False).x
    line = np.interp(ks, on, smooth)
    whole: Floats = line - np.array([less[int(fine)] if fine else 0.0 for fine in fineness])
    whole[count] = 0.0
    if least:
        whole[:least] = whole[least]
    else:
        whole[0] = max(saved.get(0, whole[1:].max()), whole[1:].max())
    return whole


def _dearer(found: Mapping[int, Sequence[float]], width: int) -> dict[int, float]:
    """How much less is saved by counts whose largest power of two is each up to ``width``, from what was ``found``.

    Isotonic regression: never less by a smaller power than by a larger one, and nothing by ``width`` itself.
    """
    powers = [2**power for power in reversed(range(width.bit_length()))]
    means = [float(np.mean(found.get(power) or [0.0])) for power in powers]
    weights = [1e6, *(len(found.get(power) or ()) or 1e-6 for power in powers[1:])]
    return dict(zip(powers, isotonic_regression([0.0, *means[1:]], weights=weights).x.tolist(), strict=True))


def above_fewest(
    structure: Structure, saved: Mapping[Site, Floats], blocks: Mapping[Site, float]
) -> dict[tuple[str, int], tuple[float, ...]]:
    """Latencies as :class:`LatencyTable` holds them, from what is saved by units, and by whole blocks."""
    sites: dict[tuple[str, int], tuple[float, ...]] = {}
    for site in choices(structure):
        if site.kind == "block":
            inside = sum(float(gain.max()) for other, gain in saved.items() if other.layer == site.layer)
            sites[site.kind, site.layer] = (0.0, max(0.0, blocks.get(site, 0.0) - inside))
        else:
            gain = saved[site]
            sites[site.kind, site.layer] = tuple(np.round(gain.max() - gain, 6).tolist())
    return sites
