"""Folding and smoothing: the function stays what it was; the strength is that of a slow search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from edgepress.compress.quantize.choice import products
from edgepress.compress.quantize.fake import holding
from edgepress.compress.quantize.fold import fold, inputs
from edgepress.compress.quantize.smoothquant import Sample, output_error, smoothed
from edgepress.models.layers import GroupedLinear
from edgepress.models.surgery import prune
from edgepress.plan import PruningPlan, Unit
from torch import Tensor, nn


def _answers(workload: Any) -> Tensor:
    with torch.no_grad():
        return torch.cat([workload.forward(b.inputs).flatten() for b in workload.data.calibration.batches(4)])


def _smoothed_by_hand(workload: Any, smooth: dict[str, Tensor], stack: ExitStack) -> None:
    """Within ``stack`` inputs are divided and weights multiplied, nothing rounded."""
    for name, scales in smooth.items():
        layer = workload.module.get_submodule(name)
        weight = layer.weight.detach() * (scales if isinstance(layer, nn.Linear) else scales[:, None])
        stack.enter_context(holding(workload.module, {f"{name}.weight": weight}))
        hook = layer.register_forward_pre_hook(lambda _, args, scales=scales: (args[0] / scales,))
        stack.callback(hook.remove)


def test_every_scale_that_is_folded_keeps_the_function(any_model: str, with_rows: Callable[..., Any]) -> None:
    workload = with_rows(any_model)
    random = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for tensor in inputs(workload, products(workload)):
        if tensor.maker:
            fold(workload, state, tensor, tensor.tied((2 * torch.randn(len(tensor.features), generator=random)).exp()))
    wanted = _answers(workload)
    with holding(workload.module, state):
        assert torch.allclose(_answers(workload), wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max()))


@pytest.mark.parametrize("at_run_time", [False, True])
def test_smoothing_keeps_the_function(any_model: str, at_run_time: bool, with_rows: Callable[..., Any]) -> None:
    workload = with_rows(any_model)
    wanted = _answers(workload)
    found = smoothed(workload, products(workload), at_run_time=at_run_time, observe="minmax", strengths=(0.3, 0.6))
    assert at_run_time or not found.smooth
    assert any(found.strengths.values()) == bool(found.state or found.smooth)
    with ExitStack() as stack:
        stack.enter_context(holding(workload.module, found.state))
        _smoothed_by_hand(workload, found.smooth, stack)
        assert torch.allclose(_answers(workload), wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max()))
    assert torch.equal(_answers(workload), wanted)


MAKERS = {
    "vit": ("layernorm_before", "layernorm_after", "attention.v_proj"),
    "dinov2": ("norm1", "norm2", "attention.v_proj"),
    "gpt2": ("ln_1", "ln_2", "attn.c_attn"),
    "llama": ("input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"),
    "qwen3": ("input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"),
    "gemma": ("self_attn.v_proj", "mlp.up_proj"),  # its norms' weights are kept less one
    "bert": ("self.value",),  # its norms feed the residual stream too
    "distilbert": ("v_lin",),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_makers_are_those_that_the_architecture_says(name: str, with_rows: Callable[..., Any]) -> None:
    workload = with_rows(name)
    found = inputs(workload, products(workload))
    assert sorted(layer for tensor in found for layer in tensor.layers) == sorted(products(workload))
    expected = MAKERS[name]
    blocks = workload.structure.num_layers
    ends = [next((end for end in expected if tensor.maker.endswith(end)), tensor.maker) for tensor in found]
    assert Counter(end for end in ends if end) == Counter(dict.fromkeys(expected, blocks))


def test_query_heads_of_one_group_share_their_scales(with_rows: Callable[..., Any]) -> None:
    workload = with_rows("llama")  # 6 query heads, 3 key/value heads of 8 features
    tensor = next(t for t in inputs(workload, products(workload)) if t.maker.endswith("v_proj"))
    heads = torch.tensor(tensor.features).reshape(3, 2, 8)
    assert torch.equal(heads[:, 0], heads[:, 1])
    assert torch.equal(heads[:, 0].flatten(), torch.arange(24))
    scales = torch.rand(48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tensor.tied(scales).reshape(3, 2, 8)[:, 0], scales.reshape(3, 2, 8).amax(dim=1))


def test_pruned_models_fold_too(with_rows: Callable[..., Any]) -> None:
    workload = with_rows("llama")
    pruned = prune(workload, PruningPlan.of([Unit("head", 0, 1), Unit("ffn", 1, 3), Unit("kv", 1, 0)]))
    assert any(isinstance(child, GroupedLinear) for child in pruned.module.modules())
    wanted = _answers(pruned)
    found = smoothed(pruned, products(pruned), observe="minmax", at_run_time=False)
    assert found.state
    with holding(pruned.module, found.state):
        assert torch.allclose(_answers(pruned), wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max()))


def _slow_error(x: Any, weights: list[Any], scales: Any, centred: bool) -> float:
    """Rounding one number after another; ranges from the least to the greatest value."""
    given = x / scales
    low, high = min(given.min(), 0), max(given.max(), 0)
    step = (high - low) / 255
    zero = round(-low / step)
    rounded = np.array([[(min(max(round(v / step) + zero, 0), 255) - zero) * step for v in row] for row in given])
    total = 0.0
    for weight in weights:
        stored = np.empty_like(weight)
        for row, values in enumerate(weight * scales):
            scale = np.abs(values).max() / 127
            stored[row] = [round(v / scale) * scale for v in values]
        error = rounded @ stored.T - x @ weight.T
        total += float(np.square(error - error.mean(axis=0) if centred else error).sum())
    return total / len(x)


class _Outlying(nn.Module):
    """Two layers that read the same tensor, two channels of which are large."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(channels, 6), nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], dim=-1)


