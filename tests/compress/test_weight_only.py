"""Weights in few bits: each way of rounding against a slow definition, and never worse than rounding to nearest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import edgepress as ep
import pytest
import torch
from edgepress.compress.prune.inputs import moments as one_pass
from edgepress.compress.quantize import awq, blocks, int4, int8_weight
from edgepress.compress.quantize.fold import Input, inputs
from edgepress.compress.quantize.gptq import gptq
from edgepress.compress.quantize.hqq import hqq
from edgepress.compress.quantize.sequential import calibrated
from edgepress.compress.score.readers import Moments
from edgepress.errors import UsageError
from edgepress.models.data import Data
from edgepress.models.dequantize import dequantized
from edgepress.models.layers import matrix
from edgepress.plan import Codes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

FORMS = [(4, 16, False), (4, 32, True), (8, 16, False), (8, 16, True)]


def drawn(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] and the Gram matrix of correlated inputs, some far larger than others."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random, dtype=torch.float64)
    mixed = torch.randn(columns, columns, generator=random, dtype=torch.float64)
    x = torch.randn(4 * columns, columns, generator=random, dtype=torch.float64) @ mixed
    x = x * torch.randn(columns, generator=random, dtype=torch.float64).exp()
    return weight, x.T @ x / len(x)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from(FORMS), st.integers(0, 100))
def test_rounding_to_nearest_is_within_half_a_step(rows: int, columns: int, form: Any, seed: int) -> None:
    bits, block, symmetric = form
    weight, _ = drawn(rows, columns, seed)
    weight[:, 0] = 0
    found = blocks.to_nearest(weight, bits=bits, block=block, symmetric=symmetric)
    assert found.codes.shape == weight.shape
    assert found.scales.shape == found.zeros.shape == (rows, -(-columns // block))
    assert int(found.codes.max()) < 2**bits
    steps = found.scales.abs().repeat_interleave(block, 1)[:, :columns]
    # a symmetric grid has one point fewer on the side of the smaller magnitudes
    assert bool(((weight - found.weight()).abs() <= steps * (1.0001 if symmetric else 0.5001) + 1e-7).all())
    assert bool((found.weight()[weight == 0] == 0).all())
    for row in range(rows):
        for start in range(0, columns, block):
            part = weight[row : row + 1, start : start + block]
            alone = blocks.to_nearest(part, bits=bits, block=block, symmetric=symmetric)
            assert torch.equal(alone.codes, found.codes[row : row + 1, start : start + block])


def test_a_weight_of_zeros_and_blocks_that_have_no_kernel() -> None:
    for symmetric in (False, True):
        found = blocks.to_nearest(torch.zeros(2, 40), bits=4, block=32, symmetric=symmetric)
        assert torch.equal(found.weight(), torch.zeros(2, 40))
    for block in (0, 8, 48):
        with pytest.raises(UsageError, match=f"block of {block} "):
            blocks.check(block)


def one_by_one(weight: Tensor, gram: Tensor, order: list[int], form: Any, ridge: float, *, fixed: bool) -> Tensor:
    """Optimal brain quantization in a given order: after each column all that are left are solved for anew, from the
    inverse of the Gram matrix without the columns that are done."""
    bits, block, symmetric = form
    h = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    left, found = weight.clone(), torch.empty_like(weight)
    scales, zeros = blocks.grid(weight, bits=bits, block=block, symmetric=symmetric)
    todo = list(order)
    while todo:
        column = todo[0]
        part = column // block
        if not fixed and column % block == 0:
            now = blocks.grid(left[:, column : column + block], bits=bits, block=block, symmetric=symmetric)
            scales[:, part], zeros[:, part] = now[0][:, 0], now[1][:, 0]
        numbers = blocks.nearest(left[:, column], scales[:, part], zeros[:, part], bits=bits)
        found[:, column] = scales[:, part] * (numbers - zeros[:, part])
        inverse = torch.linalg.inv(h[todo][:, todo])
        move = (left[:, column] - found[:, column]) / inverse[0, 0]
        left[:, todo] -= torch.outer(move, inverse[0])
        todo = todo[1:]
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("columns", [40, 150])
def test_gptq_is_what_solving_after_every_column_gives(form: Any, act_order: bool, columns: int) -> None:
    bits, block, symmetric = form
    weight, gram = drawn(6, columns)
    order = gram.diagonal().argsort(descending=True).tolist() if act_order else list(range(columns))
    slow = one_by_one(weight, gram, order, form, 1e-2, fixed=act_order)
    found = gptq(weight, gram, bits=bits, block=block, symmetric=symmetric, act_order=act_order)
    plain = blocks.to_nearest(weight, bits=bits, block=block, symmetric=symmetric).weight().double()

    def error(other: Tensor) -> Tensor:
        return (((weight - other) @ gram) * (weight - other)).sum(dim=1)

    kept = torch.where((error(slow) <= error(plain))[:, None], slow, plain)
    torch.testing.assert_close(found.weight().double(), kept, rtol=1e-5, atol=1e-6)
    assert float(error(slow).sum()) < 0.8 * float(error(plain).sum())  # so the comparison is with what solving gives


def test_gptq_with_inputs_of_few_directions() -> None:
    weight, _ = drawn(4, 32)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 5] = 0
    gram = x.T @ x / 3
    found = gptq(weight, gram, block=16)
    plain = blocks.to_nearest(weight, bits=4, block=16, symmetric=False)
    assert float(blocks.error(weight, found, gram).sum()) < 0.5 * float(blocks.error(weight, plain, gram).sum())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 50), st.sampled_from(FORMS), st.booleans(), st.integers(0, 100))
def test_no_row_is_worse_than_rounded_to_nearest(
    rows: int, columns: int, form: Any, act_order: bool, seed: int
) -> None:
    bits, block, symmetric = form
    weight, gram = drawn(rows, columns, seed)
    plain = blocks.to_nearest(weight, bits=bits, block=block, symmetric=symmetric)
    found = gptq(weight, gram, bits=bits, block=block, symmetric=symmetric, act_order=act_order)
    before = blocks.error(weight, plain, gram)
    assert bool((blocks.error(weight, found, gram) <= before * (1 + 1e-9)).all())
    fitted = hqq(weight, bits=bits, block=block, symmetric=symmetric)

    def distance(codes: Codes) -> Tensor:
        return blocks.blocks((weight - codes.weight().double()).abs() ** 0.7, block).sum(dim=2)

    assert bool((distance(fitted) <= distance(plain) * (1 + 1e-5) + 1e-6).all())


def test_hqq_gains_a_good_part_of_what_a_search_of_all_grids_would() -> None:
    """The search is over 400 scales and all zero points, of blocks some of whose weights are outliers."""
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(torch.tensor(4.0)).sample((60, 32)).double()
    span = (weight.amax(dim=1) - weight.amin(dim=1)) / 15
    best = torch.full((60,), torch.inf, dtype=torch.float64)
    for share in torch.linspace(0.4, 1.15, 400).tolist():
        scale = (span * share)[:, None]
        for zero in range(16):
            numbers = (weight / scale + zero).round().clamp(0, 15)
            best = torch.minimum(best, ((weight - scale * (numbers - zero)).abs() ** 0.7).sum(dim=1))
    plain, found = blocks.to_nearest(weight, bits=4, block=32, symmetric=False), hqq(weight)
    nearest, ours = (float(((weight - one.weight()).abs() ** 0.7).sum()) for one in (plain, found))
    assert float(best.sum()) <= ours < nearest - 0.4 * (nearest - float(best.sum()))


def test_awq_takes_the_best_exponent() -> None:
    weight, gram = drawn(8, 32)
    moments = Moments(1, torch.zeros(32), gram.diagonal(), gram)
    tensor = Input(("reader",), "maker", tuple(range(32)))
    found = awq.scales(tensor, [weight], moments, bits=4, block=16, symmetric=False)

    def error(scales: Tensor) -> float:
        rounded = blocks.to_nearest(weight * scales, bits=4, block=16, symmetric=False).weight().double() / scales
        return float((((weight - rounded) @ gram) * (weight - rounded)).sum())

    rms = gram.diagonal().sqrt()
    tried = [rms ** (step / 20) for step in range(21)]
    errors = [error(one / (one.max() * one.min()).sqrt()) for one in tried]
    assert error(found) == pytest.approx(min(errors), rel=1e-6)
    assert error(found) < 0.9 * error(torch.ones(32, dtype=torch.float64))


def test_layers_are_calibrated_on_what_quantized_ones_hand_them(with_rows: Any) -> None:
    """Each layer's Gram matrix, seen in one pass that starts from the tokens, once those before it are quantized."""
    workload = with_rows("llama")
    names = int4.choice.products(workload)
    seen = []
    for tensor, moments in calibrated(workload, inputs(workload, names), rows=10):
        wanted = one_pass(workload, [tensor.layers[0]], rows=10)[tensor.layers[0]]
        assert moments.count == wanted.count
        assert wanted.gram is not None
        assert moments.gram is not None
        torch.testing.assert_close(moments.gram, wanted.gram)
        seen += tensor.layers
        for name in tensor.layers:
            with torch.no_grad():
                matrix(workload.module.get_submodule(name)).mul_(1.5)
    assert sorted(seen) == sorted(names)


