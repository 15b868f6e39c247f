"""Magnitude of the weights.

What    Root mean square of the weights that a unit owns: its rows in every producer and its columns in the consumer;
        for a block, of all of its parameters.
When    No data at all. The field's baseline; on transformers it is often little better than random.
Cost    One pass over the weights.
Source  Li et al. 2017, "Pruning Filters for Efficient ConvNets", arXiv 1608.08710
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...models.data import Rows
from ...models.layers import matrix, window
from ...models.structure import Cut, Site, Structure
from ...models.workload import Progress, Workload


def score(
    workload: Workload, structure: Structure, *, rows: Rows, seed: int = 0, progress: Progress | None = None
) -> Tensor:
    """Root mean square weight, float64 [num_units]; ``rows`` and ``seed`` are not used."""
    parts = []
    for done, site in enumerate(structure.sites, 1):
        if site.kind == "block":
            block = workload.module.get_submodule(site.block)
            squares = torch.cat([parameter.detach().double().flatten().square() for parameter in block.parameters()])
            parts.append(squares.mean().reshape(1))
        else:
            owned = [part for cut in site.cuts for part in _owned(workload.module, site, cut)]
            parts.append(torch.cat(owned, dim=1).mean(dim=1))
        if progress:
            progress(done, len(structure.sites), "sites")
    return torch.cat(parts).sqrt()


def _owned(module: nn.Module, site: Site, cut: Cut) -> list[Tensor]:
    """The squared weights in ``cut``, one row a unit: float64 [count, weights of a unit]; tables do not count."""
    layer = module.get_submodule(cut.layer) if cut.layer in dict(module.named_modules()) else None
    if layer is None or isinstance(layer, nn.Embedding):
        return []
    weight = matrix(layer).detach().double().square()
    if cut.side == "out":
        return [weight[offset : offset + site.count * cut.width].reshape(site.count, -1) for offset in cut.offsets]
    step = window(layer)
    starts, length = [offset * step for offset in cut.offsets], site.count * cut.width * step
    return [weight.T[start : start + length].reshape(site.count, -1) for start in starts]
