"""Fisher information of the gates.

What    mean over rows of (d loss / d gate)^2. With a gate taken from 1 to 0 the loss grows by about half of that: the
        second-order Taylor term at a trained minimum, the Hessian replaced by the empirical Fisher matrix's diagonal.
When    The default: a trained model and a few hundred labelled rows.
Cost    One forward and backward pass over the rows.
Source  Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv 2204.09656, section 4.1
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
    """Mean squared gate gradient, float64 [num_units]; ``seed`` is not used."""
    total = torch.zeros(structure.num_units, dtype=torch.float64)
    for gradient in gate_gradients(workload, structure, rows, progress):
        total += gradient.square().sum(dim=0)
    return total / len(rows)
