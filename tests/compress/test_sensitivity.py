"""Sensitivity and mixed precision against models that were changed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from edgepress.compress.quantize import int8, sensitivity
from edgepress.compress.quantize.fake import grid
from edgepress.errors import UsageError
from edgepress.models.layers import matrix
from edgepress.plan import QuantizationPlan


def _distance_by_hand(workload: Any, plan: QuantizationPlan, names: Collection[str]) -> float:
    """KL of classes, or squared error over the mean square, of a copy with rounded weights and inputs."""
    module = copy.deepcopy(workload.module)
    for name in names:
        layer = module.get_submodule(name)
        with torch.no_grad():
            weight = matrix(layer)
            scales = weight.abs().amax(dim=1, keepdim=True).float() / 127
            weight.copy_((weight / scales).round() * scales)
        step, zero = grid(plan.activations[name])

        def hook(_: Any, args: Any, step: float = step, zero: int = zero) -> Any:
            return ((args[0] / step).round().add(zero).clamp(0, 255).sub(zero) * step,)

        layer.register_forward_pre_hook(hook)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in workload.data.calibration.batches(1):
            wanted, found = workload.forward(row.inputs), workload.with_module(module, None, None).forward(row.inputs)
            p, q = wanted.log_softmax(-1), found.log_softmax(-1)
            total += float((p.exp() * (p - q)).sum(-1).mean())
            count += 1
    return total / count


def _plan(workload: Any) -> QuantizationPlan:
    return int8.quantize(workload, observer="minmax", smooth="none", correct_bias=False)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_each_operator_alone_and_all_but_it(name: str, with_rows: Callable[..., Any]) -> None:
    workload = with_rows(name)
    plan = _plan(workload)
    found = sensitivity.measure(workload, plan)
    assert found.alone.keys() == found.without.keys() == plan.weights.keys()
    every = list(plan.weights)
    assert found.whole == pytest.approx(_distance_by_hand(workload, plan, every), rel=1e-3)
    for layer in every[::3]:
        assert found.alone[layer] == pytest.approx(_distance_by_hand(workload, plan, [layer]), rel=1e-3)
        others = [other for other in every if other != layer]
        assert found.without[layer] == pytest.approx(_distance_by_hand(workload, plan, others), rel=1e-3)


def test_an_outlying_operator_is_the_first_to_stay(with_rows: Callable[..., Any]) -> None:
    workload = with_rows("vit")
    plan = _plan(workload)
    bad = list(plan.weights)[4]
    low, high = plan.activations[bad]
    spoilt = QuantizationPlan("int8", plan.weights, {**plan.activations, bad: (low / 20, high / 20)})
    found = sensitivity.measure(workload, spoilt)
    assert found.order()[0] == bad


def test_what_is_dear_in_time_is_left_in_float_later() -> None:
    found = sensitivity.Sensitivity(1.0, {"a": 0.5, "b": 0.4, "c": 0.1}, {"a": 0.5, "b": 0.6, "c": 0.9})
    assert found.order() == ["a", "b", "c"]
    assert found.order({"a": 10.0, "b": 1.0, "c": 1.0}) == ["b", "c", "a"]


@pytest.mark.parametrize("least", range(1, 12))
def test_the_fewest_is_found_and_most_is_not_tried(least: int) -> None:
    tried: list[int] = []

    def inside(count: int) -> bool:
        tried.append(count)
        return count >= least

    assert sensitivity.fewest(11, inside) == least
    assert 11 not in tried
    assert len(tried) == len(set(tried)) <= 2 * least.bit_length() + 1


def test_biases_are_corrected_for_what_is_rounded_alone(with_rows: Callable[..., Any]) -> None:
    """With nothing in float it is the plan of the scheme; an operator in float has its own bias."""
    workload = with_rows("vit")
    plan, whole = sensitivity.uncorrected(workload, "int8"), int8.quantize(workload)
    found = sensitivity.corrected(workload, plan)
    assert found == whole
    assert found.state.keys() == whole.state.keys()
    assert all(torch.equal(found.state[name], whole.state[name]) for name in whole.state)
    first = next(name for name in plan.weights if f"{name}.bias" in found.state)
    mixed = sensitivity.corrected(workload, plan, [first])
    assert first not in mixed.weights
    assert mixed.state.get(f"{first}.bias") is plan.state.get(f"{first}.bias")


def test_what_cannot_be_tried_is_refused(with_rows: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="'int4' costs operator by operator is not known"):
        sensitivity.uncorrected(with_rows("vit"), "int4")
