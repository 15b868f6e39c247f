"""Allocation takes the lowest; reconstruction brings back what was lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import edgepress as ep
import pytest
import torch
from edgepress.compress.prune.allocate import by_ratio, uniform
from edgepress.compress.prune.reconstruct import reconstruct
from edgepress.errors import UsageError
from edgepress.models import surgery
from edgepress.models.plain import plain_skeleton
from edgepress.models.structure import Site, Stack, Structure
from edgepress.plan import PruningPlan, Unit
from hypothesis import given, settings
from hypothesis import strategies as st


def test_the_lowest_go(workload: Any) -> None:
    structure = workload.structure
    values = torch.arange(structure.num_units, dtype=torch.float64)
    plan = by_ratio(structure, values, {"head": 0.5})
    assert plan.to_json() == {"head": {"0": [0, 1, 2], "1": [0, 1]}}, "one head of layer 0 must stay"


def test_shares_and_multiples(workload: Any) -> None:
    structure = workload.structure
    values = ep.score(workload, "fisher", rows=64).values
    plan = by_ratio(structure, values, 0.5)
    pruned = surgery.prune(workload, plan)
    kept = [site.count for site in pruned.structure.of_kind("ffn")]
    assert all(count % 16 == 0 and count for count in kept)
    assert abs(sum(kept) - 0.5 * 3 * 128) <= 3 * 16


def test_whole_blocks_take_their_units_along(workload: Any) -> None:
    values = torch.arange(workload.structure.num_units, dtype=torch.float64)
    plan = by_ratio(workload.structure, values, {"block": 0.34, "head": 0.25})
    assert plan.blocks == {0}
    assert not plan.indices("head", 0)


@pytest.mark.parametrize(("ratio", "message"), [(1.0, "below 1"), (-0.1, "at least 0"), ({"tail": 0.5}, "no 'tail'")])
def test_ratios_that_make_no_sense(workload: Any, ratio: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        by_ratio(workload.structure, torch.zeros(workload.structure.num_units), ratio)


SHARES = st.sampled_from([0.0, 0.2, 0.34, 0.5, 0.67, 0.75, 0.9])


def _grouped(owners: list[tuple[int, ...]]) -> Structure:
    """Layers of heads that read key/value groups, or have their own where ``owners`` names none."""
    sites: list[Site] = []
    for layer, owner in enumerate(owners):
        sites.append(Site("head", layer, len(owner) or 3))
        if owner:
            sites.append(Site("kv", layer, 1 + max(owner), owner=owner))
    return Structure("llama", (Stack("s", 0, len(owners)),), tuple(sites))


@settings(max_examples=40, deadline=None)
@given(
    owners=st.lists(st.sampled_from([(), (0, 0), (0, 1, 1), (0, 0, 1, 1), (0, 0, 0)]), min_size=1, max_size=3).filter(
        any
    ),
    head=SHARES,
    kv=SHARES,
    seed=st.integers(0, 1000),
)
def test_heads_beside_groups_are_the_best_of_every_choice(
    owners: list[tuple[int, ...]], head: float, kv: float, seed: int
) -> None:
    """Of all choices of so many heads that leave one in each group that stays, theirs scores least."""
    structure = _grouped(owners)
    values = torch.rand(structure.num_units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    score = dict(zip(structure.units, values.tolist(), strict=True))
    groups = by_ratio(structure, values, {"kv": kv})
    both = by_ratio(structure, values, {"head": head, "kv": kv})
    assert {unit for unit in both.removed if unit.kind == "kv"} == groups.removed, "groups first, by their own scores"
    structure.check(structure.closed(both))
    assert structure.closed(both).removed == structure.closed(groups).removed | both.removed, "no more groups go along"

    along = {unit for unit in structure.closed(groups).removed if unit.kind == "head"}
    heads = [unit for unit in structure.units if unit.kind == "head"]
    free = [unit for unit in heads if unit not in along]
    of = {unit: (unit.layer, kv.parts[unit.index] if (kv := structure.find("kv", unit.layer)) else 0) for unit in free}
    going = max(round(head * len(heads)) - len(along), 0)
    going = min(going, len(free) - len(set(of.values())))
    best = min(
        sum(score[unit] for unit in chosen)
        for chosen in itertools.combinations(free, going)
        if {of[unit] for unit in free if unit not in chosen} == set(of.values())
    )
    chosen = {unit for unit in both.removed if unit.kind == "head"}
    assert len(chosen) == going
    assert sum(score[unit] for unit in chosen) == pytest.approx(best)


def test_heads_and_groups_come_out_as_asked(with_rows: Callable[[str], Any]) -> None:
    workload = with_rows("llama")
    structure = workload.structure
    for seed in range(4):
        values = torch.rand(structure.num_units, generator=torch.Generator().manual_seed(seed))
        pruned = surgery.prune(workload, by_ratio(structure, values, {"head": 0.5, "kv": 0.34}))
        counts = {kind: sum(site.count for site in pruned.structure.of_kind(kind)) for kind in ("head", "kv")}
        assert counts == {"head": 6, "kv": 4}


@pytest.mark.parametrize("ratio", [{"head": 0.5}, {"head": 0.4}, {"head": 0.67, "kv": 0.34}, {"head": 0.3, "kv": 0.3}])
def test_uniform_takes_as_many_heads_from_every_group(ratio: Any, with_rows: Callable[[str], Any]) -> None:
    workload = with_rows("llama")
    structure = workload.structure
    groups = 2 if "kv" in ratio else 3
    heads = 4 if ratio == {"head": 0.3, "kv": 0.3} else groups
    for seed in range(5):
        values = torch.rand(structure.num_units, generator=torch.Generator().manual_seed(seed))
        plan = uniform(structure, values, ratio)
        pruned = surgery.prune(workload, plan)
        config = plain_skeleton(pruned).config
        assert (config["num_attention_heads"], config["num_key_value_heads"]) == (heads, groups)
        lowest = {unit for unit in plan.removed if unit.kind == "head"}
        score = dict(zip(structure.units, values.tolist(), strict=True))
        for unit in lowest:
            other = Unit("head", unit.layer, unit.index ^ 1)  # groups are of two
            assert other not in lowest
            assert score[unit] < score[other]


def test_a_uniform_share_of_less_than_a_head_of_each_group_is_refused(with_rows: Callable[[str], Any]) -> None:
    structure = with_rows("llama").structure
    message = "A head ratio of 0.2 takes no head from key/value groups of 2, .*give head=0.5 or more, or a ratio for kv"
    with pytest.raises(UsageError, match=message):
        uniform(structure, torch.zeros(structure.num_units), {"head": 0.2})
    single = _grouped([(0, 1, 2)])
    with pytest.raises(UsageError, match="groups of 1, which all lose as many: give a ratio for kv"):
        uniform(single, torch.zeros(single.num_units), {"head": 0.5})


def test_reconstruction_brings_outputs_closer(workload: Any, output_error: Any) -> None:
    pruned = ep.prune(workload, ep.score(workload, "magnitude"), ratio={"head": 0.5, "ffn": 0.5, "block": 0.34})
    before = {name: tensor.clone() for name, tensor in pruned.module.state_dict().items()}
    solved = reconstruct(workload, pruned, rows=512)
    assert output_error(workload, solved) < 0.8 * output_error(workload, pruned)
    assert all(torch.equal(before[name], tensor) for name, tensor in pruned.module.state_dict().items())


def test_reconstruction_is_exact_where_nothing_is_lost(workload: Any, output_error: Any) -> None:
    """A channel that duplicates another can go, and its weight moves to the other."""
    module = surgery.prune(workload, PruningPlan()).module
    up = module.get_submodule("bert.encoder.layer.1.intermediate.dense")
    down = module.get_submodule("bert.encoder.layer.1.output.dense")
    with torch.no_grad():
        up.weight[9], up.bias[9] = up.weight[4], up.bias[4]
        down.weight[:, 9] += 0.5
    twin = workload.with_module(module, workload.structure, workload.plan)
    pruned = surgery.prune(twin, PruningPlan.of([Unit("ffn", 1, 9)]))
    lost = output_error(twin, pruned)
    assert lost > 1e-6
    assert output_error(twin, reconstruct(twin, pruned, rows=512, ridge=1e-9)) < 1e-3 * lost
