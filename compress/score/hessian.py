"""Hessian of the loss in the gates, its diagonal.

What    mean over rows of d²loss / d gate², by Hutchinson's estimator: v ⊙ H v for v of random signs, whose expectation
        is the diagonal of H. Every row has a Hessian and signs of its own, so that the mean over rows averages the
        estimator's noise too. Half of it is the second-order Taylor term of the loss when the unit goes.
When    Where the Fisher matrix is no good stand-in: rows that the model gets wrong, or labels it was not trained on.
        Not for single channels: the noise of one is the size of its row of H, all units counted.
Cost    One forward, one backward and ``probes`` second-order backward passes over the rows; about three times the
        memory of a batch, so batches are four times smaller.
Source  Hutchinson 1990; Yao et al. 2021, "AdaHessian", arXiv 2006.00719, section 3.2; pruning by curvature: LeCun et
        al. 1990, "Optimal Brain Damage"
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...models.surgery import gated
from .evidence import Evidence, batches, complaint, frozen, ones

NEEDS = ("rows",)


def score(evidence: Evidence, *, probes: int = 1) -> Tensor:
    """The mean diagonal, float64 [num_units], from ``probes`` draws of signs for each row."""
    workload, rows = evidence.workload, evidence.rows
    random = torch.Generator().manual_seed(evidence.seed)
    total = torch.zeros(workload.structure.num_units, dtype=torch.float64)
    done = 0
    for batch in batches(rows, share=1 / 2):
        gates = ones(workload, batch)
        # the one attention that can be differentiated twice
        with frozen(workload.module), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            with gated(workload.module, workload.structure, gates):
                loss = workload.losses(batch, seed=evidence.seed).sum()
            (gradient,) = torch.autograd.grad(loss, gates, create_graph=True)
            if not torch.isfinite(gradient).all():
                raise complaint(workload, batch, seed=evidence.seed)
            for _ in range(probes):
                signs = torch.randint(0, 2, gates.shape, generator=random).to(gates) * 2 - 1
                (product,) = torch.autograd.grad(gradient, gates, signs, retain_graph=True)
                total += (signs * product).sum(dim=0).double().cpu()
        done += len(batch.rows)
        if evidence.progress:
            evidence.progress(done, len(rows), "rows")
    return total / (len(rows) * probes)
