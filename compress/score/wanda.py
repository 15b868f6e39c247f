"""Wanda, for units: weights times the size of what they multiply.

What    Σ |W[i, j]| ‖X_j‖ over the columns j that a unit has in the layers that read it; ‖X_j‖ is the root mean square
        of input j over tokens. A block has the sum of its units.
When    No labels and no gradients; catches channels that are large but always off, which magnitude does not.
Cost    One forward pass over the rows.
Source  Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695, equation
        1; summed over units here
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.layers import matrix
from .evidence import Evidence
from .weights import by_unit, of_blocks, places

NEEDS = ("inputs",)


def score(evidence: Evidence) -> Tensor:
    """The sum, float64 [num_units]."""
    structure = evidence.workload.structure
    scores = torch.zeros(structure.num_units, dtype=torch.float64)
    for site, place in structure.slices():
        for cut in site.gates:
            reader = evidence.workload.module.get_submodule(cut.layer)
            sizes = evidence.seen.moments[cut.layer].square.double().sqrt()
            of_columns = (matrix(reader).detach().double().abs().sum(dim=0) * sizes).cpu()
            scores[place] += by_unit(site, of_columns[places(reader, site, cut)].sum(dim=1))
    return of_blocks(structure, scores)
