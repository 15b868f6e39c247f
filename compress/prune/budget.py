"""Allocation to a budget: how many units each layer keeps so that the least is lost within a latency, or another cost.

What    Predicted losses and measured costs, both by site and by units kept, and a budget give the plan of least total
        loss whose total cost keeps to the budget. Whole blocks compete with units inside them.
When    A speed, a latency, a size or a number of operations is asked for. The costs are handed in; nothing is measured.
Cost    O(STEPS * options): well under a second for a model of a dozen blocks.
Source  ZipLM, Kurtic et al. 2023 (arXiv 2302.04089, section 3.2); multiple-choice knapsack by dynamic programming,
        Dudzinski and Walukiewicz 1987 (European Journal of Operational Research 28:1)

Exactness. The budget that is left to choose with is cut into ``STEPS`` cells, and each choice's cost is rounded *up* to
whole cells. What is chosen therefore costs no more in truth than in cells, and the budget is never broken. Of n sites
with a choice each is rounded by less than a cell; so whatever would have kept to a budget n cells smaller keeps to this
one after rounding, and the plan loses no more than the best plan for (1 - n / STEPS) of the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...errors import ConstraintError, UsageError
from ...models.structure import Site, Structure
from ...plan import PruningPlan

STEPS = 10_000

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Series = Mapping[Site, Sequence[float] | Floats]
"""For each site a number by units kept, of length ``count + 1``."""


@dataclass(frozen=True)
class Costs:
    """What a model costs: ``rest``, and of every site what its units cost by how many are kept.

    A block's own two numbers are what it costs gone (0) and kept with everything inside it at its cheapest; the sites
    in a block that goes cost nothing.
    """

    name: str
    unit: str
    of: Series
    rest: float

    def total(self, structure: Structure, plan: PruningPlan) -> float:
        """The cost of the model that ``plan`` leaves."""
        plan = structure.closed(plan)
        stays = (site for site in self.of if site.layer not in plan.blocks)
        return self.rest + sum(self.of[site][site.count - len(plan.indices(site.kind, site.layer))] for site in stays)

    def text(self, amount: float) -> str:
        return f"{amount:.4g} {self.unit}".rstrip() if amount < 1e4 else f"{amount:,.0f} {self.unit}".rstrip()


def choices(structure: Structure) -> tuple[Site, ...]:
    """The sites that an allocation chooses for: blocks, and what is in them or stands alone.

    Query heads go with their key/value group where there are such; the hidden width is every layer's and no one's.
    """
    grouped = {site.layer for site in structure.of_kind("kv")}
    return tuple(
        site
        for site in structure.sites
        if site.kind != "hidden" and not (site.kind == "head" and site.layer in grouped)
    )


def fewest(site: Site) -> int:
    """The fewest units that a site may keep."""
    return 0 if site.kind in {"ffn", "block"} else 1


def counted(structure: Structure, what: str, total: int) -> Costs:
    """``what`` ("params" or "macs") of a model that has ``total`` of it, as costs."""
    sites = choices(structure)
    inside: dict[int, int] = {}
    for site in sites:
        inside[site.layer] = inside.get(site.layer, 0) + (site.kind != "block") * site.count * getattr(site, what)
    of: dict[Site, list[float]] = {}
    for site in sites:
        if site.kind == "block":
            of[site] = [0.0, float(max(getattr(site, what) - inside[site.layer], 0))]
        else:
            of[site] = [float(kept * getattr(site, what)) for kept in range(site.count + 1)]
    name = {"params": "parameter count", "macs": "number of multiply-accumulates"}[what]
    return Costs(name, "", of, total - sum(series[-1] for series in of.values()))


def sums(structure: Structure, values: Tensor) -> dict[Site, Floats]:
    """Losses from scores [num_units] alone: keeping k units loses the sum of the lowest scores, negative ones as 0."""
    losses = {}
    for site, place in structure.slices():
        lowest = np.sort(values[place].clamp(min=0).double().numpy())
        losses[site] = np.concatenate([[0.0], np.cumsum(lowest)])[::-1]
    return losses


def orders(structure: Structure, values: Tensor) -> dict[Site, tuple[int, ...]]:
    """Of every site the units from the first to go to the last, by scores [num_units]."""
    return {site: tuple(values[place].argsort(stable=True).tolist()) for site, place in structure.slices()}


def by_latency(
    structure: Structure,
    losses: Series,
    latency: Costs,
    budget_ms: float,
    *,
    order: Mapping[Site, Sequence[int]],
    within: Sequence[tuple[Costs, float]] = (),
) -> PruningPlan:
    """The plan of least total loss whose latency is at most ``budget_ms``, near exact as the module's docstring says.

    ``losses`` and ``latency`` cover the sites of :func:`choices`; a loss of infinity forbids a count. ``order`` holds
    each site's units from the first to go. ``within`` are further costs with their limits, priced into the loss by
    Lagrange multipliers found by bisection: they are never broken either, but the plan may then lose more than the
    best one by the duality gap. Any cost can take latency's place. Raises ConstraintError, with both figures, where a
    budget cannot be met.
    """
    sites = choices(structure)
    for costs in (latency, *(extra for extra, _ in within)):
        _check(sites, costs.of, costs.name)
    _check(sites, losses, "loss")
    for costs, limit in ((latency, budget_ms), *within):
        least = reachable(structure, losses, costs)
        if least > limit * (1 + 1e-12):
            raise ConstraintError(
                f"A {costs.name} of {costs.text(limit)} cannot be met by pruning: the least that is left of this model "
                f"has {costs.text(least)}."
            )

    def solved(prices: Sequence[float]) -> PruningPlan:
        priced = {site: np.asarray(losses[site], dtype=np.float64) for site in sites}
        for price, (costs, _) in zip(prices, within, strict=True):
            priced = {site: priced[site] + price * np.asarray(costs.of[site]) for site in sites}
        return _plan(_least_loss(structure, priced, latency, budget_ms), order)

    spread = sum(float(np.ptp(_finite(losses[site]))) for site in sites)
    return _priced(structure, solved, within, spread or 1.0)


def reachable(structure: Structure, losses: Series, costs: Costs) -> float:
    """The least that any plan without an infinite loss leaves of a cost."""
    return costs.rest + _cheapest(structure, losses, costs).cost


def _check(sites: Sequence[Site], series: Series, name: str) -> None:
    for site in sites:
        values = np.asarray(series.get(site, ()), dtype=np.float64)
        if len(values) != site.count + 1:
            wanted = site.count + 1
            raise UsageError(
                f"The {name} of {site.kind} units in layer {site.layer} has {len(values)} entries, not {wanted}."
            )
        if np.isnan(values).any() or (name != "loss" and values.min() < 0) or not len(_finite(values)):
            raise UsageError(f"The {name} of {site.kind} units in layer {site.layer} holds values that make no sense.")


def _finite(values: Sequence[float] | Floats) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    return found[np.isfinite(found)]


# ---- further budgets


def _priced(
    structure: Structure,
    solved: Callable[[Sequence[float]], PruningPlan],
    within: Sequence[tuple[Costs, float]],
    scale: float,
) -> PruningPlan:
    """The plan at the lowest prices of the further costs at which all of them keep to their limits.

    Prices only rise, one cost after the other, so a cost that was met stays met or is priced higher in the next turn.
    """
    prices = [0.0] * len(within)

    def over(plan: PruningPlan, place: int) -> bool:
        costs, limit = within[place]
        return costs.total(structure, plan) > limit

    for _ in range(4 * len(within) + 1):
        plan = solved(prices)
        broken = next((place for place in range(len(within)) if over(plan, place)), None)
        if broken is None:
            return plan
        low, high = prices[broken], max(prices[broken], scale / within[broken][1])
        while over(solved([*prices[:broken], high, *prices[broken + 1 :]]), broken):
            low, high = high, 8 * high
            if high > 1e9 * scale / within[broken][1]:
                break
        for _ in range(24):
            middle = (low + high) / 2
            if over(solved([*prices[:broken], middle, *prices[broken + 1 :]]), broken):
                low = middle
            else:
                high = middle
        prices[broken] = high
    names = ", ".join(f"a {costs.name} of {costs.text(limit)}" for costs, limit in within)
    raise ConstraintError(f"Each budget can be met, but not all of them together ({names}, beside the latency).")


# ---- the knapsack


@dataclass(frozen=True)
class _Item:
    """The choices of one site that are worth making: none is both dearer and worse than another."""

    site: Site
    kept: Ints
    cost: Floats
    loss: Floats


@dataclass(frozen=True)
class _Group:
    """Sites that stay or go together: those of a block, with the block as an item of one choice; or a lone site."""

    items: tuple[_Item, ...]
    block: Site | None = None
    gone: float = math.inf
    """What is lost where the block goes."""


@dataclass
class _Allocation:
    kept: dict[Site, int] = field(default_factory=dict)
    cost: float = 0.0


def _item(site: Site, losses: Series, costs: Costs, least: int) -> _Item:
    loss, cost = (
        np.asarray(losses[site], dtype=np.float64)[least:],
        np.asarray(costs.of[site], dtype=np.float64)[least:],
    )
    order = np.lexsort((loss, cost))
    order = order[np.isfinite(loss[order])]
    before = np.minimum.accumulate(np.concatenate([[np.inf], loss[order]]))[:-1]
    order = order[loss[order] < before]
    return _Item(site, order + least, cost[order], loss[order])


def _groups(structure: Structure, losses: Series, costs: Costs) -> list[list[_Group]]:
    """Each stack's blocks, of which one must stay; and every site that is in no removable block, on its own."""
    blocks = {site.layer: site for site in structure.of_kind("block")}
    of_layer: dict[int, list[_Item]] = {}
    for site in choices(structure):
        if site.kind != "block":
            of_layer.setdefault(site.layer, []).append(_item(site, losses, costs, fewest(site)))
    found = []
    for stack in structure.stacks:
        layers = [layer for layer in stack.layers if layer in blocks]
        whole = [
            _Group(
                (*of_layer.pop(layer, ()), _item(blocks[layer], losses, costs, 1)),
                blocks[layer],
                float(losses[blocks[layer]][0]),
            )
            for layer in layers
        ]
        if whole:
            found.append(whole)
    return found + [[_Group((item,))] for items in of_layer.values() for item in items]


