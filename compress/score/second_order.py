"""Second-order Taylor expansion in the gates, its slope trusted as far as the rows bear it out.

What    λ mean(-g) + mean(g^2) / 2 for g = d loss / d gate: the change of the loss to second order, the curvature taken
        from the empirical Fisher matrix, the slope shrunk by the λ of the unit's kind.
When    For the true change of the loss with single units, of these rows (``trust=1``) or of others like them (λ as
        estimated). Not to remove much at once: slopes do not hold that far.
Cost    One forward and backward pass over the rows.
Source  LeCun et al. 1990, "Optimal Brain Damage", with the slope kept, as Molchanov et al. 2017 do, arXiv 1611.06440;
        the shrinkage is here

Derivation. Over n rows whose slopes have the variance v, a unit's mean slope is its true one plus noise of variance
v / n. Let true slopes have the variance κ v, units that act more having larger ones. Then mean(g)^2 / mean(g^2) is
about r = (κ + 1/n) / (κ + 1), whose mean over the units of a kind gives κ; and the best guess of the true slope, in
squared error, is λ = κ / (κ + 1/n) times the measured one (Efron & Morris 1973).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import UsageError
from .evidence import Evidence

NEEDS = ("gates",)


def score(evidence: Evidence, *, trust: float | None = None) -> Tensor:
    """The expected change of the loss, float64 [num_units]; ``trust`` sets λ for all kinds, UsageError below 0 or above
    1."""
    if trust is not None and not 0 <= trust <= 1:
        raise UsageError(f"The trust of second_order is {trust}; it must be from 0 to 1.")
    structure, found = evidence.workload.structure, evidence.gradients
    trusted = torch.full_like(found.mean, trust or 0.0)
    for kind in structure.kinds if trust is None else ():
        own = torch.cat([torch.arange(p.start, p.stop) for site, p in structure.slices() if site.kind == kind])
        trusted[own] = shrinkage(found.mean[own], found.square[own], len(evidence.rows))
    return found.square / 2 - trusted * found.mean


def shrinkage(mean: Tensor, square: Tensor, rows: int) -> float:
    """λ of units whose gate gradients over ``rows`` rows have the means ``mean`` and ``square`` [units]."""
    live = square > 0
    if not bool(live.any()):
        return 0.0
    r = float((mean[live].square() / square[live]).mean())
    kappa = max(r - 1 / rows, 0.0) / max(1 - r, 1e-9)
    return kappa / (kappa + 1 / rows)
