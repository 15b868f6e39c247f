"""Magnitude of the weights.

What    Root mean square of the weights that a unit owns: its rows in every producer and its columns in the consumer;
        for a block, of all of its parameters.
When    No data at all. The field's baseline; on transformers it is often little better than random.
Cost    One pass over the weights.
Source  Li et al. 2017, "Pruning Filters for Efficient ConvNets", arXiv 1608.08710
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.data import Rows
from ...models.structure import Structure
from ...models.workload import Progress, Workload


def score(
    workload: Workload, structure: Structure, *, rows: Rows, seed: int = 0, progress: Progress | None = None
) -> Tensor:
    """Root mean square weight, float64 [num_units]; ``rows`` and ``seed`` are not used."""
    parts = []
    for done, site in enumerate(structure.sites, 1):
        consumer = workload.module.get_submodule(site.consumer)
        if site.kind == "block":
            squares = torch.cat([parameter.detach().double().flatten().square() for parameter in consumer.parameters()])
            parts.append(squares.mean().reshape(1))
        else:
            owned = [workload.module.get_submodule(name).get_parameter("weight") for name in site.producers]
            weights = torch.cat([*owned, consumer.get_parameter("weight").T], dim=1).detach().double()
            parts.append(weights.square().reshape(site.count, -1).mean(dim=1))
        if progress:
            progress(done, len(structure.sites), "sites")
    return torch.cat(parts).sqrt()
