"""Layers are solved from sums of what streams by."""

from __future__ import annotations

import pytest
import torch
from edgepress.compress.prune.ridge import Ridge
from edgepress.errors import InputError
from torch import Tensor, nn

STRENGTH = 1e-2


def _sums(layer: nn.Linear, inputs: Tensor, targets: Tensor) -> Ridge:
    sums = Ridge("block.out", layer.weight, layer.bias)
    for part, wanted in zip(inputs.split(7), targets.split(7), strict=True):
        sums.add(part, wanted)
    return sums


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_the_solution_is_that_of_least_squares_with_rows_for_the_ridge(bias: bool) -> None:
    torch.manual_seed(0)
    layer, x, y = nn.Linear(5, 3, bias=bias).double(), torch.randn(40, 5).double(), torch.randn(40, 3).double()
    held = torch.cat([layer.weight, layer.bias[:, None]], 1) if bias else layer.weight.clone()
    rows = torch.cat([x, torch.ones(40, 1)], 1) if bias else x
    strength = (STRENGTH * rows.square().sum(0).mean()).sqrt()
    tall = torch.cat([rows, strength * torch.eye(rows.shape[1])])
    wanted = torch.linalg.lstsq(tall, torch.cat([y, strength * held.T])).solution.T
    _sums(layer, x, y).solve_(STRENGTH)
    torch.testing.assert_close(torch.cat([layer.weight, layer.bias[:, None]], 1) if bias else layer.weight, wanted)


@torch.no_grad()
def test_inputs_that_are_zero_leave_the_weights_and_those_that_are_not_finite_are_told() -> None:
    layer = nn.Linear(5, 3, bias=False)
    before = layer.weight.clone()
    _sums(layer, torch.zeros(20, 5), torch.ones(20, 3)).solve_(STRENGTH)
    torch.testing.assert_close(layer.weight, before)
    with pytest.raises(InputError, match=r"'block\.out' is given NaN or infinite"):
        _sums(layer, torch.full((20, 5), torch.inf), torch.ones(20, 3)).solve_(STRENGTH)
