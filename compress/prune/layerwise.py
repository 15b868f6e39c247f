"""Layer by layer: without a residual stream each layer that reads pruned units is solved for its own outputs.

What    In a convolutional or other plain network the layers that read pruned units get, one after another, the weights
        that bring their outputs back to those of the original's layers, from what the layers before now give them.
When    Part of :mod:`.reconstruct`, for models without blocks.
Cost    For each layer a pass of both models that ends there, and its Gram matrix [columns, columns] in float64.
Source  Channel pruning, He et al. 2017 (arXiv 1707.06168, equation 5: inputs of the pruned model, outputs of the
        original), here with the bias and a ridge towards the weights as they are
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ...models import padding
from ...models.counts import CONVOLUTIONS
from ...models.layers import columns, matrix
from ...models.workload import Workload
from .inputs import ran
from .replay import Enough, Replay
from .ridge import Ridge

STRAIGHT = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WIDEST = 8192
"""Columns of a layer's matrix; with more its Gram matrix would take over 512 MB."""


def readers(workload: Workload) -> list[str]:
    """The paths of the linear layers and convolutions that read units, in the order in which they run.

    Without those that run more than once or are wider than ``WIDEST``, and without convolutions that do not sum over
    all of their channels.
    """
    found = {cut.layer for site in workload.structure.sites for cut in site.gates}
    solvable = [
        name
        for name, layer in workload.module.named_modules()
        if name in found and _solvable(layer) and matrix(layer).shape[1] <= WIDEST
    ]
    times = Counter(name for name, _ in ran(workload, solvable)[1])
    return [name for name, count in times.items() if count == 1]


def _solvable(layer: Any) -> bool:
    return type(layer) is nn.Linear or (type(layer) in STRAIGHT and layer.groups == 1)


def solve(original: Replay, pruned: Replay, path: str, ridge: float) -> None:
    """Replace the weights of the pruned model's layer ``path``; ``ridge`` is as :meth:`.Ridge.solution_` says."""
    layer: Any = pruned.workload.module.get_submodule(path)
    left = _left(original.workload, pruned.workload, path)
    sums = Ridge(path, matrix(layer), layer.bias)
    for batch in pruned.batches:
        _, wanted = _seen(original.workload, path, batch.inputs)
        inputs, _ = _seen(pruned.workload, path, batch.inputs)
        real = padding.real(batch.inputs, wanted, path)
        real = torch.ones(wanted.shape[:-1], dtype=torch.bool, device=wanted.device) if real is None else real
        step = 1 if isinstance(layer, CONVOLUTIONS) else len(inputs)  # the windows of many rows take much room
        for rows in (slice(start, start + step) for start in range(0, len(inputs), step)):
            sums.add(columns(layer, inputs[rows])[real[rows]], wanted[rows][real[rows]][:, left])
    sums.solve_(ridge)


def _seen(workload: Workload, path: str, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the layer ``path`` reads, and what it makes as [batch, …, features]; the pass ends there."""
    seen: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        made = output.flatten(2).transpose(1, 2) if isinstance(layer, CONVOLUTIONS) else output
        seen.extend([args[0], made])
        raise Enough

    handle = workload.module.get_submodule(path).register_forward_hook(keep)
    try:
        with suppress(Enough):
            workload.forward(inputs)
    finally:
        handle.remove()
    return seen[0], seen[1]


def _left(original: Workload, pruned: Workload, path: str) -> Tensor:
    """Which outputs of the original's layer ``path`` the pruned model has left, int64, ascending."""
    gone: set[int] = set()
    for site in original.structure.sites:
        left = pruned.plan.left(original.plan, site.kind, site.layer, site.count)
        lost = sorted(set(range(site.count)) - set(left))
        gone.update(*(cut.features(lost) for cut in site.cuts if (cut.layer, cut.side) == (path, "out")))
    outputs = matrix(original.module.get_submodule(path)).shape[0]
    return torch.tensor([feature for feature in range(outputs) if feature not in gone])
