"""Zeros that keep shapes: least change for what goes, and still there after saving, reloading and exporting."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import onnx
import pytest
import torch
from edgepress.compress.prune.inputs import linear_layers, moments
from edgepress.compress.prune.sparsity import METHODS, Pattern, follows, obs, sparsify, zeros
from edgepress.errors import UsageError
from edgepress.models import checkpoint, low_rank, surgery
from edgepress.models.layers import matrix
from edgepress.plan import PruningPlan, Unit
from onnx import numpy_helper


def _problem(seed: int, rows: int = 5, columns: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random, dtype=torch.float64)
    x = torch.randn(40, columns, generator=random, dtype=torch.float64)
    x = x @ torch.randn(columns, columns, generator=random, dtype=torch.float64)
    return weight, x.T @ x / len(x)


def _change(difference: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    return torch.stack([row @ moment @ row for row in difference])


def _solved(row: torch.Tensor, moment: torch.Tensor, kept: tuple[int, ...]) -> torch.Tensor:
    """The row with weights at ``kept`` alone that changes the output least."""
    found, own = torch.zeros_like(row), list(kept)
    found[own] = torch.linalg.solve(moment[own][:, own], moment[own] @ row)
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("sparsity", ["2:4", "1:4", "0.5"])
def test_obs_lies_between_plain_zeros_and_brute_force(seed: int, sparsity: str) -> None:
    weight, moment = _problem(seed)
    pattern = Pattern.parse(sparsity)
    found = obs(weight, moment, pattern)
    kept = found != 0
    assert float((~kept).double().mean()) == pytest.approx(float(pattern.zeros))
    ours = _change(weight - found, moment)
    assert bool((ours <= _change(torch.where(kept, 0.0, weight), moment) + 1e-12).all())
    for row in range(len(weight)):
        best = _solved(weight[row], moment, tuple(kept[row].nonzero().flatten().tolist()))
        assert float(ours[row]) >= float(_change((weight[row] - best)[None], moment)) - 1e-9
    if sparsity == "0.5":
        return
    size = int((1 - pattern.zeros) * 4)
    halves = [(*a, *(i + 4 for i in b)) for a in combinations(range(4), size) for b in combinations(range(4), size)]
    for row, change in zip(weight, ours, strict=True):
        least = min(float(_change((row - _solved(row, moment, own))[None], moment)) for own in halves)
        assert float(change) >= least - 1e-9


def test_one_zero_in_the_first_column_is_the_exact_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other column can still make up for it, so that brute force finds nothing better."""
    from edgepress.compress.prune import sparsity

    monkeypatch.setattr(sparsity, "RIDGE", 0.0)
    weight, moment = _problem(3, rows=1)
    weight[0, 0] = 1e-3
    found = obs(weight, moment, Pattern(Fraction(1, 8)))
    assert (found == 0).nonzero().tolist() == [[0, 0]]
    torch.testing.assert_close(found[0], _solved(weight[0], moment, tuple(range(1, 8))))


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgepress.compress.prune import sparsity

    weight, moment = _problem(0, rows=6, columns=24)
    whole = obs(weight, moment, Pattern.parse("2:4"))
    monkeypatch.setattr(sparsity, "BLOCK", 8)
    torch.testing.assert_close(obs(weight, moment, Pattern.parse("2:4")), whole)


def test_what_knows_the_inputs_changes_the_outputs_less(workload: Any) -> None:
    seen = moments(workload, linear_layers(workload), rows=128)
    change = {}
    for method in METHODS:
        thin = sparsify(workload, "2:4", method=method)
        change[method] = sum(
            float(
                _change(
                    (matrix(workload.module.get_submodule(n)) - matrix(thin.module.get_submodule(n))).detach().double(),
                    seen[n].covariance(centred=True),
                ).sum()
            )
            for n in linear_layers(workload)
        )
    assert change["obs"] < change["wanda"] < change["magnitude"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", ["2:4", 0.5, "0.75"])
def test_as_many_zeros_as_asked_and_the_original_untouched(workload: Any, method: str, sparsity: str | float) -> None:
    thin = sparsify(workload, sparsity, method=method, rows=32)
    wanted = float(Pattern.parse(sparsity).zeros)
    assert all(share == pytest.approx(wanted, abs=0.01) for share in zeros(thin).values())
    assert all(share < 0.01 for share in zeros(workload).values())
    assert thin.params == workload.params
    if sparsity == "2:4":
        assert all(follows(matrix(thin.module.get_submodule(name)), "2:4") for name in linear_layers(thin))


def test_zeros_survive_saving_and_export(workload: Any, tmp_path: Path) -> None:
    pruned = surgery.prune(workload, PruningPlan.of([Unit("head", 0, 1), Unit("block", 2, 0)]))
    thin = sparsify(pruned, "2:4", rows=32)
    back = checkpoint.read(checkpoint.save(thin, tmp_path / "c"), workload.data)
    assert zeros(back) == zeros(thin)
    inputs = dict(next(workload.data.calibration.batches(8)).inputs)
    with torch.inference_mode():
        assert torch.equal(back.forward(inputs), thin.forward(inputs))
    written = ep.export(back, tmp_path / "fp32")
    integers = ep.export(back, tmp_path / "int8", ep.quantize(back, "int8-dynamic"))
    for artifact, operator in ((written, "MatMul"), (integers, "MatMulIntegerToFloat")):
        graph = onnx.load(artifact.model_file).graph
        held = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
        products = [node for node in graph.node if node.op_type == operator and node.input[1] in held]
        inside = [held[node.input[1]] for node in products if ".layer." in node.name or ".layer." in node.input[1]]
        assert len(inside) == len(linear_layers(back))
        assert all(follows(torch.from_numpy(np.ascontiguousarray(array.T)), "2:4") for array in inside)


def test_factors_and_transposed_layers_get_zeros_too(with_rows: Any) -> None:
    from edgepress.compress.prune.low_rank import factorise

    workload = with_rows("gpt2")
    name = "transformer.h.0.mlp.c_fc"
    assert follows(matrix(sparsify(workload, "2:4").module.get_submodule(name)), "2:4")
    small = sparsify(factorise(workload, {name: 8}), "2:4")
    assert low_rank.ranks(small.module) == {name: 8}
    assert follows(small.module.get_submodule(f"{name}.down").weight, "2:4")


def test_the_checker() -> None:
    assert follows(torch.tensor([[1.0, 0, 2, 0, 0, 0, 0, 3]]), "2:4")
    assert not follows(torch.tensor([[1.0, 1, 2, 0, 0, 0, 0, 3]]), "2:4")
    assert not follows(torch.zeros(2, 6), "2:4")


@pytest.mark.parametrize("text", ["half", "2:4:8", "4:4", "0:4", "5:4", "1", "0", "-0.5", "nan", "inf", "2:0", "-2:-4"])
def test_sparsities_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match="sparsity"):
        Pattern.parse(text)


def test_what_cannot_be_thinned_is_refused(workload: Any, with_rows: Any) -> None:
    with pytest.raises(UsageError, match="no method 'luck'"):
        sparsify(workload, 0.5, method="luck")
    with pytest.raises(UsageError, match="not a linear layer"):
        sparsify(workload, 0.5, names=["classifier"])
    odd = surgery.prune(workload, PruningPlan.of([Unit("ffn", 0, 0)]))
    with pytest.raises(UsageError, match="127 inputs"):
        sparsify(odd, "2:4", names=["bert.encoder.layer.0.output.dense"])
    assert zeros(sparsify(odd, "2:4", rows=16))["bert.encoder.layer.0.output.dense"] < 0.01
