"""Torch-Pruning, run through its own pruner as its examples prune Hugging Face models.

What    ``BasePruner`` with q, k and v declared as attention heads, whole heads and feed-forward channels removed, the
        classifier left alone (``examples/transformers/prune_hf_bert.py``); with ``width`` the hidden channels go too,
        which is what it does by default. The number of heads is put right by hand afterwards, as the examples do.
Source  Fang et al. 2023, "DepGraph", arXiv 2301.12900; Fang et al. 2024, "Isomorphic Pruning", arXiv 2407.04616
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from edgepress.models import families, hidden, mapping
from edgepress.models.counts import CONVOLUTIONS
from edgepress.models.structure import Structure
from edgepress.models.workload import Workload, answer
from edgepress.plan import PruningPlan, Unit
from torch import Tensor, nn

IMPORTANCES: dict[str, Callable[[], Any]] = {
    "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "taylor": tp.importance.GroupTaylorImportance,
    "hessian": tp.importance.GroupHessianImportance,
}
SPREADS = ("local", "global", "isomorphic")
"""Whether units are ranked in their own layer, over all layers, or over layers of the same shape of group."""
ROUND_TO = 16
"""As edgepress rounds; only where every layer is many times as wide."""
BATCH = 32

Gradients = dict[str, Tensor]


def gradients(workload: Workload, importance: str) -> Gradients:
    """What ``importance`` reads from ``parameter.grad``, by parameter, over all calibration rows.

    Taylor takes the gradient of the loss, Hessian the mean of the squared gradients of the rows: that mean is handed
    over ready, for ``accumulate_grad`` of release 1.6.1 looks for a name among parameters and so keeps the last row.
    """
    parameters = dict(workload.module.named_parameters())
    sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    if importance == "magnitude":
        return {}
    rows = workload.data.calibration
    for batch in rows.batches(BATCH):
        for part in batch.one_by_one() if importance == "hessian" else (batch,):
            loss = workload.losses(part).sum()
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    sums[name] += (gradient.square() if importance == "hessian" else gradient) / len(rows)
    return sums


def prune(
    workload: Workload,
    grads: Gradients,
    *,
    importance: str,
    spread: str,
    heads: float,
    channels: float,
    width: bool = False,
) -> Workload:
    """``workload`` without the share ``heads`` of its heads and ``channels`` of its channels, as Torch-Pruning cuts it.

    ``grads`` is what :func:`gradients` gave for ``importance``.
    """
    module = copy.deepcopy(workload.module)
    for name, parameter in module.named_parameters():
        parameter.grad = grads[name].clone() if name in grads else None
    structure = workload.structure
    pruner = tp.pruner.BasePruner(
        module,
        dict(workload.example),
        importance=IMPORTANCES[importance](),
        global_pruning=spread != "local",
        isomorphic=spread == "isomorphic",
        pruning_ratio=channels,
        head_pruning_ratio=heads,
        num_heads=_attention(module, structure),
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=_ignored(module, structure, width),
        round_to=_round_to(structure),
        output_transform=answer,
        in_channel_groups={},  # the defaults are dictionaries that all pruners of a process share
        out_channel_groups={},
    )
    removed: set[Unit] = set()
    for group in pruner.step(interactive=True):
        removed |= _units(pruner, group, structure)
        group.prune()
    module.zero_grad(set_to_none=True)
    family = families.get(structure.family)
    mapping.settle(module, family, structure, PruningPlan())
    plan = workload.plan.then(PruningPlan.of(removed), structure.num_layers + len(workload.plan.blocks))
    return workload.with_module(module, mapping.structure(module, family, workload.example, structure), plan)


def _attention(module: nn.Module, structure: Structure) -> dict[nn.Module, int]:
    """The number of heads of every projection that has one part a head."""
    return {
        module.get_submodule(cut.layer): site.count
        for site in structure.of_kind("head")
        for cut in site.cuts
        if cut.side == "out"
    }


def _ignored(module: nn.Module, structure: Structure, width: bool) -> list[nn.Module]:
    """Every layer whose outputs stay: a classifier's, a pooler's and, without ``width``, the residual stream's."""
    makers = {
        cut.layer
        for site in structure.sites
        if site.kind != hidden.KIND or width
        for cut in site.cuts
        if cut.side == "out" and "pooler" not in cut.layer
    }
    layers = (nn.Linear, *CONVOLUTIONS)
    return [child for name, child in module.named_modules() if isinstance(child, layers) and name not in makers]


def _round_to(structure: Structure) -> int | None:
    widths = [site.count for site in structure.sites if site.kind in {"ffn", "channel", hidden.KIND}]
    return ROUND_TO if min(widths, default=0) >= 8 * ROUND_TO else None


def _units(pruner: Any, group: Any, structure: Structure) -> set[Unit]:
    """The units that ``group`` removes, read off a layer that makes them."""
    names = {child: name for name, child in pruner.model.named_modules()}
    lost = {
        names[dep.target.module]: indices
        for dep, indices in group
        if dep.target.module in names and pruner.DG.is_out_channel_pruning_fn(dep.handler)
    }
    units: set[Unit] = set()
    for site in structure.sites:
        cut = next((cut for cut in site.cuts if cut.side == "out" and cut.layer in lost), None)
        if cut is not None:
            inside = [index // cut.width for index in lost[cut.layer] if index < site.count * cut.width]
            units |= {Unit(site.kind, site.layer, index) for index in inside}
    return units
