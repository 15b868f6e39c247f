"""Head-gate gradient, comparable over layers.

What    Mean over rows of |d loss / d gate|, divided by the L2 norm of its layer's: |Att_h(x)ᵀ dL/dAtt_h(x)| for a head,
        and the same for every other kind. A unit that is alone in its layer, as a block is, keeps its value.
When    To rank heads over all layers where the gradients of some layers are larger throughout.
Cost    One forward and backward pass over the rows.
Source  Michel et al. 2019, "Are Sixteen Heads Really Better than One?", arXiv 1905.10650, equation 2 and section 4.1
"""

from __future__ import annotations

import torch
from torch import Tensor

from .evidence import Evidence

NEEDS = ("gates",)


def score(evidence: Evidence) -> Tensor:
    """Normalised mean |g|, float64 [num_units]."""
    scores = evidence.gradients.absolute.clone()
    for site, place in evidence.workload.structure.slices():
        if site.count > 1:
            scores[place] /= scores[place].norm().clamp(min=torch.finfo(scores.dtype).tiny)
    return scores