@pytest.mark.parametrize("method", int4.METHODS)
def test_every_model_and_way_of_rounding(any_model: str, method: str, with_rows: Any, monkeypatch: Any) -> None:
    """Rounded to 8 bits in each way, so that little is lost even by weights drawn at random: what is folded, and the
    codes of what is, must compute the same function."""
    monkeypatch.setattr(int4, "BITS", 8)
    torch.manual_seed(0)
    workload = with_rows(any_model)
    before = {name: tensor.clone() for name, tensor in workload.module.state_dict().items()}
    plan = int4.quantize(workload, method=method, block=16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in workload.module.state_dict().items())
    assert set(plan.weights) == set(plan.codes) >= set(int4.choice.products(workload))
    changed = dequantized(workload, plan)
    batch = next(workload.data.calibration.batches(10))
    with torch.no_grad():
        wanted, found = workload.forward(batch.inputs), changed.forward(batch.inputs)
    limit = 0.25 if any_model.startswith("t5") else 0.12  # whose attention is not scaled, so that its softmax is steep
    assert float((found - wanted).norm()) < limit * float(wanted.norm())


def test_eight_bits_lose_next_to_nothing(with_rows: Any, output_error: Any) -> None:
    workload = with_rows("llama")
    errors = {}
    for name, plan in (("8", int8_weight.quantize(workload, block=16)), ("4", int4.quantize(workload, block=16))):
        errors[name] = output_error(workload, dequantized(workload, plan))
    assert errors["8"] < 0.02 * errors["4"]


