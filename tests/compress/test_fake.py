"""Fake quantization against integer arithmetic, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from edgepress.compress.quantize.choice import products, tables
from edgepress.compress.quantize.fake import LEVELS, Ranges, grid, learning, quantized, rounded_input
from edgepress.errors import UnavailableError
from edgepress.models.layers import matrix
from edgepress.plan import Codes, QuantizationPlan
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def _layer(kind: str) -> Any:
    torch.manual_seed(0)
    layer = nn.Linear(12, 7) if kind == "Linear" else Conv1D(7, 12)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    return nn.Sequential(layer)


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_a_layer_computes_what_integers_do(kind: str, smoothed: bool) -> None:
    module, x, span = _layer(kind), torch.randn(50, 12), (-0.9, 2.3)
    smooth = torch.rand(12) + 0.5 if smoothed else torch.ones(12)
    plan = QuantizationPlan("int8", {"0": "int8"}, {"0": span}, smooth={"0": smooth} if smoothed else {})
    with torch.no_grad(), quantized(module, plan):
        found = module(x)
    scale, zero = grid(span)
    assert 0 <= zero <= 255
    given = np.clip(np.rint((x / smooth).double().numpy() / scale) + zero, 0, 255).astype(np.int64)
    weight = (matrix(module[0]).detach() * smooth).double().numpy()
    scales = np.abs(weight).max(axis=1, keepdims=True) / 127
    codes = np.rint(weight / scales).astype(np.int64)
    assert np.abs(codes).max() == 127
    whole = (given - zero) @ codes.T
    expected = whole * scales[:, 0] * scale + module[0].bias.detach().double().numpy()
    assert np.allclose(found.numpy(), expected, atol=1e-4)


def test_recurrent_layers_are_refused() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    plan = QuantizationPlan("int8-dynamic", {"0": "int8", "1": "int8"})
    for entered in (quantized(module, plan), learning(module, plan)):
        with pytest.raises(UnavailableError, match=r"where a layer is recurrent, .*: '1'"), entered:
            pass
    with quantized(module, plan, ["0"]):
        module(torch.zeros(2, 3, 4))


def test_dynamic_schemes_round_to_the_range_of_what_comes() -> None:
    module = _layer("Linear")
    for x in (torch.randn(9, 12), torch.rand(9, 12) + 1):
        span = (min(float(x.min()), 0.0), float(x.max()))
        static = QuantizationPlan("int8", {"0": "int8"}, {"0": span})
        with torch.no_grad(), quantized(module, static):
            expected = module(x)
        with torch.no_grad(), quantized(module, QuantizationPlan("int8-dynamic", {"0": "int8"})):
            assert torch.equal(module(x), expected)


def test_codes_are_taken_as_they_are() -> None:
    module, x = _layer("Conv1D"), torch.randn(9, 12)
    random = torch.Generator().manual_seed(0)
    codes = Codes(
        4,
        5,
        torch.randint(0, 16, (7, 12), generator=random, dtype=torch.uint8),
        torch.rand(7, 3, generator=random),
        torch.randint(0, 16, (7, 3), generator=random, dtype=torch.uint8),
    )
    plan = QuantizationPlan("int4", {"0": "int4"}, codes={"0": codes})
    with torch.no_grad(), quantized(module, plan):
        assert torch.allclose(module(x), x @ codes.weight().T + module[0].bias, atol=1e-5)


def _everything(workload: Any) -> QuantizationPlan:
    weights = dict.fromkeys([*products(workload), *tables(workload)], "int8")
    return QuantizationPlan("int8", weights, dict.fromkeys(products(workload), (-1.0, 1.0)))


@pytest.mark.parametrize("changed", [quantized, learning])
def test_the_module_is_what_it_was_afterwards_even_after_an_error(
    changed: Callable[..., Any], with_rows: Callable[..., Any]
) -> None:
    workload = with_rows("gpt2")
    plan, module = _everything(workload), workload.module
    parameters = list(module.named_parameters(remove_duplicate=False))
    hooks = [(len(child._forward_pre_hooks), len(child._forward_hooks)) for child in module.modules()]
    with torch.no_grad():
        before = workload.forward(workload.example)
        with changed(module, plan):
            assert not torch.allclose(workload.forward(workload.example), before)
        with pytest.raises(RuntimeError), changed(module, plan):
            module(torch.zeros(1, 3, 5, 7))
        assert torch.equal(workload.forward(workload.example), before)
    after = list(module.named_parameters(remove_duplicate=False))
    assert [name for name, _ in after] == [name for name, _ in parameters]
    assert all(a is b for (_, a), (_, b) in zip(after, parameters, strict=True))
    assert [(len(child._forward_pre_hooks), len(child._forward_hooks)) for child in module.modules()] == hooks


def test_a_table_is_rounded_and_the_layer_tied_to_it_is_not() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Any:
            return self.table(ids), self.head(torch.eye(8)).T

    module, ids = Tied(), torch.arange(20)
    table = module.table.weight.detach().clone()
    with torch.no_grad(), quantized(module, QuantizationPlan("int8", {"table": "int8"})):
        looked_up, head = module(ids)
    scale = table.abs().amax(dim=1, keepdim=True) / 127
    assert torch.allclose(looked_up, (table / scale).round() * scale, atol=1e-6)
    assert torch.equal(head, table)


def test_gradients_pass_straight_through_and_steps_take_effect() -> None:
    module, x = _layer("Linear"), torch.randn(30, 12)
    plan = QuantizationPlan("int8", {"0": "int8"}, {"0": (-1.0, 1.0)})
    given = x.clone().requires_grad_()
    with learning(module, plan):
        out = module(given)
        out.sum().backward()
        step, zero = grid((-1.0, 1.0))
        code = (x / step).round() + zero
        assert torch.equal(given.grad != 0, (code >= 0) & (code <= LEVELS))
        rounded_x = (x / step).round().clamp(-128, 127) * step
        assert torch.allclose(module[0].weight.grad, rounded_x.sum(0).expand(7, 12), atol=step * 30)
        with torch.no_grad():
            module[0].weight.add_(1.0)
        assert not torch.allclose(module(x), out)


def test_a_learned_range_starts_as_the_plan_s_and_has_the_gradients_of_its_ends() -> None:
    """Inside by what rounding adds (LSQ+, equations 4 and 5), outside by the end that a value is clipped to."""
    span, x = (-0.7, 1.3), torch.randn(200, 3, dtype=torch.float64)
    ranges = Ranges(span, x)
    rounded_x = ranges(x)
    assert torch.allclose(rounded_x, rounded_input(x.float(), span).double(), atol=1e-5)
    scale, zero = grid(span)
    code = (x / scale).round() + zero
    weight = torch.randn_like(x)
    (rounded_x * weight).sum().backward()
    inside = (code >= 0) & (code <= LEVELS)
    by_scale = torch.where(inside, (code - zero) - x / scale, code.clamp(0, LEVELS) - zero)
    by_zero = -scale * (~inside).double()
    # z = -low / s, whose derivative by s is low / s²
    by_low = (by_scale + by_zero * span[0] / scale**2) * -1 / LEVELS + by_zero * -1 / scale
    by_high = (by_scale + by_zero * span[0] / scale**2) / LEVELS
    share = (x.numel() * LEVELS) ** -0.5
    expected = [float((one * weight).sum()) * end * share for one, end in zip((by_low, by_high), span, strict=True)]
    assert ranges.powers.grad is not None
    np.testing.assert_allclose(ranges.powers.grad, expected, rtol=1e-9)


def test_a_range_that_clips_too_much_learns_to_clip_less() -> None:
    x = torch.randn(500, 4)
    ranges = Ranges((-0.5, 0.5), x)
    optimizer = torch.optim.Adam(ranges.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (ranges(x) - x).square().mean().backward()
        optimizer.step()
    low, high = ranges.learned()
    assert low < -1.5
    assert high > 1.5
