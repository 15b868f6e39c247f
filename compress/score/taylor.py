"""First-order Taylor expansion in the gates.

What    With g = d loss(row) / d gate: mean over rows of |g|, how far each row's loss moves when the unit goes; or,
        signed, the mean of -g, by how much the mean loss grows, which at a trained minimum is near zero for all.
When    As fisher, but steadier where single rows have outlying gradients.
Cost    One forward and backward pass over the rows.
Source  Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", arXiv 1906.10771
"""

from __future__ import annotations

from torch import Tensor

from ...errors import UsageError
from .evidence import Evidence

NEEDS = ("gates",)


def score(evidence: Evidence, *, form: str = "absolute") -> Tensor:
    """Mean |g| ("absolute") or mean -g ("signed"), float64 [num_units]; UsageError for another word."""
    if form not in {"absolute", "signed"}:
        raise UsageError(f"The form of taylor is '{form}'; it must be 'absolute' or 'signed'.")
    return evidence.gradients.absolute if form == "absolute" else -evidence.gradients.mean
