"""Networks without blocks: each layer's solution, against solving by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from edgepress.compress.prune import layerwise
from edgepress.compress.prune.allocate import by_ratio
from edgepress.compress.prune.reconstruct import reconstruct
from edgepress.compress.prune.replay import Replay
from edgepress.models import surgery
from edgepress.models.layers import matrix
from edgepress.models.structure import Cut, Site, Structure
from edgepress.plan import PruningPlan, Unit
from torch import Tensor, nn


def _halved(workload: Any) -> Any:
    values = torch.rand(workload.structure.num_units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return surgery.prune(workload, by_ratio(workload.structure, values, 0.5))


def _at(workload: Any, path: str) -> tuple[Tensor, Tensor]:
    """What a layer multiplies its matrix with, and what comes out, at every position: columns by torch's own unfold."""
    seen: list[Tensor] = []
    layer = workload.module.get_submodule(path)
    handle = layer.register_forward_hook(lambda _, args, output: seen.extend([args[0], output]))
    with torch.no_grad():
        for batch in workload.data.calibration.batches(len(workload.data.calibration)):
            workload.forward(batch.inputs)
    handle.remove()
    x, y = seen
    if isinstance(layer, nn.Conv2d):
        x = nn.functional.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).transpose(1, 2)
        y = y.flatten(2).transpose(1, 2)
    return x.flatten(0, -2), y.flatten(0, -2)


@pytest.mark.parametrize("name", ["cnn", "wide"])
def test_each_layer_is_the_least_squares_solution_towards_the_outputs_of_the_original(
    name: str, with_rows: Callable[..., Any]
) -> None:
    workload = with_rows(name, 40)
    pruned = _halved(workload)
    batches = list(workload.data.calibration.batches(7))
    order = layerwise.readers(pruned)
    assert len(order) > 1
    for path in order:
        layer = pruned.module.get_submodule(path)
        z, y = _at(pruned, path)[0], _at(workload, path)[1]
        # the outputs that are left are those of the rows of the original's matrix that the cut one still has
        here = matrix(layer).detach()
        left = layerwise._left(workload, pruned, path)
        assert len(left) == len(here)
        bias = layer.bias is not None
        x = np.concatenate([z.numpy(), np.ones((len(z), 1))], axis=1) if bias else z.numpy()
        held = np.concatenate([here, layer.bias.detach()[:, None]], axis=1) if bias else here.numpy()
        weight = 1e-2 * np.square(x).sum(axis=0).mean()
        wanted = np.linalg.lstsq(
            np.concatenate([x, np.sqrt(weight) * np.eye(x.shape[1])]),
            np.concatenate([y[:, left].numpy(), np.sqrt(weight) * held.T]),
            rcond=None,
        )[0].T
        with torch.no_grad():
            layerwise.solve(Replay(workload, batches), Replay(pruned, batches), path, 1e-2)
        found = torch.cat([matrix(layer), layer.bias[:, None]], dim=1) if bias else matrix(layer)
        assert np.allclose(found.detach().numpy(), wanted, rtol=1e-7, atol=1e-9)


def test_outputs_that_are_left_are_those_of_the_plan(with_rows: Callable[..., Any]) -> None:
    """Cut in two steps: numbers of the second are those of what the first has left."""
    workload = with_rows("wide")
    site = workload.structure.site("channel", 0)
    maker = next(cut.layer for cut in site.cuts if cut.side == "out")
    first = surgery.prune(workload, PruningPlan.of(Unit("channel", 0, index) for index in (0, 3)))
    second = surgery.prune(first, PruningPlan.of(Unit("channel", 0, index) for index in (0, 1, 5)))
    for original in (workload, first):
        whole, left = (matrix(one.module.get_submodule(maker)) for one in (original, second))
        assert torch.equal(whole[layerwise._left(original, second, maker)], left)
    assert layerwise._left(workload, second, maker).tolist()[:4] == [4, 5, 6, 8]


@pytest.mark.parametrize("name", ["cnn", "wide"])
def test_what_was_cut_is_mended(name: str, with_rows: Callable[..., Any], output_error: Any) -> None:
    workload = with_rows(name, 200)
    pruned = _halved(workload)
    assert output_error(workload, reconstruct(workload, pruned)) < 0.6 * output_error(workload, pruned)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.twice, self.out = nn.Linear(2, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the example's name for it
        return self.out(self.twice(self.twice(self.into(input).relu()).relu()).relu())


def test_layers_that_cannot_be_solved_are_left(with_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    workload = with_rows("wide")
    assert layerwise.readers(workload) == ["2", "4"]
    gates = (Cut("out", "in", 1), Cut("twice", "in", 1))
    structure = Structure("generic", (), (Site("channel", 0, 8, gates=gates),))
    assert layerwise.readers(replace(workload, module=Twice().double(), structure=structure)) == ["out"]
    monkeypatch.setattr(layerwise, "WIDEST", 39)
    assert layerwise.readers(workload) == []
    assert not layerwise._solvable(nn.Conv2d(4, 4, 3, groups=2))
    assert not layerwise._solvable(nn.ConvTranspose2d(4, 4, 3))
    assert layerwise._solvable(nn.Conv1d(4, 4, 3))
