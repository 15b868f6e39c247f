"""The output layer's solution, against solving by hand, and what it is left alone for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from edgepress.compress.prune import output_layer
from edgepress.compress.prune.allocate import by_ratio
from edgepress.compress.prune.replay import Replay
from edgepress.models import surgery
from edgepress.models.data import Data
from edgepress.plan import PruningPlan
from torch import Tensor, nn

ROWS = 60


def _halved(workload: Any) -> Any:
    values = torch.rand(workload.structure.num_units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return surgery.prune(workload, by_ratio(workload.structure, values, 0.5))


def _of_tokens(workload: Any) -> Any:
    """``workload``, a classifier of texts, with an answer for each token."""

    def answer(self: Any, **inputs: Tensor) -> Tensor:
        return self.classifier(self.bert(**inputs).last_hidden_state)  # type: ignore[no-any-return]

    workload.module.forward = MethodType(answer, workload.module)
    return workload


def _replays(original: Any, pruned: Any) -> tuple[Replay, Replay]:
    batches = list(original.data.calibration.batches(7))
    return Replay(original, batches), Replay(pruned, batches)


def _seen(workload: Any, path: str) -> tuple[Tensor, Tensor, Tensor]:
    """What the layer reads and the answers at every position that is not padding, and the row of each."""
    read: list[Tensor] = []
    features, answers, rows = [], [], []
    handle = workload.module.get_submodule(path).register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        for batch in workload.data.calibration.batches(7):
            answer, mask = workload.forward(batch.inputs), batch.inputs.get("attention_mask")
            real = torch.ones(answer.shape[:-1], dtype=torch.bool)
            if mask is not None and answer.dim() == 3:
                real = mask.bool()
            features.append(read[-1][real])
            answers.append(answer[real])
            rows.append(torch.from_numpy(batch.rows).reshape(-1, *[1] * (real.dim() - 1)).expand(real.shape)[real])
    handle.remove()
    return torch.cat(features), torch.cat(answers), torch.cat(rows)


def _by_hand(z: Tensor, e: Tensor, weight: float, *, bias: bool) -> tuple[Tensor, Tensor]:
    """D and d by least squares over rows of z and e, with λ as further rows, by numpy."""
    means = (z.mean(0), e.mean(0)) if bias else (z.new_zeros(z.shape[1]), e.new_zeros(e.shape[1]))
    left = np.concatenate([(z - means[0]).numpy(), np.sqrt(weight) * np.eye(z.shape[1])])
    right = np.concatenate([(e - means[1]).numpy(), np.zeros((z.shape[1], e.shape[1]))])
    added = torch.from_numpy(np.linalg.lstsq(left, right, rcond=None)[0].T)
    return added, means[1] - added @ means[0]


@pytest.mark.parametrize("name", ["vit", "cnn", "deberta-v2", "tokens"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_solution_is_that_of_the_strength_which_predicts_rows_best(
    name: str, bias: bool, with_rows: Callable[..., Any]
) -> None:
    workload = _of_tokens(with_rows("bert", ROWS)) if name == "tokens" else with_rows(name, ROWS)
    path = output_layer.output_layer(workload)
    assert path
    if not bias:
        workload.module.get_submodule(path).bias = None
    pruned = _halved(workload)
    layer = pruned.module.get_submodule(path)
    z, found, rows = _seen(pruned, path)
    e = _seen(workload, path)[1] - found
    errors = []
    for strength in output_layer.STRENGTHS:
        error = 0.0
        for fold in range(output_layer.FOLDS):
            inside = rows % output_layer.FOLDS == fold
            others = z[~inside] - z[~inside].mean(0) if bias else z[~inside]
            weight = strength * float(torch.linalg.matrix_norm(others, 2)) ** 2
            added, offset = _by_hand(z[~inside], e[~inside], weight, bias=bias)
            error += float((e[inside] - z[inside] @ added.T - offset).square().sum())
        errors.append(error)
    best = int(np.argmin(errors))
    assert errors[best] < float(e.square().sum())
    largest = float(torch.linalg.matrix_norm(z - z.mean(0) if bias else z, 2)) ** 2
    added, offset = _by_hand(z, e, output_layer.STRENGTHS[best] * largest, bias=bias)
    wanted = layer.weight.detach() + added
    at = layer.bias.detach() + offset if bias else None
    with torch.no_grad():
        output_layer.solve(*_replays(workload, pruned), path)
    assert torch.allclose(layer.weight, wanted, rtol=1e-6, atol=1e-8)
    assert at is None or torch.allclose(layer.bias, at, rtol=1e-6, atol=1e-8)


def test_noise_is_not_fitted(with_rows: Callable[..., Any]) -> None:
    """Where what is missing has nothing to do with the features, the layer stays nearly as it is, however few rows."""
    workload = with_rows("wide", ROWS)
    path = output_layer.output_layer(workload)
    assert path
    original, pruned = surgery.prune(workload, PruningPlan()), surgery.prune(workload, PruningPlan())
    noise = torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    then, now = _replays(original, pruned)

    def answer(inputs: Any) -> Tensor:
        batch = next(one for one in then.batches if one.inputs is inputs)
        return workload.forward(inputs) + noise[torch.from_numpy(batch.rows)]

    object.__setattr__(original, "forward", answer)
    before = pruned.module.get_submodule(path).weight.detach().clone()
    with torch.no_grad():
        output_layer.solve(then, now, path)
    change = pruned.module.get_submodule(path).weight.detach() - before
    z, _, _ = _seen(workload, path)
    z = z - z.mean(0)
    fitted = (z @ torch.from_numpy(np.linalg.lstsq(z.numpy(), noise.numpy(), rcond=None)[0])).square().sum()
    assert float((z @ change.T).square().sum()) < 0.2 * float(fitted)


def test_only_a_layer_of_its_own_whose_output_is_the_answer_is_solved(with_rows: Callable[..., Any]) -> None:
    found = {name: output_layer.output_layer(with_rows(name)) for name in ("vit", "cnn", "gpt2", "t5", "bert", "llama")}
    assert found["vit"] == "classifier"
    assert found["cnn"] == "4"
    assert found["bert"] == "classifier"
    assert not any(found[name] for name in ("gpt2", "t5", "llama"))


def test_a_weight_that_another_module_has_too_is_left(with_rows: Callable[..., Any]) -> None:
    workload = with_rows("wide")
    assert output_layer.output_layer(workload) == "4"
    twin = nn.Linear(40, 2)
    twin.weight = workload.module[4].weight
    workload.module.append(nn.Identity())
    workload.module[5].add_module("twin", twin)
    assert output_layer.output_layer(workload) is None


def test_sums_that_take_too_much_room_are_not_made(
    with_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = with_rows("wide")
    sums = output_layer.FOLDS * (40 + 2) * 40
    for most, found in ((sums, "4"), (sums - 1, None)):
        monkeypatch.setattr(output_layer, "MOST", most)
        assert output_layer.output_layer(workload) == found


@pytest.mark.parametrize("rows", [1, output_layer.FOLDS - 1])
def test_with_fewer_rows_than_folds_nothing_changes(rows: int, with_rows: Callable[..., Any]) -> None:
    workload = with_rows("vit", ROWS)
    few = workload.data.calibration.take(rows)
    workload = replace(workload, data=Data(few, few, few))
    pruned = _halved(workload)
    path = output_layer.output_layer(pruned)
    assert path
    before = pruned.module.get_submodule(path).weight.detach().clone()
    with torch.no_grad():
        output_layer.solve(*_replays(workload, pruned), path)
    assert torch.equal(pruned.module.get_submodule(path).weight, before)
