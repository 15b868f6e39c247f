"""Random scores.

What    A uniform number for each unit.
When    As the floor that every other method has to beat.
Cost    None.
Source  The control of Li et al. 2022, "Revisiting Random Channel Pruning for Neural Network Compression"
"""

from __future__ import annotations

import torch
from torch import Tensor

from .evidence import Evidence

NEEDS = ()


def score(evidence: Evidence) -> Tensor:
    """Uniform in [0, 1) by the evidence's seed, float64 [num_units]."""
    generator = torch.Generator().manual_seed(evidence.seed)
    return torch.rand(evidence.workload.structure.num_units, generator=generator, dtype=torch.float64)
