"""Allocation: from scores and a share to go, to the units that go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

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
    empty. Units in blocks that go are not counted. Where a mapping names both key/value groups and heads, groups are
    chosen first: heads that go along count towards the heads' share, and each group that stays keeps one at least.
    """
    shares = _shares(structure, ratio)
    plan = PruningPlan.of(_lowest(structure, values, "block", shares.get("block", 0.0), frozenset()))
    gone = plan.blocks
    units = set(plan.removed)
    for kind, share in shares.items():
        if kind != "block" and not (kind == "head" and "kv" in shares):
            units |= _lowest(structure, values, kind, share, gone)
    if {"head", "kv"} <= shares.keys():
        units |= _heads_beside_groups(structure, values, shares["head"], PruningPlan.of(units))
    return PruningPlan.of(units)


def uniform(structure: Structure, values: Tensor, ratio: float | Mapping[str, float]) -> PruningPlan:
    """The plan that removes the same number of units from every layer, those that score lowest in it.

    As :func:`by_ratio` otherwise; blocks go in the same share from every stack, and heads in the same number from every
    key/value group that stays. What is left can be said in a plain configuration, wherever the architecture has a field
    for it. Raises UsageError where a share of heads comes to none of any group.
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
        if lost or not shares.get(site.kind) or (site.kind == "head" and structure.find("kv", site.layer)):
            continue
        keep = _rounded(site.count - round(shares[site.kind] * site.count), site)
        order = values[place].argsort(stable=True)[: site.count - keep].tolist()
        units |= {site.units[index] for index in order}
    if shares.get("head") and "kv" in structure.kinds:
        units |= _heads_of_each_group(structure, values, shares["head"], PruningPlan.of(units))
    return PruningPlan.of(units)


def _groups(structure: Structure, plan: PruningPlan) -> Iterator[tuple[Site, slice, dict[int, list[int]]]]:
    """The heads of every layer that ``plan`` leaves, with their place in scores, and the indices of those that stay by
    the key/value group that they read; where there are none, by the whole layer."""
    for site, place in structure.slices():
        if site.kind != "head" or site.layer in plan.blocks:
            continue
        kv = structure.find("kv", site.layer)
        owner = kv.parts if kv else (0,) * site.count
        gone = set(plan.indices("kv", site.layer))
        groups: dict[int, list[int]] = {}
        for head, group in enumerate(owner):
            if group not in gone:
                groups.setdefault(group, []).append(head)
        yield site, place, groups


def _heads_beside_groups(structure: Structure, values: Tensor, share: float, plan: PruningPlan) -> set[Unit]:
    """The heads of lowest score that make up ``share`` of all with those that go with the groups of ``plan``, but for
    the best head of each group that stays."""
    total = left = 0
    free: list[tuple[float, Unit]] = []
    for site, place, groups in _groups(structure, plan):
        total += site.count
        left += sum(map(len, groups.values()))
        scores = values[place].tolist()
        for heads in groups.values():
            best = max(heads, key=scores.__getitem__)
            free += [(scores[head], site.units[head]) for head in heads if head != best]
    going = max(round(share * total) - (total - left), 0)
    return {unit for _, unit in sorted(free, key=lambda pair: pair[0])[:going]}


def _heads_of_each_group(structure: Structure, values: Tensor, share: float, plan: PruningPlan) -> set[Unit]:
    """As many of the lowest heads from every group that ``plan`` leaves in a layer, so that with those that go along
    about ``share`` of the layer's heads go."""
    units: set[Unit] = set()
    for site, place, groups in _groups(structure, plan):
        if not structure.find("kv", site.layer):
            continue
        size = min(map(len, groups.values()))
        keep = min(max(round((1 - share) * site.count / len(groups)), 1), size)
        if keep * len(groups) == site.count:
            raise UsageError(
                f"A head ratio of {share:g} takes no head from key/value groups of {size}, which all lose as many: "
                + (f"give head={1 / size:.2g} or more, or a ratio for kv." if size > 1 else "give a ratio for kv.")
            )
        scores = values[place].tolist()
        for heads in groups.values():
            units |= {site.units[head] for head in sorted(heads, key=scores.__getitem__)[: len(heads) - keep]}
    return units


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
