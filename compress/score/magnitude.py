"""Magnitude of the weights.

What    Mean size of the weights that a unit owns, over all layers that lose something with it: (mean |w|^p)^(1/p).
When    No data at all. The field's baseline; on transformers it is often little better than random.
Cost    One pass over the weights.
Source  Li et al. 2017, "Pruning Filters for Efficient ConvNets", arXiv 1608.08710 (p = 1); grouped over coupled layers
        as in Fang et al. 2023, "DepGraph", arXiv 2301.12900
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import UsageError
from .evidence import Evidence
from .weights import power_sums

NEEDS = ()


def score(evidence: Evidence, *, norm: int = 2) -> Tensor:
    """Mean size under the L1 or L2 ``norm``, float64 [num_units]; UsageError for another norm."""
    if norm not in {1, 2}:
        raise UsageError(f"The norm of magnitude is {norm}; it must be 1 or 2.")
    module, structure = evidence.workload.module, evidence.workload.structure
    pairs = [power_sums(module, structure, site, norm) for site in structure.sites]
    return torch.cat([sums / sizes for sums, sizes in pairs]).pow(1 / norm)
