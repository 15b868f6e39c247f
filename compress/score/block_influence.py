"""Block influence: how far a unit turns the residual stream.

What    1 - cos(with, without), mean over tokens: for a block of its output against its input; for a head or a channel
        of the stream that it has been added to against the stream less its contribution W[:, S] x[S]. Channels of a
        network without a residual stream are held against the output of the layer that reads them.
When    No labels and no gradients. For depth: which blocks of a deep decoder do next to nothing.
Cost    One forward pass over the rows, in which the products with the readers' weights are made a second time.
Source  Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv
        2403.03853, equation 1; taken on to parts of blocks here
"""

from __future__ import annotations

import torch
from torch import Tensor

from .evidence import Evidence

NEEDS = ("turns",)


def score(evidence: Evidence) -> Tensor:
    """The mean of 1 - cos, in [0, 2], float64 [num_units]."""
    return torch.cat([evidence.seen.turned[site].value for site in evidence.workload.structure.sites])
