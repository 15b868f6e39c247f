"""Kwon et al. 2022, the fast post-training pruning framework, re-implemented from the paper and its code.

What    1. the diagonal Fisher information of head and channel masks, from the gradients of labelled rows;
        2. of all masks within a budget those with the most of it: for every number of heads, the channels that the rest
           pays for (algorithm 1); the budget counts MACs, or a latency that is linear in heads and channels;
        3. within each layer, swaps under the block-diagonal Fisher matrix (algorithm 2, as ``prune/rearrange.py``);
        4. layer after layer, a factor for each unit left, by damped least squares (LSMR with a damping of 1 from masks
           of one; a factor beyond 10 ends it, as ``prune/rescale.py``).
        The masks are then made real: units go, and the factors are folded into the columns that read the units.
Here    One head stays in every layer, as in their search by latency. Gradients are by row, as the paper defines them,
        where the code takes a batch of 32 for one. The model to come close to is the unpruned one, as in the paper, or
        one pruned to the root of the budget, as in the code.
Source  arXiv 2204.09656, sections 4.1 to 4.3; github.com/WoosukKwon/retraining-free-pruning
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from edgepress.compress.score.evidence import gather
from edgepress.models import surgery
from edgepress.models.layers import matrix
from edgepress.models.structure import Site, Structure
from edgepress.models.workload import Workload
from edgepress.plan import PruningPlan
from scipy.sparse.linalg import lsmr
from torch import Tensor, nn

KINDS = ("head", "ffn")
DAMP = 1.0
LARGEST_FACTOR = 10.0
BATCH = 32

Costs = Mapping[str, float]
"""What one unit of each of ``KINDS`` costs: MACs, or milliseconds."""


def gradients(workload: Workload, *, seed: int = 0) -> Tensor:
    """The gradient of each calibration row's loss in every mask, at masks of one: float64 [rows, num_units]."""
    evidence = gather(workload, {"gates_by_row"}, rows=workload.data.calibration, seed=seed)
    return evidence.gradients.by_row.double()


def macs(structure: Structure) -> dict[str, float]:
    return {kind: float(structure.of_kind(kind)[0].macs) for kind in KINDS}


def plan(structure: Structure, by_row: Tensor, costs: Costs, share: float) -> PruningPlan:
    """Steps 1 to 3: what goes so that the heads and channels left cost at most 1 - ``share`` of all."""
    whole = sum(costs[kind] * site.count for kind in KINDS for site in structure.of_kind(kind))
    masks = rearrange(structure, search(structure, by_row.square().sum(dim=0), costs, (1 - share) * whole), by_row)
    return PruningPlan.of(
        unit for unit, stays in zip(structure.units, masks.tolist(), strict=True) if not stays and unit.kind in KINDS
    )


def search(structure: Structure, fisher: Tensor, costs: Costs, budget: float) -> Tensor:
    """The masks, bool [num_units], of most ``fisher`` information that cost no more than ``budget``.

    Where the budget does not pay for one head in each layer, these stay all the same.
    """
    masks = torch.ones(structure.num_units, dtype=torch.bool)
    of_kind = {kind: torch.zeros_like(masks) for kind in KINDS}
    base = torch.zeros_like(masks)
    for site, place in structure.slices():
        if site.kind in KINDS:
            of_kind[site.kind][place] = True
        if site.kind == "head":
            base[place.start + int(fisher[place].argmax())] = True
    heads, channels = (
        torch.nonzero(of_kind[kind] & ~base).flatten()[fisher[of_kind[kind] & ~base].argsort(descending=True)]
        for kind in KINDS
    )
    sums = [nn.functional.pad(fisher[order].cumsum(0), (1, 0)) for order in (heads, channels)]
    left = budget - costs["head"] * int(base.sum())
    best, chosen = -1.0, (0, 0)
    for number in range(len(heads) + 1):
        paid = min(math.floor((left - costs["head"] * number) / costs["ffn"] + 1e-9), len(channels))
        if number and paid < 0:
            break
        found = float(sums[0][number] + sums[1][max(paid, 0)])
        if found > best:
            best, chosen = found, (number, max(paid, 0))
    masks[heads[chosen[0] :]] = False
    masks[channels[chosen[1] :]] = False
    return masks


def rearrange(structure: Structure, masks: Tensor, by_row: Tensor) -> Tensor:
    """``masks`` with as many units in each layer, those masked such that their gradients' sums are least: in the order
    of their own information each other unit joins them, and the one leaves without which the sum is shortest."""
    result = masks.clone()
    for site, place in structure.slices():
        pruned = int((~masks[place]).sum())
        if site.kind not in KINDS or pruned in {0, site.count}:
            continue
        gram = by_row[:, place].T @ by_row[:, place]
        order = gram.diagonal().argsort(stable=True).tolist()
        group = order[:pruned]
        beside = gram[:, group].sum(dim=1)  # of each unit with all of the group
        for unit in order[pruned:]:
            group.append(unit)
            beside += gram[:, unit]
            gain = 2 * beside[group] - gram.diagonal()[group]  # by which the square gets less as one leaves
            leaves = group.pop(int(gain.argmax()))
            beside -= gram[:, leaves]
        result[place] = True
        result[place.start + torch.tensor(group)] = False
    return result


