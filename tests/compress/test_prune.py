"""Allocation takes the lowest; reconstruction brings back what was lost."""

from __future__ import annotations

from typing import Any

import edgepress as ep
import pytest
import torch
from edgepress.compress.prune.allocate import by_ratio
from edgepress.compress.prune.reconstruct import reconstruct
from edgepress.errors import UsageError
from edgepress.models import surgery
from edgepress.plan import PruningPlan, Unit


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
