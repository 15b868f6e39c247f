"""Low-rank factorisation: a linear layer becomes two, through fewer features than either side has.

What    W [out, in] is replaced by U V of rank r, the one that changes the layer's outputs on calibration rows the
        least; the bias makes up for the mean of the change. A rank is used only where it leaves fewer weights:
        r < in * out / (in + out).
When    Layers whose outputs lie in few directions. Heads and channels can be cut before or after.
Cost    One pass over the rows; for each layer a Gram matrix [in, in] in memory and an eigendecomposition [out, out].
Source  Activation-aware truncation of SVD-LLM, Wang et al. 2024 (arXiv 2403.07378), and ASVD, Yuan et al. 2023
        (arXiv 2312.05821); Eckart and Young 1936 for the optimum

Derivation. With inputs x of mean m, the change of the outputs is E|(W - M) x + b - b'|². It is least in b' for
b' = b + (W - M) m, and then is tr((W - M) C (W - M)ᵀ) = |W S - M S|² with C = S Sᵀ the covariance of x (E[x xᵀ] where
the layer has no bias). Of all M of rank r that is least where M S is the truncated SVD of W S (Eckart-Young), which is
U Uᵀ W S with U the first r left singular vectors. So M = U (Uᵀ W), with no inverse of S: U holds the leading
eigenvectors of W C Wᵀ, the covariance of the layer's own outputs, and the change is the sum of the eigenvalues that
are left out. U has orthonormal columns, so an error in what ``down`` makes is as large as the error in the outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import UsageError
from ...models import families, mapping
from ...models.counts import observe
from ...models.layers import matrix
from ...models.low_rank import LowRank, check, pays
from ...models.workload import Progress, Workload
from ..score.readers import Moments
from .inputs import linear_layers, moments

RIDGE = 1e-6
"""Added to C, in units of its mean diagonal: directions that the rows never take are ordered by the weights."""


@dataclass(frozen=True)
class Curve:
    """What a layer loses, holds and computes at every rank that pays, and whole.

    The arrays have an entry for each of ``ranks``, ascending; the last is the whole layer, whose rank is the smaller of
    its sides and whose error is 0.
    """

    name: str
    ranks: NDArray[np.int64]
    errors: NDArray[np.float64]
    """E|y - y'|² over that of y about its mean: the share of the outputs that is lost."""
    params: NDArray[np.int64]
    macs: NDArray[np.int64]
    """For the workload's example."""


def errors(
    workload: Workload,
    names: Sequence[str] | None = None,
    *,
    rows: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Curve]:
    """The curve of each layer in ``names``, by default of every linear layer in the blocks at which a rank pays."""
    module = workload.module
    wanted = linear_layers(workload) if names is None else list(names)
    wanted = [name for name in wanted if pays(module.get_submodule(name))]
    check(module, workload.structure, dict.fromkeys(wanted, 1))
    seen = moments(workload, wanted, rows=rows, seed=seed, progress=progress)
    calls = observe(module, workload.example)
    found = []
    for name in wanted:
        layer = module.get_submodule(name)
        weight = matrix(layer).detach().double()
        lost = _directions(weight, seen[name].covariance(centred=layer.bias is not None))[1]
        ranks = np.arange(1, pays(layer) + 1)
        tokens = sum(int(np.prod(given[:-1])) for given, _ in calls.get(name, []))
        sizes = np.append(ranks * sum(weight.shape), weight.numel())
        shares = (lost / lost[0].clamp(min=torch.finfo(lost.dtype).tiny)).numpy()
        found.append(
            Curve(
                name,
                np.append(ranks, min(weight.shape)),
                np.append(shares[1 : len(ranks) + 1], 0.0),
                sizes + (0 if layer.bias is None else len(weight)),
                sizes * tokens,
            )
        )
    return found


