"""Ridge: the weights of a layer by least squares, from inputs and targets that stream by.

Derivation. The sum over positions of |W z + b - y|² + λ |[W b] - [W b]_held|² is least, with x = [z; 1] and V = [W b],
for V = (Σ y xᵀ + λ V_held) (Σ x xᵀ + λ I)⁻¹: λ pulls towards the weights as they are, so few rows cannot ruin a layer.
A layer without a bias gets none: x = z.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..cholesky import factor_


class Ridge:
    """The sums of the layer ``name`` with weights ``weight`` [out, in] and ``bias`` [out] or None, in float64."""

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        self.name, self.weight, self.bias = name, weight, bias
        outputs, inputs = weight.shape
        columns = inputs if bias is None else inputs + 1
        self.gram = weight.new_zeros(columns, columns, dtype=torch.float64)
        self.cross = weight.new_zeros(outputs, columns, dtype=torch.float64)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Take in z [positions, in] and y [positions, out]."""
        x = nn.functional.pad(inputs.double(), (0, len(self.gram) - inputs.shape[1]), value=1.0)
        self.gram.addmm_(x.T, x)
        self.cross.addmm_(targets.double().T, x)

    def solution_(self, strength: float) -> Tensor:
        """V, float64 [out, in], or [out, in + 1] with a bias; λ is ``strength``, above 0, times the mean diagonal of
        Σ x xᵀ. The sums are used up. Raises InputError where they are not finite."""
        weight = strength * float(self.gram.diagonal().mean()) or 1.0  # where all inputs were zero, V stays as it is
        if not math.isfinite(weight):
            raise InputError(
                f"'{self.name}' is given NaN or infinite numbers on the calibration rows, so it cannot be solved."
            )
        self.gram.diagonal().add_(weight)
        width = self.weight.shape[1]
        self.cross[:, :width].add_(self.weight, alpha=weight)
        if self.bias is not None:
            self.cross[:, -1].add_(self.bias, alpha=weight)
        return torch.cholesky_solve(self.cross.T, factor_(self.gram)).T

    def solve_(self, strength: float) -> None:
        """Write the solution into the layer."""
        solved = self.solution_(strength)
        self.weight.copy_(solved[:, : self.weight.shape[1]])
        if self.bias is not None:
            self.bias.copy_(solved[:, -1])
