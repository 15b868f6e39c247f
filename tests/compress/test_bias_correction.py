"""Bias correction: means over tokens stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from edgepress.compress.prune.inputs import visit
from edgepress.compress.quantize import int8
from edgepress.compress.quantize.bias_correction import corrected
from edgepress.compress.quantize.fake import holding, quantized
from edgepress.plan import QuantizationPlan
from torch import Tensor

NAMES = ("bert", "vit", "gpt2", "whisper", "albert", "swin", "wide")


def _plan(workload: Any) -> QuantizationPlan:
    return int8.quantize(workload, observer="minmax", smooth="all", correct_bias=False)


def _has_bias(workload: Any, name: str) -> bool:
    return getattr(workload.module.get_submodule(name), "bias", None) is not None


def _outputs(workload: Any, plan: QuantizationPlan, name: str) -> tuple[Tensor, Tensor]:
    """The mean over tokens of what a layer makes of the original's inputs, as it is and quantized alone."""
    layer = workload.module.get_submodule(name)
    kept: list[Tensor] = []
    with holding(workload.module, {key: value for key, value in plan.state.items() if not key.endswith(".bias")}):
        visit(workload, [name], lambda _, x: kept.append(x), rows=100)
    x = torch.cat(kept)
    with torch.no_grad():
        bare = {key: value for key, value in plan.state.items() if key != f"{name}.bias"}
        with holding(workload.module, bare):
            plain = layer(x).mean(dim=0)
        with quantized(workload.module, plan, [name]):
            return plain, layer(x).mean(dim=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_of_what_each_layer_makes_of_the_same_inputs_stays(name: str, with_rows: Callable[..., Any]) -> None:
    workload = with_rows(name)
    plan = int8.quantize(workload, observer="minmax", smooth="none", correct_bias=False)
    biases = corrected(workload, plan)
    assert biases.keys() == {f"{layer}.bias" for layer in plan.activations if _has_bias(workload, layer)}
    moved = 0.0
    for layer in plan.activations:
        if _has_bias(workload, layer):
            plain, before = _outputs(workload, plan, layer)
            _, after = _outputs(workload, replace(plan, state={f"{layer}.bias": biases[f"{layer}.bias"]}), layer)
            assert torch.allclose(after, plain, rtol=1e-9, atol=1e-9)
            moved = max(moved, float((before - plain).abs().max()))
    assert moved > 1e-4


@pytest.mark.parametrize("name", ["bert", "vit", "gpt2"])
def test_propagated_the_mean_of_each_output_stays_in_the_quantized_model(
    name: str, with_rows: Callable[..., Any]
) -> None:
    workload = with_rows(name)
    plan = _plan(workload)
    biases = corrected(workload, plan, propagated=True)
    wanted, found = (_means_of_outputs(workload, plan, state) for state in (None, {**plan.state, **biases}))
    for layer, mean in wanted.items():
        assert torch.allclose(found[layer], mean, rtol=1e-9, atol=1e-9 * float(mean.abs().max()))
    once = _means_of_outputs(workload, plan, {**plan.state, **corrected(workload, plan)})
    assert max(float((once[layer] - mean).abs().max()) for layer, mean in wanted.items()) > 1e-5


def _means_of_outputs(workload: Any, plan: QuantizationPlan, state: Any) -> dict[str, Tensor]:
    """Of each layer with a bias, padding left out; of the original, with its folded scales, where ``state`` is None."""
    kept: dict[str, list[Tensor]] = {}
    layers = [name for name in plan.activations if _has_bias(workload, name)]
    context = (
        holding(workload.module, plan.state)
        if state is None
        else quantized(workload.module, replace(plan, state=state))
    )
    with context:

        def see(name: str, x: Tensor) -> None:  # what comes is rounded already
            layer = workload.module.get_submodule(name)
            kept.setdefault(name, []).append(type(layer).forward(layer, x))

        visit(workload, layers, see, rows=100)
    return {name: torch.cat(outputs).mean(dim=0) for name, outputs in kept.items()}


def test_clipping_of_single_tokens_does_not_move_the_others(with_rows: Callable[..., Any]) -> None:
    """What is clipped off is left out of the mean: the correction is that of inputs inside the range."""
    workload = with_rows("wide", 64)
    plan = int8.quantize(workload, observer="minmax", smooth="none", correct_bias=False)
    low, high = plan.activations["2"]
    narrow = replace(plan, activations={**plan.activations, "2": (low / 8, high / 8)})
    kept: list[Tensor] = []
    visit(workload, ["2"], lambda _, x: kept.append(x.clamp(low / 8, high / 8)), rows=64)
    layer = workload.module[2]
    with torch.no_grad():
        plain = layer(torch.cat(kept)).mean(dim=0)
        biases = corrected(workload, narrow)
        with quantized(workload.module, narrow, ["2"]), holding(workload.module, biases):
            assert torch.allclose(layer(torch.cat(kept)).mean(dim=0), plain, atol=1e-9)
