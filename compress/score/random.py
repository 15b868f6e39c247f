"""Random scores.

What    A uniform number for each unit.
When    As the floor that every other method has to beat.
Cost    None.
Source  The control of Li et al. 2022, "Revisiting Random Channel Pruning for Neural Network Compression"
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
    """Uniform in [0, 1) by ``seed``, float64 [num_units]; ``rows`` are not used."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(structure.num_units, generator=generator, dtype=torch.float64)
