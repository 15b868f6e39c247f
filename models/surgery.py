"""Apply a pruning plan to a module, by masking or for good.

:func:`gated` multiplies units by a gate, differentiably: at 0 the unit is masked, at 1 nothing changes, and the
gradient at 1 is what gradient scores are made of. :func:`prune` makes the module really smaller; torch-pruning slices
the parameters. Both give the same outputs for the same plan.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..plan import PruningPlan
from . import families, hidden, mapping
from .counts import CONVOLUTIONS
from .layers import drop, in_features, tie, tied
from .memory import give_back
from .structure import Structure
from .token_merging import MergingBlock
from .workload import Workload

TOLERANCE = 1e-3
"""Largest difference of the answers of a masked and a cut model, in units of the largest answer, in float32."""


def prune(workload: Workload, plan: PruningPlan, *, in_place: bool = False) -> Workload:
    """A new workload whose module has lost the units of ``plan``; the given one is left as it was.

    With ``in_place`` the given module itself is cut, layer after layer, so that a model of more than half of the memory
    can be pruned; the given workload is then of no use any more. ``plan`` is in the numbering of ``workload.module`` as
    it is now. Raises InputError where it does not fit.
    """
    wanted = _masked_answer(workload, plan)
    module = workload.module if in_place else copy.deepcopy(workload.module)
    remove(module, workload.structure, plan)
    give_back()  # what has gone lies between what stays
    if wanted is not None:
        _prove(module, workload, wanted)
    family = families.get(workload.structure.family)
    structure = mapping.structure(module, family, workload.example, workload.structure)
    original_layers = workload.structure.num_layers + len(workload.plan.blocks)
    whole = workload.plan.then(workload.structure.closed(plan), original_layers)
    return workload.with_module(module, structure, whole)


def _masked_answer(workload: Workload, plan: PruningPlan) -> Tensor | None:
    """What the masked module answers to the example, where the plan takes hidden channels; else None."""
    if not plan.indices(hidden.KIND, hidden.LAYER):
        return None
    with torch.no_grad(), masked(workload.module, workload.structure, plan):
        return workload.forward(workload.example)


def _prove(module: nn.Module, workload: Workload, wanted: Tensor) -> None:
    """Raise InputError where the smaller module answers otherwise: a head may use the stream in a way of its own."""
    try:
        with torch.no_grad():
            found = workload.with_module(module, workload.structure, workload.plan).forward(workload.example)
        error = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
    except (RuntimeError, IndexError) as problem:
        raise InputError(f"Hidden channels cannot be taken out of {workload.name}: {problem}.") from problem
    if error > TOLERANCE:
        raise InputError(
            f"Hidden channels cannot be taken out of {workload.name}: the smaller model is {error:.1e} away from the "
            f"masked one; at most {TOLERANCE:g} is rounding."
        )


def remove(module: nn.Module, structure: Structure, plan: PruningPlan) -> None:
    """Remove the units of ``plan`` from ``module`` in place; parameters may be on the meta device."""
    plan = structure.closed(plan)
    structure.check(plan)
    family = families.get(structure.family)
    going: dict[tuple[str, str], set[int]] = {}  # gathered first: two sites may share a layer's features
    for kind, layer in plan.sites():
        if kind == "block" or (layer in plan.blocks and kind != hidden.KIND):
            continue
        for cut in structure.site(kind, layer).cuts:
            going.setdefault((cut.layer, cut.side), set()).update(cut.features(plan.indices(kind, layer)))
    ties = tied(module)
    for (name, side), features in going.items():
        drop(module, name, side, sorted(features))
    tie(module, ties)
    mapping.settle(module, family, structure, plan)
    mapping.drop_blocks(module, family, plan)


@contextmanager
def gated(module: nn.Module, structure: Structure, gates: Tensor) -> Iterator[None]:
    """Within the context every unit's contribution is multiplied by its gate.

    ``gates`` has shape [num_units], or [batch, num_units] for a gate of each row's own, and may be of a finer type than
    the module. A block at gate g returns x + g * (block(x) - x).
    """
    handles: list[Any] = []
    for site, place in structure.slices():
        part = gates[..., place]
        if not gates.requires_grad and bool((part == 1).all()):
            continue
        if site.kind == hidden.KIND:
            handles += hidden.hooks(module, site, part, partial(by_row, row_axis=site.row_axis))
            continue
        if site.kind == "block":
            handles.append(module.get_submodule(site.block).register_forward_hook(_block_hook(part, site.row_axis)))
        for cut in site.gates:
            layer = module.get_submodule(cut.layer)
            multiplier = site.multiplier(part, cut, in_features(layer))
            handles.append(layer.register_forward_pre_hook(_unit_hook(multiplier, site.row_axis)))
            block = module.get_submodule(site.block)
            if site.kind == "head" and isinstance(block, MergingBlock):
                handles.append(block.merging.register_forward_pre_hook(_keys_hook(multiplier)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def masked(module: nn.Module, structure: Structure, plan: PruningPlan) -> Iterator[None]:
    """Within the context the units of ``plan`` contribute nothing."""
    plan = structure.closed(plan)
    structure.check(plan)
    parameter = next(module.parameters())
    gates = torch.ones(structure.num_units, dtype=parameter.dtype, device=parameter.device)
    for position, unit in enumerate(structure.units):
        if unit in plan.removed:
            gates[position] = 0
    with gated(module, structure, gates):
        yield


def _unit_hook(multiplier: Tensor, row_axis: int) -> Any:
    def multiply(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if isinstance(layer, CONVOLUTIONS):  # channels come before the positions
            gate = multiplier.reshape(*multiplier.shape, *[1] * (args[0].dim() - 2))
        else:
            gate = by_row(multiplier, args[0], row_axis)
        return ((args[0] * gate).to(args[0].dtype), *args[1:])

    return multiply


def _keys_hook(multiplier: Tensor) -> Any:
    """A masked head has no say in which tokens are alike."""

    def multiply(_: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return args[0], (args[1] * by_row(multiplier, args[1], 0)).to(args[1].dtype)

    return multiply


def _block_hook(gate: Tensor, row_axis: int) -> Any:
    def interpolate(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        made = output[0] if isinstance(output, tuple) else output
        mixed = (args[0] + by_row(gate, made, row_axis) * (made - args[0])).to(made.dtype)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    return interpolate


def by_row(gate: Tensor, values: Tensor, row_axis: int) -> Tensor:
    """``gate`` [features] or [batch, features], shaped to multiply ``values`` [batch, …, features].

    ``row_axis`` says which axis of ``values`` the batch is. Where a row comes as several (the windows of an image),
    each has its row's gate.
    """
    if gate.dim() == 1:
        return gate
    if values.shape[row_axis] != gate.shape[0]:
        gate = gate.repeat_interleave(values.shape[row_axis] // gate.shape[0], dim=0)
    shape = [1] * values.dim()
    shape[row_axis], shape[-1] = gate.shape
    return gate.reshape(shape)
