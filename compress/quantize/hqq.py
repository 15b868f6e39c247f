"""HQQ: the grid of each block fitted to the weights alone, outliers let go.

What    Scale and zero point of each block minimise Σ |w - ŵ|^p, p < 1, by half-quadratic splitting: the outliers are
        set apart by a shrinkage, then the codes, the zero point and the scale are solved for what is left.
When    INT4 weights where there are no rows to calibrate on; the error is that of the weights, not of the outputs.
Cost    A few dozen passes over the weights, no rows.
Source  Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models",
        mobiusml.github.io/hqq_blog; the zero point stays a whole number here, as files hold it, and the scale is
        solved for besides
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan import Codes
from . import blocks

POWER = 0.7
BETA, KAPPA = 10.0, 1.01
"""The weight of the splitting's quadratic term, and what it grows by each time (in units of the block's scale)."""


def hqq(
    weight: Tensor, *, bits: int = 4, block: int = 32, symmetric: bool = False, power: float = POWER, steps: int = 20
) -> Codes:
    """The codes of ``weight`` [out, in]; of each block the best of all ``steps``, the first of which rounds to nearest.

    The splitting works in units of each block's first scale: the same for any scale of the weights.
    """
    scales, zeros = blocks.grid(weight.double(), bits=bits, block=block, symmetric=symmetric)
    unit, zero = scales.abs()[..., None], zeros[..., None]
    real = blocks.blocks(torch.ones_like(weight, dtype=torch.float64), block)
    target = blocks.blocks(weight.double(), block) / unit
    scale = scales[..., None] / unit
    best_scale, best_zero = scale.clone(), zero.clone()
    least = torch.full_like(scale, torch.inf)
    beta = BETA
    for _ in range(steps):
        numbers = blocks.nearest(target, scale, zero, bits=bits)
        off = target - scale * (numbers - zero)
        loss = (real * off.abs() ** power).sum(dim=2, keepdim=True)
        better = loss < least
        least = torch.where(better, loss, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        inlier = target - _shrunk(off, beta, power)
        if not symmetric:
            drift = (real * (numbers - inlier / scale)).sum(dim=2, keepdim=True) / real.sum(dim=2, keepdim=True)
            zero = drift.round().clamp(0, 2**bits - 1)
        steps_taken = real * (numbers - zero)
        squares = steps_taken.square().sum(dim=2, keepdim=True)
        fitted = (steps_taken * inlier).sum(dim=2, keepdim=True) / squares.clamp(min=1)
        scale = torch.where(fitted == 0, scale, fitted)
        beta *= KAPPA
    scales = (best_scale * unit)[..., 0].float().double()
    return blocks.rounded(weight.double(), scales, best_zero[..., 0], bits=bits, block=block)


def _shrunk(off: Tensor, beta: float, power: float) -> Tensor:
    """The proximal step of |·|^p, generalised soft thresholding: what is far off stays off."""
    return off.sign() * (off.abs() - off.abs().clamp(min=1e-12) ** (power - 1) / beta).clamp(min=0)
