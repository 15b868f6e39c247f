"""The static INT8 plan: what is in it, and what its parts bring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from edgepress.compress import quantize as quantizers
from edgepress.compress.quantize import choice, int8, int8_dynamic
from edgepress.compress.quantize.calibrate import OBSERVERS
from edgepress.compress.quantize.sensitivity import Trials
from edgepress.errors import UsageError
from edgepress.models.data import Data


def test_every_model_has_a_plan_that_computes(any_model: str, with_rows: Callable[..., Any]) -> None:
    workload = with_rows(any_model)
    before = {name: tensor.clone() for name, tensor in workload.module.state_dict().items()}
    plan = int8.quantize(workload)
    after = workload.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert plan.scheme == "int8"
    assert plan.weights.keys() == int8_dynamic.quantize(workload).weights.keys()
    assert plan.activations.keys() == set(choice.products(workload))
    assert all(low <= 0 <= high and low < high for low, high in plan.activations.values())
    assert plan.state.keys() <= before.keys()
    assert all(plan.state[name].shape == before[name].shape for name in plan.state)
    assert plan.smooth.keys() <= plan.activations.keys()
    assert all(bool((scales > 0).all()) for scales in plan.smooth.values())
    distance = Trials(workload, rows=10, seed=0).distance(plan, list(plan.weights))
    assert 0 < distance < 0.1


@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_makes_a_plan_inside_the_widest_ranges(observer: str, with_rows: Callable[..., Any]) -> None:
    workload = with_rows("bert")
    plan = int8.quantize(workload, observer=observer, smooth="none")
    widest = int8.quantize(workload, observer="minmax", smooth="none").activations
    for name, (low, high) in plan.activations.items():
        assert widest[name][0] <= low <= 0 <= high <= widest[name][1]
    assert (plan.activations == widest) or observer in {"mse", "entropy", "percentile"}
    assert (plan.activations != widest) or observer in {"minmax", "percentile"}
    distance = Trials(workload, rows=10, seed=0).distance(plan, list(plan.weights))
    assert 0 < distance < 0.1


def test_equal_calls_give_equal_plans(with_rows: Callable[..., Any]) -> None:
    workload = with_rows("llama")
    one, other = (int8.quantize(workload, rows=6, seed=3) for _ in range(2))
    assert one == other
    for parts in ("state", "smooth"):
        mine, others = getattr(one, parts), getattr(other, parts)
        assert mine.keys() == others.keys()
        assert all(torch.equal(mine[name], others[name]) for name in mine)


def test_a_seed_draws_rows_where_a_scheme_takes_any(with_rows: Callable[..., Any]) -> None:
    workload = with_rows("llama")
    assert quantizers.quantize(workload, "int8", rows=3, seed=3) == int8.quantize(workload, rows=3, seed=3)
    drawn = [quantizers.quantize(workload, "fp8", rows=3, seed=seed).activations for seed in (0, 3)]
    assert drawn[0] != drawn[1]
    assert quantizers.quantize(workload, "int8-dynamic", seed=3) == int8_dynamic.quantize(workload)


def test_kept_layers_stay_in_float_and_the_function_is_kept(with_rows: Callable[..., Any]) -> None:
    workload = with_rows("vit")
    keep = [name for name in choice.products(workload) if name.endswith(("q_proj", "fc2"))]
    plan = int8.quantize(workload, keep=keep, correct_bias=False)
    assert plan.weights.keys() == set(choice.products(workload)) - set(keep)
    assert not plan.smooth.keys() & set(keep)
    # the norm is folded all the same, and the layer in float reads it with its weight multiplied
    assert any(name.endswith("q_proj.weight") for name in plan.state)
    assert Trials(workload, rows=10, seed=0).distance(plan, []) < 1e-14


def test_outlying_channels_are_smoothed_away(with_rows: Callable[..., Any]) -> None:
    workload = with_rows("vit")
    for name, child in workload.module.named_modules():
        if name.endswith(("layernorm_before", "layernorm_after")):
            with torch.no_grad():
                child.weight[3] *= 60
    trials = Trials(workload, rows=10, seed=0)

    def distance(smooth: str) -> float:
        plan = int8.quantize(workload, smooth=smooth, correct_bias=False)
        return trials.distance(plan, list(plan.weights))

    assert distance("folded") < 0.5 * distance("none")
    assert not int8.quantize(workload, smooth="folded").smooth


def test_words_names_and_models_that_do_not_fit_are_refused(with_rows: Callable[..., Any]) -> None:
    workload = with_rows("bert")
    with pytest.raises(UsageError, match="no observer 'max'"):
        quantizers.quantize(workload, "int8", observer="max")
    with pytest.raises(UsageError, match="no smoothing 'some'"):
        int8.quantize(workload, smooth="some")
    with pytest.raises(UsageError, match="'classifier' is to stay in float"):
        int8.quantize(workload, keep=("classifier",))
    with pytest.raises(UsageError, match="no linear layer that int8"):
        int8.quantize(workload, keep=choice.products(workload))
    with pytest.raises(UsageError, match="--data"):
        int8.quantize(replace(workload, data=Data.empty()))
