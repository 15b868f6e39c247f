"""Allocation to a budget: against every plan there is, on models small enough to try them all."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from edgepress.compress.prune import budget
from edgepress.compress.prune.budget import Costs, by_latency, choices, counted, fewest
from edgepress.errors import ConstraintError, UsageError
from edgepress.models import surgery
from edgepress.models.structure import Site, Stack, Structure
from edgepress.plan import PruningPlan
from hypothesis import given, settings
from hypothesis import strategies as st


def _structure(widths: tuple[tuple[int, ...], ...], *, stacks: tuple[int, ...] = (), shared: bool = False) -> Structure:
    """Layers with heads and channels of these counts; ``stacks`` says how many blocks each stack has."""
    sites: list[Site] = []
    for layer, counts in enumerate(widths):
        sites += [
            Site(kind, layer, count, params=3 + layer, macs=7)
            for kind, count in zip(("head", "ffn"), counts, strict=False)
        ]
        if stacks and not shared:
            sites.append(Site("block", layer, 1, params=100, macs=100))
    starts = itertools.accumulate((0, *stacks))
    return Structure(
        "bert", tuple(Stack(f"s{n}", s, n, shared) for s, n in zip(starts, stacks, strict=False)), tuple(sites)
    )


STRUCTURES = {
    "unequal": _structure(((2, 3), (3, 2)), stacks=(2,)),
    "two stacks": _structure(((2,), (1, 2), (2,)), stacks=(1, 2)),
    "shared": _structure(((3, 3),), stacks=(1,), shared=True),
    "no blocks": Structure("generic", (), tuple(Site("channel", layer, n) for layer, n in enumerate((4, 3, 3)))),
    "groups": Structure(
        "llama",
        (Stack("s", 0, 2),),
        (
            Site("head", 0, 4),
            Site("kv", 0, 2, owner=(0, 0, 1, 1)),
            Site("ffn", 0, 2),
            Site("block", 0, 1),
            Site("head", 1, 3),
            Site("block", 1, 1),
        ),
    ),
}


def _drawn(structure: Structure, seed: int) -> tuple[dict[Site, Any], Costs]:
    """Losses and costs that mostly grow with what is kept, as real ones do, and sometimes do not."""
    random = np.random.default_rng(seed)
    losses, of = {}, {}
    for site in choices(structure):
        losses[site] = np.sort(random.random(site.count + 1))[::-1].round(2)
        losses[site][-1] = 0.0
        of[site] = np.sort(random.random(site.count + 1)).round(2)
        if site.kind == "block":
            losses[site][0] *= 3
            of[site][0] = 0.0
        elif random.random() < 0.3:
            of[site] = random.permutation(of[site])
    return losses, Costs("latency", "ms", of, 0.25)


def _every(structure: Structure) -> Iterator[PruningPlan]:
    """Each way to keep so many units of every site, the first ones going."""
    sites = choices(structure)
    for kept in itertools.product(*(range(fewest(site), site.count + 1) for site in sites)):
        plan = PruningPlan.of(u for site, k in zip(sites, kept, strict=True) for u in site.units[: site.count - k])
        if not any(stack.count and plan.blocks.issuperset(stack.layers) for stack in structure.stacks):
            yield plan


def _first(structure: Structure) -> dict[Site, range]:
    return {site: range(site.count) for site in structure.sites}


def _loss(structure: Structure, losses: dict[Site, Any], plan: PruningPlan) -> float:
    """Of a plan: what goes in a block that goes is lost with the block."""
    blocks = {site.layer: site for site in structure.of_kind("block")}
    lost = sum(losses[blocks[layer]][0] for layer in plan.blocks)
    stays = (site for site in losses if site.layer not in plan.blocks and site.kind != "block")
    return float(lost + sum(losses[site][site.count - len(plan.indices(site.kind, site.layer))] for site in stays))


@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(sorted(STRUCTURES)), seed=st.integers(0, 10_000), share=st.floats(0.02, 1.2))
def test_no_plan_within_the_budget_loses_less(name: str, seed: int, share: float) -> None:
    structure = STRUCTURES[name]
    losses, costs = _drawn(structure, seed)
    plans = [(costs.total(structure, plan), _loss(structure, losses, plan)) for plan in _every(structure)]
    least, most = min(cost for cost, _ in plans), max(cost for cost, _ in plans)
    limit = least + share * (most - least)
    plan = by_latency(structure, losses, costs, limit, order=_first(structure))
    structure.check(structure.closed(plan))
    assert costs.total(structure, plan) <= limit + 1e-9
    tighter = limit - len(choices(structure)) * (limit - costs.rest) / budget.STEPS
    bound = min((loss for cost, loss in plans if cost <= tighter), default=np.inf)
    assert _loss(structure, losses, plan) <= bound + 1e-9


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_least_that_can_be_reached_is_reached_and_no_less(name: str) -> None:
    structure = STRUCTURES[name]
    losses, costs = _drawn(structure, 3)
    least = min(costs.total(structure, plan) for plan in _every(structure))
    plan = by_latency(structure, losses, costs, least, order=_first(structure))
    assert costs.total(structure, plan) == pytest.approx(least)
    with pytest.raises(ConstraintError) as refusal:
        by_latency(structure, losses, costs, least - 0.01, order=_first(structure))
    assert str(refusal.value) == (
        f"A latency of {least - 0.01:.4g} ms cannot be met by pruning: the least that is left of this model has "
        f"{least:.4g} ms."
    )


def test_more_budget_never_loses_more() -> None:
    structure = STRUCTURES["unequal"]
    losses, costs = _drawn(structure, 5)
    totals = [costs.total(structure, plan) for plan in _every(structure)]
    found = [
        _loss(structure, losses, by_latency(structure, losses, costs, limit, order=_first(structure)))
        for limit in np.linspace(min(totals), max(totals) + 0.1, 30)
    ]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1] == 0


@pytest.mark.parametrize("seed", range(6))
def test_further_budgets_are_kept_to(seed: int) -> None:
    structure = STRUCTURES["unequal"]
    losses, costs = _drawn(structure, seed)
    _, second = _drawn(structure, seed + 100)
    third = counted(structure, "macs", 400)
    plans = [
        (*(c.total(structure, plan) for c in (costs, second, third)), _loss(structure, losses, plan))
        for plan in _every(structure)
    ]
    limits = np.median([plan[:3] for plan in plans], axis=0)
    plan = by_latency(
        structure, losses, costs, limits[0], order=_first(structure), within=[(second, limits[1]), (third, limits[2])]
    )
    assert all(c.total(structure, plan) <= limit for c, limit in zip((costs, second, third), limits, strict=True))
    best = min(loss for *totals, loss in plans if all(np.array(totals) <= limits))
    worst = max(loss for *totals, loss in plans if all(np.array(totals) <= limits))
    assert best - 1e-9 <= _loss(structure, losses, plan) < (best + worst) / 2, "the gap is far below what chance gives"


def test_budgets_that_shut_each_other_out() -> None:
    structure = STRUCTURES["no blocks"]
    losses, _ = _drawn(structure, 0)
    up = Costs("latency", "ms", {s: np.arange(s.count + 1) / s.count for s in structure.sites}, 0.0)
    down = Costs("size", "MB", {s: 1 - np.arange(s.count + 1) / s.count for s in structure.sites}, 0.0)
    with pytest.raises(ConstraintError, match=r"not all of them together \(a size of 0.5 MB"):
        by_latency(structure, losses, up, 1.2, order=_first(structure), within=[(down, 0.5)])


def test_counts_that_are_forbidden() -> None:
    structure = STRUCTURES["shared"]
    losses, costs = _drawn(structure, 1)
    (head, ffn) = choices(structure)
    losses[head] = np.array([np.inf, np.inf, 1.0, 0.0])
    losses[ffn] = np.array([np.inf, 5.0, np.inf, 0.0])
    plans = [p for p in _every(structure) if np.isfinite(_loss(structure, losses, p))]
    limit = sorted(costs.total(structure, plan) for plan in plans)[1] + 0.01
    plan = by_latency(structure, losses, costs, limit, order=_first(structure))
    assert np.isfinite(_loss(structure, losses, plan))


@pytest.mark.parametrize(("values", "message"), [([0.0], "1 entries, not 4"), ([0.0, -1.0, 0.0, 1.0], "make no sense")])
def test_tables_that_do_not_fit(values: list[float], message: str) -> None:
    structure = STRUCTURES["shared"]
    losses, costs = _drawn(structure, 1)
    bad = Costs("latency", "ms", {**costs.of, choices(structure)[0]: values}, 0.0)
    with pytest.raises(UsageError, match=message):
        by_latency(structure, losses, bad, 1.0, order=_first(structure))


@pytest.mark.parametrize("what", ["params", "macs"])
def test_counts_are_those_of_the_model_that_is_left(workload: Any, what: str) -> None:
    """On a real model: the predicted number of parameters and of MACs is what surgery leaves."""
    structure = workload.structure
    costs = counted(structure, what, getattr(workload, what))
    values = torch.rand(structure.num_units, generator=torch.Generator().manual_seed(0))
    losses, order = budget.sums(structure, values), budget.orders(structure, values)
    for layer, lost in enumerate((100.0, 0.0, 100.0)):  # one block goes, and the rest comes from within the others
        losses[structure.site("block", layer)] = np.array([lost, 0.0])
    assert costs.total(structure, PruningPlan()) == getattr(workload, what)
    limit = costs.rest + 0.5 * (getattr(workload, what) - costs.rest)
    plan = by_latency(structure, losses, costs, limit, order=order)
    pruned = surgery.prune(workload, plan)
    assert plan.blocks == {1}
    assert len(plan) > 1
    assert costs.total(structure, plan) == getattr(pruned, what) <= limit


def test_units_go_in_their_order(workload: Any) -> None:
    structure = workload.structure
    values = torch.arange(structure.num_units, dtype=torch.float64)
    costs = counted(structure, "macs", workload.macs)
    losses = budget.sums(structure, values)
    plan = by_latency(structure, losses, costs, 0.7 * workload.macs, order=budget.orders(structure, values))
    for kind, layer in plan.sites():
        assert plan.indices(kind, layer) == tuple(range(len(plan.indices(kind, layer)))), "the lowest scores are first"
    assert len(plan)


def test_groups_take_their_heads_along(with_rows: Callable[[str], Any]) -> None:
    workload = with_rows("llama")
    structure = workload.structure
    assert {site.kind for site in choices(structure)} == {"kv", "ffn", "block"}
    values = torch.ones(structure.num_units, dtype=torch.float64)
    costs = counted(structure, "params", workload.params)
    limit = 0.8 * workload.params
    forbidden = budget.sums(structure, values) | {
        site: np.array([np.inf] * site.count + [0.0]) for site in structure.sites if site.kind in {"ffn", "block"}
    }
    inside = workload.params - sum((s.count - 1) * s.params for s in structure.of_kind("kv"))
    plan = by_latency(structure, forbidden, costs, max(limit, inside), order=budget.orders(structure, values))
    pruned = surgery.prune(workload, plan)
    assert pruned.params == costs.total(structure, plan) < workload.params
    assert all(
        site.count == 2 * pruned.structure.site("kv", site.layer).count for site in pruned.structure.of_kind("head")
    )
