"""Apply a pruning plan to a module, by masking or for good.

:func:`gated` multiplies units by a gate, differentiably: at 0 the unit is masked, at 1 nothing changes, and the
gradient at 1 is what gradient scores are made of. :func:`prune` makes the module really smaller; torch-pruning slices
the parameters. Both give the same outputs for the same plan.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.pruner.function import prune_linear_in_channels, prune_linear_out_channels

from ..plan import PruningPlan
from . import families
from .structure import Site, Structure
from .workload import Workload


def prune(workload: Workload, plan: PruningPlan) -> Workload:
    """A new workload whose module has lost the units of ``plan``; the given one is left as it was.

    ``plan`` is in the numbering of ``workload.module`` as it is now. Raises InputError where it does not fit.
    """
    module = copy.deepcopy(workload.module)
    remove(module, workload.structure, plan)
    family = families.get(workload.structure.family)
    structure = families.structure(module, family, workload.structure.sequence)
    original_layers = workload.structure.num_layers + len(workload.plan.blocks)
    return workload.with_module(module, structure, workload.plan.then(plan, original_layers))


def remove(module: nn.Module, structure: Structure, plan: PruningPlan) -> None:
    """Remove the units of ``plan`` from ``module`` in place; parameters may be on the meta device."""
    structure.check(plan)
    family = families.get(structure.family)
    path, blocks = families.block_list(module, family)
    for kind, layer in plan.sites():
        if kind == "block" or layer in plan.blocks:
            continue
        site = structure.site(kind, layer)
        indices = plan.indices(kind, layer)
        features = [feature for index in indices for feature in site.features(index)]
        for name in site.producers:
            prune_linear_out_channels(module.get_submodule(name), features)
        prune_linear_in_channels(module.get_submodule(site.consumer), features)
        if kind == "head":
            attention: Any = blocks[layer].get_submodule(family.attention)
            heads = site.count - len(indices)
            setattr(attention, family.num_heads, heads)
            setattr(attention, family.all_heads, heads * site.width)
    if plan.blocks:
        kept = nn.ModuleList(block for layer, block in enumerate(blocks) if layer not in plan.blocks)
        module.set_submodule(path, kept)


@contextmanager
def gated(module: nn.Module, structure: Structure, gates: Tensor) -> Iterator[None]:
    """Within the context every unit's contribution is multiplied by its gate.

    ``gates`` has shape [num_units], or [batch, num_units] for a gate of each row's own. A block at gate g returns
    x + g * (block(x) - x).
    """
    handles = []
    for site, place in structure.slices():
        part = gates[..., place]
        if not gates.requires_grad and bool((part == 1).all()):
            continue
        target = module.get_submodule(site.consumer)
        if site.kind == "block":
            handles.append(target.register_forward_hook(_block_hook(part)))
        else:
            handles.append(target.register_forward_pre_hook(_unit_hook(part, site)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def masked(module: nn.Module, structure: Structure, plan: PruningPlan) -> Iterator[None]:
    """Within the context the units of ``plan`` contribute nothing."""
    structure.check(plan)
    parameter = next(module.parameters())
    gates = torch.ones(structure.num_units, dtype=parameter.dtype, device=parameter.device)
    for position, unit in enumerate(structure.units):
        if unit in plan.removed:
            gates[position] = 0
    with gated(module, structure, gates):
        yield


def _unit_hook(gate: Tensor, site: Site) -> Any:
    def multiply(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        features = gate.repeat_interleave(site.width, dim=-1)
        if features.dim() == 2:  # a gate per row: broadcast over the sequence
            features = features.unsqueeze(1)
        return (args[0] * features, *args[1:])

    return multiply


def _block_hook(gate: Tensor) -> Any:
    def interpolate(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        weight = gate if gate.dim() == 1 else gate.unsqueeze(1)
        return args[0] + weight * (output - args[0])

    return interpolate
