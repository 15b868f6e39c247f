"""First-order Taylor expansion in random sub-networks.

What    Mean over rows of |d loss / d gate|, where every row has a network of its own: a share of the units, drawn
        between none and ``most``, is masked in it. The gradient is that of all gates, of the masked ones too.
When    By default. What taylor says of the whole network, this says of the networks that pruning leads through, where
        units that stood in for each other are needed.
Cost    ``passes`` forward and backward passes over the rows, of their own.
Source  Here. The gradient is that of Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", arXiv
        1906.10771; its mean over sub-networks is Owen's form of the Shapley value (Owen 1972, "Multilinear Extensions
        of Games", Management Science 18)

Derivation. Let L(S) be the loss with the units S masked. Over all orders in which units can go, unit u adds on average
its Shapley value, which is the mean of L(S + u) - L(S) over random S that hold every other unit with probability q, and
over q from 0 to 1. Pruning stops before everything has gone, so q ends at ``most``. The difference is -d loss / d gate
of u in that network, to first order, whether u itself is masked there or not. Its size is averaged and not its value: a
unit that helps some rows as much as it hurts others is needed, and the signed mean over few rows is mostly noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import UsageError
from ...models.structure import Structure
from ...models.surgery import gated
from .evidence import Evidence, batches, complaint, frozen, ones

NEEDS = ("rows",)

WHOLE = {"block", "kv", "hidden"}
"""Kinds that are scored but never masked: what a few of them take along is no network that pruning leads through."""


def score(evidence: Evidence, *, most: float = 0.5, passes: int = 1) -> Tensor:
    """Mean |g|, float64 [num_units]; UsageError for a share ``most`` below 0 or above 1."""
    if not 0 <= most <= 1:
        raise UsageError(f"The largest share that masked_taylor masks is {most}; it must be from 0 to 1.")
    workload, rows = evidence.workload, evidence.rows
    random = torch.Generator().manual_seed(evidence.seed)
    maskable = _maskable(workload.structure)
    total = torch.zeros(workload.structure.num_units, dtype=torch.float64)
    done = 0
    for _ in range(passes):
        for batch in batches(rows):
            gates = ones(workload, batch)
            drawn = torch.rand(len(gates), gates.shape[1] + 1, generator=random)  # row by row, whatever the batches
            masked = (drawn[:, 1:] < most * drawn[:, :1]) & maskable
            gates = gates.detach().masked_fill(masked.to(gates.device), 0.0).requires_grad_()
            with frozen(workload.module), torch.enable_grad(), gated(workload.module, workload.structure, gates):
                (gradient,) = torch.autograd.grad(workload.losses(batch, seed=evidence.seed).sum(), gates)
            if not torch.isfinite(gradient).all():
                raise complaint(workload, batch, seed=evidence.seed)
            total += gradient.double().abs().sum(dim=0).cpu()
            done += len(gates)
            if evidence.progress:
                evidence.progress(done, passes * len(rows), "rows")
    return total / max(done, 1)


def _maskable(structure: Structure) -> Tensor:
    """Which units may be masked, bool [num_units]."""
    return torch.cat([torch.full((site.count,), site.kind not in WHOLE) for site in structure.sites])
