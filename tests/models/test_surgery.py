"""Masked is removed: the same outputs, whatever the plan."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from edgepress.errors import InputError
from edgepress.models import surgery
from edgepress.plan import PruningPlan, Unit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _in_double(workload: Any) -> Any:
    module = copy.deepcopy(workload.module).double()
    return workload.with_module(module, workload.structure, workload.plan)


def _inputs(workload: Any) -> dict[str, torch.Tensor]:
    batch = next(workload.data.calibration.batches(6))
    return dict(batch.inputs)


def _masked_and_removed(workload: Any, plan: PruningPlan) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = _inputs(workload)
    with torch.inference_mode(), surgery.masked(workload.module, workload.structure, plan):
        masked = workload.forward(inputs)
    with torch.inference_mode():
        return masked, surgery.prune(workload, plan).forward(inputs)


@SETTINGS
@given(st.data())
def test_masked_is_removed(workload: Any, plans: Any, data: st.DataObject) -> None:
    plan = data.draw(plans(workload.structure))
    masked, removed = _masked_and_removed(_in_double(workload), plan)
    torch.testing.assert_close(masked, removed, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["head", "ffn", "block"])
def test_all_units_but_one(workload: Any, kind: str) -> None:
    sites = workload.structure.of_kind(kind)
    units = [site.units[0] for site in sites[1:]] if kind == "block" else [u for s in sites for u in s.units[1:]]
    masked, removed = _masked_and_removed(_in_double(workload), PruningPlan.of(units))
    torch.testing.assert_close(masked, removed, rtol=0, atol=1e-9)


def test_the_plan_changes_the_outputs(workload: Any) -> None:
    with torch.inference_mode():
        before = workload.forward(_inputs(workload))
    masked, _ = _masked_and_removed(workload, PruningPlan.of([Unit("head", 0, 1), Unit("ffn", 2, 5)]))
    assert (before - masked).abs().max() > 1e-6


def test_really_smaller_and_the_original_untouched(workload: Any) -> None:
    plan = PruningPlan.of([Unit("head", 0, 0), Unit("ffn", 1, 3), Unit("block", 2, 0)])
    sites = {(site.kind, site.layer): site for site in workload.structure.sites}
    cost = sum(sites[u.kind, u.layer].params for u in plan.removed)
    before = workload.params
    pruned = surgery.prune(workload, plan)
    assert pruned.params == before - cost
    assert workload.params == before
    assert [site.count for site in pruned.structure.of_kind("head")] == [3, 4]


def test_plans_that_do_not_fit_are_refused(workload: Any) -> None:
    for units, message in (
        ([Unit("head", 0, 99)], "only 4"),
        ([Unit("head", 9, 0)], "layer 9"),
        (workload.structure.site("head", 1).units, "all 4 head"),
        ([Unit("block", layer, 0) for layer in range(3)], "all 3 blocks"),
    ):
        with pytest.raises(InputError, match=message):
            surgery.prune(workload, PruningPlan.of(units))


def test_masked_is_removed_on_the_trained_encoder(minilm: Any) -> None:
    plan = PruningPlan.of([Unit("head", 0, i) for i in range(11)] + [Unit("ffn", 3, i) for i in range(700)])
    masked, removed = _masked_and_removed(_in_double(minilm), plan)
    torch.testing.assert_close(masked, removed, rtol=0, atol=1e-9)