def _cheapest(structure: Structure, losses: Series, costs: Costs) -> _Allocation:
    """What costs least, whatever it loses."""
    found = _Allocation()
    for groups in _groups(structure, losses, costs):
        each = [sum(float(item.cost[0]) for item in group.items) for group in groups]
        staying = {place for place, group in enumerate(groups) if not math.isfinite(group.gone)}
        staying = staying or {int(np.argmin(each))}
        found.cost += sum(each[place] for place in staying)
        for place, group in enumerate(groups):
            if place in staying:
                found.kept |= {item.site: int(item.kept[0]) for item in group.items}
            elif group.block:
                found.kept[group.block] = 0
    return found


def _least_loss(structure: Structure, losses: Series, costs: Costs, budget: float) -> _Allocation:
    """Dynamic programming over sites and cells.

    ``best[c]`` is the least loss of what has been chosen so far at a cost of at most c cells. Within a stack it has two
    rows: as long as no block of the stack stays (0), and once one does (1); only the second leads out of the stack.
    """
    cheapest = _cheapest(structure, losses, costs)
    cell = (budget - costs.rest) / STEPS
    stacks = _groups(structure, losses, costs)
    best = np.zeros(STEPS + 1)
    trail: list[list[tuple[_Group, Ints, list[tuple[_Item, Ints, Ints]], NDArray[np.bool_]]]] = []
    for groups in stacks:
        rows = np.stack([best, np.full(STEPS + 1, np.inf)])
        steps = []
        for group in groups:
            came, inside = rows.argmin(axis=0), rows.min(axis=0)
            chosen = []
            for item in group.items:
                cells = np.ceil(item.cost / cell - 1e-9).astype(np.int64) if cell > 0 else (item.cost > 0) * (STEPS + 1)
                inside, choice = _with(inside, cells, item.loss)
                chosen.append((item, cells, choice))
            gone = rows + group.gone
            stays = inside < gone[1]
            rows = np.stack([gone[0], np.where(stays, inside, gone[1])])
            steps.append((group, came, chosen, stays))
        best = rows[1]
        trail.append(steps)
    if not math.isfinite(best[-1]):
        return cheapest  # it keeps to the budget, by less than the rounding
    found, at = _Allocation(), STEPS
    for steps in reversed(trail):
        row = 1
        for group, came, chosen, stays in reversed(steps):
            if row == 0 or not stays[at]:
                assert group.block is not None
                found.kept[group.block] = 0
                continue
            for item, cells, choice in reversed(chosen):
                option = int(choice[at])
                found.kept[item.site] = int(item.kept[option])
                found.cost += float(item.cost[option])
                at -= int(cells[option])
            row = int(came[at])
    return found


def _with(best: Floats, cells: Ints, loss: Floats) -> tuple[Floats, Ints]:
    """``best`` with one more choice made, and which option that is at each number of cells."""
    found, choice = np.full_like(best, np.inf), np.zeros(len(best), dtype=np.int64)
    for option, (width, lost) in enumerate(zip(cells.tolist(), loss.tolist(), strict=True)):
        if width >= len(best):
            continue
        candidate = best[: len(best) - width] + lost
        better = candidate < found[width:]
        found[width:][better] = candidate[better]
        choice[width:][better] = option
    return found, choice


def _plan(allocation: _Allocation, order: Mapping[Site, Sequence[int]]) -> PruningPlan:
    units: list[Any] = []
    for site, kept in allocation.kept.items():
        going = [0] if site.kind == "block" else list(order[site])
        units += [site.units[index] for index in going[: site.count - kept]]
    return PruningPlan.of(units)