def test_scales_that_are_folded_leave_the_function_as_it_is(with_rows: Any) -> None:
    workload = with_rows("llama")
    batch = next(workload.data.calibration.batches(10))
    tensors = inputs(workload, int4.choice.products(workload))
    form = {"bits": 4, "block": 16, "symmetric": False}
    with torch.no_grad():
        wanted = workload.forward(batch.inputs)
        before = {name: tensor.clone() for name, tensor in workload.module.state_dict().items()}
        for tensor, moments in calibrated(workload, tensors, rows=10):
            assert tensor.maker
            int4._scale(workload, tensor, moments, {}, form)
        torch.testing.assert_close(workload.forward(batch.inputs), wanted, rtol=1e-9, atol=1e-9)
    changed = [name for name, tensor in workload.module.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) > len(tensors)


def test_a_tied_table_is_in_eight_bits_with_its_head_or_not_at_all() -> None:
    workload = ep.load("zoo:llama-stdlib")
    assert "model.embed_tokens" not in int8_weight.quantize(workload).weights
    plan = int8_weight.quantize(workload, head=True)
    assert plan.weights["model.embed_tokens"] == plan.weights["lm_head"] == "int8"
    assert torch.equal(plan.codes["model.embed_tokens"].codes, plan.codes["lm_head"].codes)


def test_wrong_options(with_rows: Any) -> None:
    workload = with_rows("llama")
    workload = replace(workload, data=Data.empty())
    for options, message in (
        ({"method": "best"}, "no way 'best'"),
        ({"block": 24}, "block of 24"),
        ({}, "give --data"),
    ):
        with pytest.raises(UsageError, match=message):
            int4.quantize(workload, **options)
    assert int4.quantize(workload, method="hqq").codes
