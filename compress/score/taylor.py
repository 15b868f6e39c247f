"""First-order Taylor expansion in the gates.

What    mean over rows of |d loss / d gate|: how far, to first order, each row's loss moves when the unit goes.
When    As fisher, but steadier where single rows have outlying gradients.
Cost    One forward and backward pass over the rows.
Source  Michel et al. 2019, arXiv 1905.10650, equation 2 (heads); Molchanov et al. 2019, arXiv 1906.10771
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.data import Rows
from ...models.structure import Structure
from ...models.workload import Progress, Workload
from .gradients import gate_gradients


def score(
    workload: Workload, structure: Structure, *, rows: Rows, seed: int = 0, progress: Progress | None = None
) -> Tensor:
    """Mean absolute gate gradient, float64 [num_units]; ``seed`` is not used."""
    total = torch.zeros(structure.num_units, dtype=torch.float64)
    for gradient in gate_gradients(workload, structure, rows, progress):
        total += gradient.abs().sum(dim=0)
    return total / len(rows)
