"""Low-rank adapters: large models recover by training a few weights, which are merged into the others at the end.

The weight W [out, in] of every linear layer is frozen and used as W + B A, with A [rank, in] and B [out, rank] alone
trained: gradients and the optimizer's state are those of A and B (Hu et al. 2021, arXiv 2106.09685). The sum is formed
in every pass, so that the merged weight is the trained one to the last bit, at the price of a second copy of the
weights during a step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from ...errors import UsageError
from ...models.layers import tied


class LowRank(nn.Module):
    """Adds B A to a weight [rows, columns]. A is drawn, B is zero: at first nothing changes."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        drawn = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
        self.a = nn.Parameter(drawn.to(weight))
        self.b = nn.Parameter(weight.new_zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def adapt(module: nn.Module, rank: int, *, seed: int = 0) -> list[nn.Parameter]:
    """Give every linear layer in ``module`` that is larger than ``rank`` both ways an adapter; returns what is trained.

    Layers whose weight is an embedding's too stay as they are. Raises UsageError where no layer gets one.
    """
    shared = {id(module.get_parameter(name)) for name in tied(module)}
    generator = torch.Generator().manual_seed(seed)
    module.requires_grad_(False)
    trained: list[nn.Parameter] = []
    for layer in _linear(module):
        weight = layer.weight
        if min(weight.shape) <= rank or id(weight) in shared:
            continue
        adapter = LowRank(weight.detach(), rank, generator)
        parametrize.register_parametrization(layer, "weight", adapter)
        trained += [adapter.a, adapter.b]
    if not trained:
        raise UsageError(f"No linear layer is larger than the adapters' rank {rank}.")
    return trained


def merge(module: nn.Module) -> None:
    """Make the adapters of :func:`adapt` part of the weights."""
    for layer in _linear(module):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def _linear(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, (nn.Linear, Conv1D))]
