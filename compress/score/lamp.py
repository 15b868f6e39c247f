"""LAMP: the layer-adaptive magnitude, for units.

What    A unit's squared weights over those of all units of its layer that are at least as large: the share of what is
        left of the layer that goes with it, where units go in the order of their magnitude.
When    No data, but one threshold over layers whose weights differ in scale, where magnitude empties some layers.
Cost    One pass over the weights.
Source  Lee et al. 2021, "Layer-adaptive Sparsity for the Magnitude-based Pruning", arXiv 2010.07611; on units here, not
        on single weights. The blocks of a stack count as the units of one layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.structure import Structure
from .evidence import Evidence
from .weights import power_sums

NEEDS = ()


def score(evidence: Evidence) -> Tensor:
    """The share, in (0, 1], float64 [num_units]."""
    module, structure = evidence.workload.module, evidence.workload.structure
    squares = torch.cat([power_sums(module, structure, site, 2)[0] for site in structure.sites])
    scores = torch.empty_like(squares)
    for layer in _layers(structure):
        order = squares[layer].argsort(stable=True)
        ordered = squares[layer][order]
        left = ordered.flip(0).cumsum(0).flip(0)
        scores[layer[order]] = ordered / left.clamp(min=torch.finfo(left.dtype).tiny)
    return scores


def _layers(structure: Structure) -> list[Tensor]:
    """The positions of units that share a layer and a kind."""
    layers: dict[tuple[str, int], list[Tensor]] = {}
    start_of = {layer: stack.start for stack in structure.stacks for layer in stack.layers}
    for site, place in structure.slices():
        layer = start_of[site.layer] if site.kind == "block" else site.layer
        layers.setdefault((site.kind, layer), []).append(torch.arange(place.start, place.stop))
    return [torch.cat(parts) for parts in layers.values()]