def allocate(curves: Sequence[Curve], keep: float, *, what: str = "params") -> dict[str, int]:
    """The ranks at which layers keep the share ``keep`` of their ``what`` ("params" or "macs") and lose the least in
    all; layers that stay whole are not named.

    Each curve's lower convex hull is walked down, the step that loses least for what it saves first: no choice of
    ranks that is as small loses less, but for the last step. UsageError where even rank 1 keeps more.
    """
    costs = {curve.name: np.asarray(getattr(curve, what), dtype=np.float64) for curve in curves}
    goal = keep * sum(cost[-1] for cost in costs.values())
    least = sum(cost[0] for cost in costs.values())
    if not 0 < keep <= 1 or least > goal:
        raise UsageError(
            f"A share of {keep:g} of the {what} cannot be kept: it must be at most 1, and at rank 1 "
            f"{least / max(goal / max(keep, 1e-9), 1):.3f} is left."
        )
    steps = []
    for place, curve in enumerate(curves):
        hull = _hull(costs[curve.name], curve.errors)
        for small, large in pairwise(hull):
            saved = costs[curve.name][large] - costs[curve.name][small]
            steps.append(((curve.errors[small] - curve.errors[large]) / saved, place, small, saved))
    chosen = [len(curve.ranks) - 1 for curve in curves]
    total = sum(cost[-1] for cost in costs.values())
    for _, place, small, saved in sorted(steps):
        if total <= goal:
            break
        chosen[place], total = small, total - saved
    return {
        curve.name: int(curve.ranks[place])
        for curve, place in zip(curves, chosen, strict=True)
        if place < len(curve.ranks) - 1
    }


def _hull(cost: NDArray[np.float64], loss: NDArray[np.float64]) -> list[int]:
    """The places on the lower convex hull of (cost, loss), cost ascending."""
    hull: list[int] = []
    for place in range(len(cost)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (loss[b] - loss[a]) * (cost[place] - cost[a]) < (loss[place] - loss[a]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(place)
    return hull


def factorise(
    workload: Workload,
    ranks: Mapping[str, int],
    *,
    rows: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> Workload:
    """A copy of ``workload`` with each layer in ``ranks``, by path, factored at its rank.

    Raises InputError for a layer that cannot be factored or a rank that does not pay, UsageError without rows.
    """
    check(workload.module, workload.structure, ranks)
    seen = moments(workload, ranks, rows=rows, seed=seed, progress=progress) if ranks else {}
    module = copy.deepcopy(workload.module)
    for name, rank in ranks.items():
        layer = module.get_submodule(name)
        factored = LowRank.empty(layer, rank)
        bias = layer.get_parameter("bias").detach().double() if layer.bias is not None else None
        fit(factored, matrix(layer).detach().double(), bias, seen[name])
        module.set_submodule(name, factored)
    family = families.get(workload.structure.family)
    return workload.with_module(module, mapping.structure(module, family, workload.example), workload.plan)


def fit(factored: LowRank, weight: Tensor, bias: Tensor | None, seen: Moments) -> None:
    """Give ``factored`` the weights and the bias with which it comes nearest to ``weight`` x + ``bias`` on inputs with
    the moments ``seen``; ``weight`` [out, in] and ``bias`` [out] are float64."""
    basis = _directions(weight, seen.covariance(centred=bias is not None))[0][:, : factored.rank]
    down = basis.T @ weight
    with torch.no_grad():
        factored.up.weight.copy_(basis)
        factored.down.weight.copy_(down)
        if bias is not None:
            factored.bias.copy_(bias + (weight - basis @ down) @ seen.mean.double())


def _directions(weight: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """The directions of the outputs, the strongest first, as columns [out, out]; and the error E|y - y'|² with the
    first k of them kept, [out + 1], k from 0."""
    ridge = RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    _, vectors = torch.linalg.eigh(weight @ (moment + ridge) @ weight.T)
    vectors = vectors.flip(1)
    strength = ((vectors.T @ weight) @ moment * (vectors.T @ weight)).sum(dim=1).clamp(min=0)
    left = torch.cat([strength, strength.new_zeros(1)]).flip(0).cumsum(0).flip(0)
    return vectors, left
