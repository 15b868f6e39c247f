"""AWQ: columns that read large activations made larger before they are rounded, and what writes them smaller.

What    Column j of the layers that read a tensor is multiplied by s_j = rms_j^e, and what makes the tensor divided by
        it, so that the function stays the same. The exponent e is that of 21 in [0, 1] with which rounding to nearest
        leaves the least squared error of the layers' outputs; with 0 nothing changes.
When    INT4 weights of models some of whose activations are far larger than others; before any way of rounding.
Cost    A forward pass of the rows for each tensor, and 21 roundings and products out * in^2 of each layer.
Source  Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv
        2306.00978; the root mean square stands for the mean magnitude
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..score.readers import Moments
from . import blocks
from .fold import Input

EXPONENTS = 21
FLOOR = 1e-4
"""Channels below this share of the largest root mean square are scaled as if they had it."""


def scales(
    tensor: Input, weights: Sequence[Tensor], moments: Moments, *, bits: int, block: int, symmetric: bool
) -> Tensor:
    """The s of a ``tensor`` with a maker, float64 [in], under which its readers' ``weights`` [out, in] lose least."""
    gram = moments.covariance(centred=False)
    rms = tensor.tied(moments.square.double().sqrt())
    rms = rms.clamp(min=FLOOR * float(rms.max()) or 1.0)
    best, least = torch.ones_like(rms), torch.inf
    for exponent in torch.linspace(0, 1, EXPONENTS).tolist():
        found = rms**exponent
        found = found / (found.max() * found.min()).sqrt()
        scaled = gram / torch.outer(found, found)
        error = 0.0
        for weight in weights:
            wider = weight.double() * found
            plain = blocks.to_nearest(wider, bits=bits, block=block, symmetric=symmetric)
            error += float(blocks.error(wider, plain, scaled).sum())
        if error < least:
            best, least = found, error
    return best
