"""GPTQ: columns rounded one after another, the rest made to make up for each.

What    The columns of a weight are rounded in turn; after each, those not yet rounded take the values that make the
        squared error of the layer's output least. Ŵ minimises tr((W - Ŵ) G (W - Ŵ)ᵀ) greedily, G the mean of x xᵀ.
When    INT4 weights, where there are calibration rows: it loses less than rounding to nearest does.
Cost    A forward pass of the rows for each group of layers, and in^3 + out * in^2 for each layer in float64.
Source  Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv
        2210.17323; the exact step is that of optimal brain quantization, Frantar & Alistarh 2022, arXiv 2208.11580
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan import Codes
from ..cholesky import damp_, inverse_
from . import blocks

RIDGE = 1e-2
"""λ in units of G's mean diagonal, which holds the weights near where they are."""
TOGETHER = 128
"""So many columns, or one block's, are rounded before the others make up for all of them in one product."""


def gptq(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int = 4,
    block: int = 32,
    symmetric: bool = False,
    ridge: float = RIDGE,
    act_order: bool = False,
) -> Codes:
    """The codes of ``weight`` [out, in] for inputs whose mean of x xᵀ is ``gram`` [in, in].

    With G + λ I = G', and R the upper Cholesky factor of G'⁻¹, R[i, i]^2 and R[i, i:] R[i, i] are the diagonal entry
    and the row of the inverse of G' without the columns that have been rounded, so one factor serves all steps.

    A block's grid spans its columns as they are when the first of them is reached. With ``act_order`` the columns of
    most energy come first, and the grids are those of ``weight``, as a block's columns are then not in succession. A
    row that rounding to nearest serves better, which a greedy order cannot rule out, is rounded so.
    """
    gram = gram.double()
    plain = blocks.to_nearest(weight.double(), bits=bits, block=block, symmetric=symmetric)
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(gram))
    h = damp_(gram[order][:, order], ridge=ridge)
    factor = torch.linalg.cholesky(inverse_(h), upper=True)
    left = weight.double()[:, order]
    scales, zeros = blocks.grid(weight.double(), bits=bits, block=block, symmetric=symmetric)
    found = torch.empty_like(left)
    together = max(TOGETHER, block)  # both are powers of two, so that no block begins in one batch and ends in the next
    for start in range(0, len(h), together):
        stop = min(start + together, len(h))
        errors = torch.empty_like(left[:, start:stop])
        for place in range(start, stop):
            column = int(order[place])
            part = column // block
            if not act_order and column % block == 0:
                fresh = blocks.grid(
                    left[:, place : min(place + block, stop)], bits=bits, block=block, symmetric=symmetric
                )
                scales[:, part], zeros[:, part] = (one[:, 0] for one in fresh)
            scale, zero = scales[:, part], zeros[:, part]
            numbers = blocks.nearest(left[:, place], scale, zero, bits=bits)
            found[:, column] = numbers
            error = (left[:, place] - scale * (numbers - zero)) / factor[place, place]
            left[:, place:stop] -= torch.outer(error, factor[place, place:stop])
            errors[:, place - start] = error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    solved = blocks.codes(found, scales, zeros, bits=bits, block=block)
    return blocks.better(weight, solved, plain, gram)
