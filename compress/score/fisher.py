"""Fisher information of the gates, its diagonal.

What    mean over rows of (d loss / d gate)^2. With a gate taken from 1 to 0 the loss grows by about half of that: the
        second-order Taylor term at a trained minimum, the Hessian replaced by the empirical Fisher matrix's diagonal.
When    A trained model and a few hundred rows.
Cost    One forward and backward pass over the rows.
Source  Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv 2204.09656, section 4.1
"""

from __future__ import annotations

from torch import Tensor

from .evidence import Evidence

NEEDS = ("gates",)


def score(evidence: Evidence) -> Tensor:
    """Mean squared gate gradient, float64 [num_units]."""
    return evidence.gradients.square
