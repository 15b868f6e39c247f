"""Allocation: from scores and a share to go, to the units that go."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import UsageError
from ...models.structure import Site, Structure
from ...plan import PruningPlan, Unit

MULTIPLE = {"ffn": 16, "hidden": 16}
"""Counts of units that a layer keeps are rounded to these, where its own count allows: the integer products of
current CPUs work through 16 columns at a time, and a remainder costs as much as a full step."""


def by_ratio(structure: Structure, values: Tensor, ratio: float | Mapping[str, float]) -> PruningPlan:
    """The plan that removes a share of the units of each kind: those that score lowest over all layers.

    ``values`` has shape [num_units]. A number as ``ratio`` is for channels and heads, which in grouped attention go
    with their key/value group; blocks and hidden channels go only where a mapping names them. Each layer keeps at least
    one unit, or ``MULTIPLE`` of them, so the share removed is a little below what was asked where layers are nearly
    empty. Units in blocks that go are not counted.
    """
    shares = _shares(structure, ratio)
    plan = PruningPlan.of(_lowest(structure, values, "block", shares.get("block", 0.0), frozenset()))
    gone = plan.blocks
    units = set(plan.removed)
    for kind, share in shares.items():
        if kind != "block":
            units |= _lowest(structure, values, kind, share, gone)
    return PruningPlan.of(units)


def uniform(structure: Structure, values: Tensor, ratio: float | Mapping[str, float]) -> PruningPlan:
    """The plan that removes the same number of units from every layer, those that score lowest in it.

    As :func:`by_ratio` otherwise; blocks go in the same share from every stack. What is left can be said in a plain
    configuration, wherever the architecture has a field for it.
    """
    shares = _shares(structure, ratio)
    units: set[Unit] = set()
    gone: set[int] = set()
    for stack in structure.stacks:
        blocks = [
            (float(values[place]), site)
            for site, place in structure.slices()
            if site.kind == "block" and site.layer in stack.layers
        ]
        going = min(round(shares.get("block", 0.0) * stack.count), stack.count - 1)
        for _, site in sorted(blocks, key=lambda pair: (pair[0], pair[1].layer))[:going]:
            units |= set(site.units)
            gone.add(site.layer)
    for site, place in structure.slices():
        lost = site.kind == "block" or (site.layer in gone and site.kind != "hidden")
        if lost or not shares.get(site.kind):
            continue
        keep = _rounded(site.count - round(shares[site.kind] * site.count), site)
        order = values[place].argsort(stable=True)[: site.count - keep].tolist()
        units |= {site.units[index] for index in order}
    return PruningPlan.of(units)


def _shares(structure: Structure, ratio: float | Mapping[str, float]) -> dict[str, float]:
    """The share to go of each kind; UsageError for a kind that is not there or a share that makes no sense."""
    if isinstance(ratio, int | float):
        grouped = "kv" in structure.kinds
        named = {"block", "hidden", "head" if grouped else "kv"}
        shares = {kind: ratio for kind in structure.kinds if kind not in named}
    else:
        shares = dict(ratio)
    for kind, share in shares.items():
        if kind not in structure.kinds:
            raise UsageError(f"There are no '{kind}' units in this model (there are: {', '.join(structure.kinds)}).")
        if not 0 <= share < 1:
            raise UsageError(f"The ratio for {kind} is {share}; it must be at least 0 and below 1.")
    return shares


def _rounded(keep: int, site: Site) -> int:
    """``keep`` units of a site, rounded to what its runtime works through at once."""
    multiple = min(MULTIPLE.get(site.kind, 1), site.count)
    return min(max(round(keep / multiple), 1) * multiple, site.count)


def _lowest(structure: Structure, values: Tensor, kind: str, share: float, gone: frozenset[int]) -> set[Unit]:
    """The units of ``kind`` outside the layers ``gone`` that fall below the share's threshold."""
    sites = [
        (site, values[place])
        for site, place in structure.slices()
        if site.kind == kind and (site.layer not in gone or kind == "hidden")
    ]
    if not sites or share == 0:
        return set()
    pool = torch.cat([scores for _, scores in sites])
    remove = round(share * len(pool))
    if kind == "block":
        lowest = pool.argsort(stable=True)[: min(remove, len(pool) - 1)]
        return {sites[position][0].units[0] for position in lowest.tolist()}
    wanted = torch.zeros(len(pool), dtype=torch.bool)
    wanted[pool.argsort(stable=True)[:remove]] = True
    removed: set[Unit] = set()
    start = 0
    for site, scores in sites:
        keep = site.count - int(wanted[start : start + site.count].sum())
        start += site.count
        keep = _rounded(keep, site)
        order = scores.argsort(stable=True)[: site.count - keep].tolist()
        removed |= {site.units[index] for index in order}
    return removed
