"""Fisher information of the gates, a block for each layer.

What    Units are taken out of their layer one after the other, always the one that costs least beside those that have
        gone: with F = mean over rows of g gᵀ and S gone, unit u adds F[u, u] + 2 Σ_{v in S} F[u, v] to the square
        (Σ g)^2. That is its score, raised where needed so that the scores of a layer keep that order.
When    As fisher, where units of a layer stand in for each other or work against each other.
Cost    One forward and backward pass over the rows; then rows * count^2 for a layer of count units. Of at most 1,024
        rows the gradients are kept, 4 bytes a row and unit, and never the matrix F.
Source  Kwon et al. 2022, arXiv 2204.09656, section 4.2 (their rearrangement of a mask is greedy in the same quantity)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .evidence import Evidence

NEEDS = ("gates_by_row",)


def score(evidence: Evidence) -> Tensor:
    """What a unit adds when its turn has come, float64 [num_units]."""
    by_row = evidence.gradients.by_row
    return torch.cat([_greedy(by_row[:, place].double()) for _, place in evidence.workload.structure.slices()])


def _greedy(gradients: Tensor) -> Tensor:
    """The score of each unit of a layer from its rows' gradients [rows, count]."""
    rows, count = gradients.shape
    own = gradients.square().sum(dim=0)
    gone = torch.zeros(rows, dtype=gradients.dtype)
    left = torch.zeros(count, dtype=gradients.dtype)
    order, costs = [], []
    for _ in range(count):
        added = own + 2 * (gradients.T @ gone) + left
        unit = int(added.argmin())
        order.append(unit)
        costs.append(added[unit] / rows)
        gone += gradients[:, unit]
        left[unit] = torch.inf
    rising = torch.stack(costs).cummax(dim=0).values
    scores = torch.empty_like(own)
    scores[torch.tensor(order)] = rising + torch.arange(count) * _step(rising)
    return scores


def _step(values: Tensor) -> Tensor:
    """What keeps equal values apart and the others as they are, to nine digits."""
    return values.abs().max() * 1e-9 / max(len(values), 1)
