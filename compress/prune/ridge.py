"""Ridge: the weights of a layer by least squares, from inputs and targets that stream by.

Derivation. The sum over positions of |W z + b - y|² + λ |[W b] - [W b]_held|² is least, with x = [z; 1] and V = [W b],
for V = (Σ y xᵀ + λ V_held) (Σ x xᵀ + λ I)⁻¹: λ pulls towards the weights as they are, so few rows cannot ruin a layer.
A layer without a bias gets none: x = z.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ridge:
    """The sums of one layer with weights ``weight`` [out, in] and ``bias`` [out] or None, in float64."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.held = (weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)).double()
        """V as it is, [out, in], or [out, in + 1] with a bias."""
        self.gram = self.held.new_zeros(self.held.shape[1], self.held.shape[1])
        self.cross = torch.zeros_like(self.held)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Take in z [positions, in] and y [positions, out]."""
        x = nn.functional.pad(inputs, (0, self.held.shape[1] - self.weight.shape[1]), value=1.0).double()
        self.gram.addmm_(x.T, x)
        self.cross.addmm_(targets.double().T, x)

    def solution(self, strength: float) -> Tensor:
        """V, float64; λ is ``strength`` times the mean diagonal of Σ x xᵀ."""
        weight = strength * self.gram.diagonal().mean()
        damped = self.gram.clone()
        damped.diagonal().add_(weight)
        solved: Tensor = torch.linalg.solve(damped, (self.cross + weight * self.held).T)
        return solved.T

    def solve(self, strength: float) -> None:
        """Write the solution into the layer."""
        solved = self.solution(strength).to(self.weight.dtype)
        self.weight.copy_(solved[:, : self.weight.shape[1]])
        if self.bias is not None:
            self.bias.copy_(solved[:, -1])
