"""Cholesky: second moments of a layer's inputs made invertible, factored and inverted in the memory that they lie in.

Of a wide layer one such matrix in float64 may be as large as the layer's weights several times over, so there is no
second one but while :func:`damp_` tries. A trailing underscore says that the argument is changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-4


def damp_(h: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """H + λ I, where λ is ``ridge`` times H's mean diagonal.

    λ grows tenfold until that is positive definite: sums in float32 of inputs that vary in few directions are not.
    """
    diagonal = h.diagonal().clone()
    weight = ridge * diagonal.mean().clamp(min=torch.finfo(h.dtype).tiny)
    h.diagonal().add_(weight)
    while torch.linalg.cholesky_ex(h).info and torch.isfinite(weight):
        weight = 10 * weight
        h.diagonal().copy_(diagonal + weight)
    return h


def factor_(h: Tensor) -> Tensor:
    """L, lower triangular, with L Lᵀ = H, which is positive definite."""
    turned = h.mT  # the same matrix; column after column LAPACK takes it where it lies
    torch.linalg.cholesky(turned, out=turned)
    return turned


def inverse_(h: Tensor) -> Tensor:
    """H⁻¹ of a positive definite H."""
    factor = factor_(h)
    return torch.cholesky_inverse(factor, out=factor)
