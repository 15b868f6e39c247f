"""Rotations that weights hold: the matrices are orthogonal, and the function stays the same, whatever was pruned."""

from __future__ import annotations

from typing import Any

import edgepress as ep
import pytest
import torch
from edgepress.compress import quantize as quantizers
from edgepress.compress.quantize import rotate
from edgepress.errors import UnavailableError
from edgepress.models import surgery
from edgepress.models.dequantize import dequantized
from edgepress.models.layers import tied
from edgepress.plan import PruningPlan, QuantizationPlan, Unit
from hypothesis import given, settings
from hypothesis import strategies as st

STREAMS = {"vit", "deit", "mistral", "qwen2", "qwen3"}
"""Models whose stream can be turned as it is; those in ``TIED`` once their table and their output layer are two."""
TIED = {"llama", "gemma", "t5", "t5, gated"}


def of(state: Any) -> QuantizationPlan:
    return QuantizationPlan("fp32", state=state)


def answers(workload: Any) -> torch.Tensor:
    with torch.no_grad():
        return workload.forward(next(workload.data.calibration.batches(10)).inputs)


def difference(workload: Any, state: Any) -> float:
    wanted = answers(workload)
    return float((answers(dequantized(workload, of(state))) - wanted).abs().max() / wanted.abs().max())


@given(st.integers(1, 300), st.booleans(), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_matrices_are_orthogonal(size: int, fixes_ones: bool, seed: int) -> None:
    found = rotate.orthogonal(size, torch.Generator().manual_seed(seed), fixes_ones=fixes_ones)
    torch.testing.assert_close(found @ found.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    if fixes_ones:
        torch.testing.assert_close(found.sum(dim=1), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 12, 64, 128, 384, 576, 768, 896, 1536, 2560])
def test_the_usual_widths_have_a_hadamard_matrix(size: int) -> None:
    found = rotate.hadamard(size)
    assert found is not None
    assert bool((found.abs() == 1).all())
    torch.testing.assert_close(found @ found.T, size * torch.eye(size, dtype=torch.float64), rtol=0, atol=0)


def test_other_widths_have_none() -> None:
    assert rotate.hadamard(3) is None
    assert rotate.hadamard(97) is None


def test_every_model_computes_the_same(any_model: str, with_rows: Any) -> None:
    """Of values everywhere, and of the stream where norms alone read it: in float64 to round-off, on rows that the
    rotation has not seen, and with all entries of what it says that it changes really changed."""
    workload = with_rows(any_model)
    values = rotate.rotation(workload, stream=False)
    assert values.state
    assert not values.notes
    whole = rotate.rotation(workload)
    assert (len(whole.state) > len(values.state)) == (any_model in STREAMS)
    assert [("residual stream" in note) for note in whole.notes] == [True] * (any_model not in STREAMS)
    found = [values, whole]
    if any_model in TIED:
        assert "would be two" in whole.notes[0]
        found.append(rotate.rotation(workload, untie=True))
        assert not found[-1].notes
        assert tied(workload.module)
        assert len(tied(dequantized(workload, of(found[-1].state)).module)) < len(tied(workload.module))
    for one in found:
        assert difference(workload, one.state) < 1e-12
        own = workload.module.state_dict()
        assert not any(torch.equal(own[name], tensor) for name, tensor in one.state.items() if "norm" not in name)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "vit", "bert", "gpt2", "bart"])
@given(data=st.data())
@settings(max_examples=5, deadline=None)
def test_pruned_models_with_unequal_heads_compute_the_same(name: str, data: Any, with_rows: Any, plans: Any) -> None:
    workload = with_rows(name)
    pruned = surgery.prune(workload, data.draw(plans(workload.structure)))
    assert difference(pruned, rotate.rotation(pruned, untie=True).state) < 1e-12


def test_a_channel_that_is_far_larger_is_spread_out(with_rows: Any) -> None:
    """The largest number that a writer adds to one channel of the stream, in units of their root mean square."""
    workload = with_rows("mistral")
    layer = workload.module.model.layers[0].mlp.down_proj
    with torch.no_grad():
        layer.weight[5] *= 30

    def peak(weight: torch.Tensor) -> float:
        rows = weight.square().mean(dim=1).sqrt()
        return float((rows.max() / rows.square().mean().sqrt()).detach())

    after = rotate.rotation(workload).state["model.layers.0.mlp.down_proj.weight"]
    assert peak(layer.weight) > 6
    assert peak(after) < 1.5


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8", "int4", "int8-weight"])
def test_a_plan_holds_the_rotation(scheme: str, with_rows: Any) -> None:
    """A part of it that is missing would show: the answers are those of the module, but for what is rounded."""
    workload, said = with_rows("mistral"), []
    plain = quantizers.quantize(workload, scheme)
    plan = quantizers.quantize(workload, scheme, rotate=True, say=said.append)
    assert not said
    assert plan.weights == plain.weights
    assert plan.state.keys() > plain.state.keys()
    assert not {f"{name}.weight" for name in plan.codes} & plan.state.keys()
    wanted, found = answers(workload), answers(dequantized(workload, plan))
    assert float((found - wanted).norm() / wanted.norm()) < (0.5 if scheme == "int4" else 0.05)


def test_a_seed_draws_the_rotation(with_rows: Any) -> None:
    workload = with_rows("mistral")
    for seed in (0, 5):
        plan, turned = quantizers.quantize(workload, rotate=True, seed=seed), rotate.rotation(workload, seed=seed)
        assert plan.state.keys() == turned.state.keys()
        assert all(torch.equal(tensor, turned.state[name]) for name, tensor in plan.state.items())


def test_what_cannot_be_rotated_is_said(with_rows: Any) -> None:
    said: list[str] = []
    quantizers.quantize(with_rows("bert"), "int8-dynamic", rotate=True, say=said.append)
    (note,) = said
    assert "residual stream of bert" in note
    with pytest.raises(UnavailableError, match="no layer was found that makes what an attention mixes"):
        quantizers.quantize(with_rows("wide"), "int8-dynamic", rotate=True)


def test_the_zoo_s_decoder_in_float32() -> None:
    """Tied: values as it is, the stream with two tables; heads are unequal, and a block and a feed-forward are gone."""
    units = [Unit("head", 0, 0), Unit("kv", 1, 1), Unit("block", 2, 0), *(Unit("ffn", 3, i) for i in range(384))]
    workload = surgery.prune(ep.load("zoo:llama-stdlib"), PruningPlan.of(units))
    assert difference(workload, rotate.rotation(workload).state) < 1e-4
    both = rotate.rotation(workload, untie=True).state
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= both.keys()
    assert difference(workload, both) < 1e-4
