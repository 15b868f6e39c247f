"""Elimination: in which order units go so that what is left can best make up for them.

What    Units of one layer are taken out one after the other, always the one whose loss the other columns of the layer
        that reads them make up for best; after each, all that is left has been solved anew.
When    Without labels, and where units stand in for each other: a score looks at each unit beside all others, this at
        each beside those that are left.
Cost    O(columns^3) in float64 for a reader, of one Gram matrix [columns, columns]; no rows.
Source  Kurtic et al. 2023, "ZipLM", arXiv 2302.04089, equations 2 to 4; Hassibi & Stork 1993 (optimal brain surgeon)

Derivation. A layer y = W z reads units' features z (with a bias, z less its mean: the bias is then solved too). Let
H = mean z zᵀ + λ I. Of all V whose columns S are zero, tr((V - W) H (V - W)ᵀ) is least, with K the other columns, for
V_K = W H[:, K] H[K, K]⁻¹, and is then tr(W_S (H⁻¹[S, S])⁻¹ W_Sᵀ). Where V takes W's place and H[K, K]⁻¹ that of H⁻¹,
the same holds for the next unit, and the errors add up: solving anew after each is solving anew for all. Both come by
an update of rank |S|,

    V = W - W[:, S] (H⁻¹[S, S])⁻¹ H⁻¹[S, :],    H[K, K]⁻¹ = (H⁻¹ - H⁻¹[:, S] (H⁻¹[S, S])⁻¹ H⁻¹[S, :])[K, K],

and afresh from H and W whenever a quarter of the columns has gone, so that rounding does not pile up. λ is a small
share of the mean diagonal (:func:`.cholesky.damp_`); it holds the weights where they are, so few tokens cannot make a
unit look replaceable.

The layer's error does not know what the task needs of its outputs. With a ``prior`` units are compared by their errors
times that, the unit's importance by a score; what is told stays the error.

Of more than 64 units a 64th of those left goes at once, the lowest by their errors one by one, and the error is that of
all of them together.

Once an order is chosen, one factorisation has the solutions after every step. Let q name the columns the other way
round, the last to go first. With H[q, q] = L Lᵀ, L lower triangular, tr((V - W) H (V - W)ᵀ) =
‖Lᵀ V[:, q]ᵀ - Lᵀ W[:, q]ᵀ‖². Where the first g columns to go are zero in V, the last g of q, so are the last g rows of
Lᵀ V[:, q]ᵀ: the error is at least what the last g rows of Z = Lᵀ W[:, q]ᵀ hold, and just that where the other rows are
met, which a triangular solve does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.memory import give_back
from ..cholesky import factor_, inverse_
from ..score.obs import errors

AT_ONCE = 64
"""One in so many units that are left goes in a step."""


@dataclass(frozen=True)
class Elimination:
    order: tuple[int, ...]
    """The units, the first to go first."""
    errors: Tensor
    """The mean squared error of the outputs, summed over outputs, by units kept: float64 [units + 1]."""


@dataclass(frozen=True)
class Nested:
    """The best weights of a layer as its columns go in one order, after every step."""

    columns: Tensor
    """q, the columns, the last to go first: int64 [columns]."""
    root: Tensor
    """L, [columns, columns]."""
    target: Tensor
    """Z, [columns, out]."""

    @property
    def errors(self) -> Tensor:
        """The mean squared error of the outputs, summed over outputs, by columns gone: float64 [columns + 1]."""
        return torch.cat([self.target.new_zeros(1), self.target.square().sum(1).flip(0).cumsum(0)])

    def weights(self, gone: int) -> Tensor:
        """The best weights [out, columns] with zeros for the first ``gone`` columns of the order."""
        found = self.target.new_zeros(self.target.shape[1], len(self.columns))
        left = len(self.columns) - gone
        solved = torch.linalg.solve_triangular(self.root[:left, :left].mT, self.target[:left], upper=True)
        found[:, self.columns[:left]] = solved.T
        return found


def nested(h: Tensor, weight: Tensor, columns: Tensor) -> Nested:
    """For H [columns, columns] and W [out, columns], both float64, and all ``columns`` in the order they go in."""
    back = columns.flip(0)
    root = factor_(h[back[:, None], back])
    return Nested(back, root, root.mT @ weight[:, back].T)


def eliminate(h: Tensor, weight: Tensor, units: Tensor, *, prior: Tensor | None = None) -> Elimination:
    """The greedy order of the units whose columns are the rows of ``units``, int64 [units, width], and its errors.

    ``h`` is H [columns, columns], ``weight`` W [out, columns], both float64. Columns of no unit stay. ``prior``
    [units], above zero, multiplies the errors by which units are compared.
    """
    count = len(units)
    prior = torch.ones(count, dtype=torch.float64) if prior is None else prior.double()
    found = torch.zeros(count + 1, dtype=torch.float64)
    order: list[int] = []
    alive = torch.arange(count)
    here = torch.arange(h.shape[1])  # the columns that the matrices at work have
    made = weight @ h
    inverse, v = _afresh(h, made, here)
    while len(alive):
        gone = torch.tensor(order, dtype=torch.int64)
        there = here[~torch.isin(here, units[gone].flatten())]
        if len(there) * 4 <= len(here) * 3:
            here = there
            del inverse, v  # before there are others
            give_back()
            inverse, v = _afresh(h, made, here)
        columns = torch.searchsorted(here, units[alive])
        step = max(1, len(alive) // AT_ONCE)
        first = (errors(inverse, v, columns) * prior[alive]).argsort(stable=True)[:step]
        going = columns[first].flatten()
        left = len(alive) - step
        added = float(errors(inverse, v, going[None]))
        # of a step only the end is known, and its units share what it adds
        found[left : len(alive)] = found[len(alive)] + added * torch.arange(step, 0, -1, dtype=torch.float64) / step
        solved = torch.linalg.solve(inverse[going][:, going], inverse[going])
        v.addmm_(v[:, going], solved, alpha=-1)
        inverse.addmm_(inverse[:, going], solved, alpha=-1)
        order += alive[first].tolist()
        alive = alive[torch.isin(alive, alive[first], invert=True)]
    return Elimination(tuple(order), found)


def _afresh(h: Tensor, made: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
    """H[K, K]⁻¹ and the solution for the columns K that are ``here``; ``made`` is W H."""
    inverse = inverse_(h[here[:, None], here]) if len(here) else h.new_zeros(0, 0)
    return inverse, made[:, here] @ inverse