def test_the_error_is_that_of_rounding_each_number(with_rows: Callable[..., Any]) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(40, 10, generator=random, dtype=torch.float64)
    x[:, 3] *= 30
    weights = [torch.randn(5, 10, generator=random, dtype=torch.float64) for _ in range(2)]
    for strength in (0.0, 0.4, 0.9):
        scales = x.abs().amax(0) ** strength
        for centred in (False, True):
            slow = _slow_error(x.numpy(), [w.numpy() for w in weights], scales.numpy(), centred)
            fast = output_error(x, weights, scales, centred=[centred] * 2, observe="minmax")
            assert fast == pytest.approx(slow, rel=1e-3)  # scales of weights are float32


def test_the_strength_is_the_best_of_a_slow_search(with_rows: Callable[..., Any]) -> None:
    workload = with_rows("wide", 64)
    first, second = (workload.module[place] for place in (0, 2))
    with torch.no_grad():
        first.weight[:4] *= 25
        first.bias.abs_()
    strengths = (0.2, 0.4, 0.6, 0.8)
    found = smoothed(workload, ["0", "2"], observe="minmax", strengths=strengths, rows=64)
    rows = torch.cat([b.inputs["input"] for b in workload.data.calibration.batches(64)])
    with torch.no_grad():
        x = nn.functional.gelu(first(rows)).numpy()
    weight = second.weight.detach().numpy()
    errors = {0.0: _slow_error(x, [weight], np.ones(40), True) * 0.9}  # it is not free: GELU lets no scale through
    for strength in strengths:
        scales = np.abs(x).max(0) ** strength / np.abs(weight).max(0) ** (1 - strength)
        errors[strength] = _slow_error(x, [weight], scales, True)
    assert found.strengths["2"] == min(errors, key=errors.__getitem__)
    assert found.strengths["2"] > 0
    assert errors[found.strengths["2"]] < 0.5 * errors[0.0]
    assert found.smooth["2"].log().mean() == pytest.approx(0, abs=1e-9)


def test_a_sample_holds_tokens_with_equal_chances_and_the_largest_of_all() -> None:
    tokens = torch.arange(30.0)[:, None].repeat(1, 2) * torch.tensor([1.0, -1.0])
    drawn = torch.zeros(30)
    for seed in range(600):
        sample = Sample(6, seed)
        for part in tokens.split(7):
            sample.add(part)
        assert len(sample.tokens) == 6
        assert torch.equal(sample.tokens[:, 0], -sample.tokens[:, 1])
        assert sample.largest.tolist() == [29, 29]
        drawn[sample.tokens[:, 0].long()] += 1
    assert drawn.sum() == 3600
    # 120 draws of each are expected, with a standard deviation of 10
    assert (drawn - 120).abs().max() < 45
