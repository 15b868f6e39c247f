"""Optimal brain surgeon on structures: the error that is left when the rest makes up for the unit.

What    The mean squared error of the output of the layer that reads a unit, once the unit's columns S are gone and all
        other weights (and the bias) have been solved anew: Σ_rows W[:, S] (H⁻¹[S, S])⁻¹ W[:, S]ᵀ, H = X Xᵀ + λ I. A
        block has nothing left to make up for it: mean |block(x) - x|^2.
When    Before reconstruction, which does that solving: units that others can replace score low whatever their size.
Cost    One forward pass over the rows and tokens * columns^2 for each reader, and the inverse of a float64 matrix
        [columns, columns]. Gram matrices take at most a quarter of the room of the parameters: where all of them need
        more, the readers are visited in groups, each in a forward pass of its own.
Source  Hassibi & Stork 1993 (optimal brain surgeon); Kurtic et al. 2023, "ZipLM: Inference-Aware Structured Pruning of
        Language Models", arXiv 2302.04089, equations 2 and 3; with the bias solved too, as reconstruction does

Derivation. Solving the bias along with W is solving W for inputs less their mean, so with a bias H is the covariance. λ
is ``ridge`` times the mean of its diagonal; it holds the weights where they are, so few tokens cannot make a unit look
replaceable, and it counts λ |W[:, S]|^2 as part of the error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.layers import matrix
from ..cholesky import RIDGE, damp_, inverse_
from .evidence import Evidence
from .weights import places

NEEDS = ("grams", "moves")


def score(evidence: Evidence, *, ridge: float = RIDGE) -> Tensor:
    """The mean squared error, summed over outputs and readers, float64 [num_units]; ``ridge`` is λ in units of the mean
    diagonal of H."""
    module, structure = evidence.workload.module, evidence.workload.structure
    scores = torch.zeros(structure.num_units, dtype=torch.float64)
    for name, moments in evidence.grams():
        reader = module.get_submodule(name)
        weight = matrix(reader).detach().double()
        covariance = moments.covariance(centred=reader.bias is not None)
        inverse = inverse_(damp_(covariance, ridge=ridge))
        for site, place in structure.slices():
            for cut in site.gates:
                if cut.layer == name:
                    owner, own = torch.tensor(site.parts), places(reader, site, cut)
                    units = [own[owner == unit].flatten() for unit in range(site.count)]
                    for width in {len(columns) for columns in units}:
                        alike = [unit for unit, columns in enumerate(units) if len(columns) == width]
                        found = errors(inverse, weight, torch.stack([units[unit] for unit in alike]))
                        scores[torch.tensor(alike) + place.start] += found.cpu()
    for site, place in structure.slices():
        if site.kind == "block":
            scores[place] = evidence.seen.moved[site.block].value
    return scores


def errors(inverse: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    """Σ_rows W[:, S] (H⁻¹[S, S])⁻¹ W[:, S]ᵀ from H⁻¹ and W, [units], for the S that each row of ``columns`` [units,
    width] is."""
    if columns.shape[1] == 1:  # of all columns and then a choice: nothing the size of W is made
        alone: Tensor = torch.linalg.vector_norm(weight, dim=0).square() / inverse.diagonal()
        return alone[columns[:, 0]]
    own = weight[:, columns].movedim(0, 1)  # [units, out, width]
    between = inverse[columns[:, :, None], columns[:, None, :]]
    solved: Tensor = torch.linalg.solve(between, own, left=False)
    return (own * solved).sum(dim=(1, 2))