def tune(teacher: Workload, pruned: Workload) -> Workload:
    """Step 4: a copy of ``pruned`` whose units have factors that bring every layer's sum close to ``teacher``'s.

    ``teacher`` has the blocks of ``pruned``. The rows are ``pruned``'s calibration rows.
    """
    result = surgery.prune(pruned, PruningPlan())
    first_only = _reads_first_token(pruned)
    last = result.structure.num_layers - 1
    with torch.no_grad():
        for site, _ in result.structure.slices():
            if site.kind not in KINDS:
                continue
            only = first_only and site.kind == "ffn" and site.layer == last
            normal, target = equations(teacher, result, site, only_first_token=only)
            found = factors(normal, target)
            if found.abs().max() > LARGEST_FACTOR:
                break
            fold(result, site, found)
    return result


def _reads_first_token(workload: Workload) -> bool:
    """Whether the classifier sees nothing but the first token, as in BERT and ViT but not after pooling."""
    return workload.skeleton.architecture.endswith("ForSequenceClassification") or workload.skeleton.architecture in {
        "ViTForImageClassification",
        "DeiTForImageClassification",
    }


def equations(
    teacher: Workload, pruned: Workload, site: Site, *, only_first_token: bool = False
) -> tuple[Tensor, Tensor]:
    """The normal equations A r = b, [count, count] and [count], of the factors r of the units of ``site``.

    With x_u what unit u makes, W_u the consumer's columns that read it, and y the part of the teacher's residual sum
    that the units have to make up: A[u, v] = sum (W_u x_u) . (W_v x_v) and b[u] = sum (W_u x_u) . y over tokens.
    """
    consumer: Any = pruned.module.get_submodule(site.consumer)
    weights = matrix(consumer).double()
    gram = torch.zeros(weights.shape[1], weights.shape[1], dtype=torch.float64)
    cross = torch.zeros_like(weights)
    scale = pruned.module.get_parameter(site.scaled_by) if site.scaled_by else 1.0
    then = teacher.structure.site(site.kind, site.layer)
    for batch in pruned.data.calibration.batches(BATCH):
        wanted = _at(teacher, then, batch.inputs)[1]
        inputs, found = _at(pruned, site, batch.inputs)
        real = torch.ones(inputs.shape[:-1], dtype=torch.bool)
        mask = batch.inputs.get("attention_mask")
        if mask is not None:
            real &= mask.bool()
        if only_first_token:
            real[:, 1:] = False
        x = inputs[real].double()
        missing = ((wanted - found) / scale)[real].double() + x @ weights.T
        gram += x.T @ x
        cross += missing.T @ x
    member = _membership(site, weights.shape[1])
    return member @ (weights.T @ weights * gram) @ member.T, member @ (weights * cross).sum(dim=0)


def factors(normal: Tensor, target: Tensor) -> Tensor:
    """The solution of ``normal`` r = ``target`` near r = 1, float64 [count]."""
    if len(target) == 1:
        return target / normal[0]
    residual = target - normal.sum(dim=1)
    solution = lsmr(normal.numpy(), residual.numpy(), damp=DAMP, maxiter=100 * len(target))[0]
    return 1 + torch.from_numpy(np.asarray(solution))


def fold(pruned: Workload, site: Site, found: Tensor) -> None:
    """Multiply the columns that read the units of ``site`` by their factors."""
    weights = matrix(pruned.module.get_submodule(site.consumer))
    member = _membership(site, weights.shape[1])
    weights.mul_((found @ member).to(weights.dtype))


def _membership(site: Site, width: int) -> Tensor:
    """[count, width]: 1 where a unit owns a feature of the consumer's input."""
    member = torch.zeros(site.count, width, dtype=torch.float64)
    for index in range(site.count):
        member[index, site.gates[0].features([index])] = 1
    return member


class _Enough(Exception):  # noqa: N818 - not an error: it ends a forward pass once what it was run for has been seen
    pass


def _at(workload: Workload, site: Site, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The input of the site's consumer and the residual sum after it, each [batch, tokens, features]."""
    seen: dict[str, Tensor] = {}

    def consumer_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["features"] = args[0]

    def next_input(_: nn.Module, args: tuple[Tensor, ...]) -> Any:
        seen["sum"] = args[0]
        raise _Enough

    def block_output(_: nn.Module, __: Any, output: Any) -> Any:
        seen["sum"] = output[0] if isinstance(output, tuple) else output
        raise _Enough

    first = workload.module.get_submodule(site.consumer).register_forward_pre_hook(consumer_input)
    if site.sum_at:
        second = workload.module.get_submodule(site.sum_at).register_forward_pre_hook(next_input)
    else:
        second = workload.module.get_submodule(site.block).register_forward_hook(block_output)
    try:
        workload.forward(inputs)
    except _Enough:
        pass
    finally:
        first.remove()
        second.remove()
    return seen["features"], seen["sum"]
