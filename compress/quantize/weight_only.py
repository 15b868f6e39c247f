"""What schemes that round weights alone have in common: what they take outside of the blocks, and the plan."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ...models.layers import matrix, tied
from ...models.workload import Workload
from ...plan import Codes, QuantizationPlan
from . import blocks
from .choice import tables


def outside(workload: Workload, *, head: bool, embeddings: bool, block: int, symmetric: bool) -> dict[str, Codes]:
    """8-bit codes of the linear layers outside of the blocks, with ``head``, and of tables, with ``embeddings``.

    A table that is tied to a layer which stays in float stays so too: its numbers are in the file anyway.
    """
    module = workload.module
    inside = tuple(f"{stack.path}." for stack in workload.structure.stacks)
    found = []
    if head and inside:
        linear = (name for name, child in module.named_modules() if type(child) is nn.Linear)
        found += [name for name in linear if not name.startswith(inside)]
    if embeddings:
        ties = tied(module)
        shared = {*ties, *ties.values()} if not head else set()
        found += [name for name in tables(workload) if f"{name}.weight" not in shared]
    return {
        name: blocks.to_nearest(matrix(module.get_submodule(name)).detach(), bits=8, block=block, symmetric=symmetric)
        for name in found
    }


def plan(scheme: str, workload: Workload, result: Workload, codes: Mapping[str, Codes]) -> QuantizationPlan:
    """The plan of ``codes``, with all else that ``result``, a copy of ``workload``, has otherwise."""
    before, after = workload.module.state_dict(), result.module.state_dict()
    coded = {f"{name}.weight" for name in codes}
    changed = {
        name: tensor for name, tensor in after.items() if name not in coded and not torch.equal(tensor, before[name])
    }
    return QuantizationPlan(
        scheme, {name: f"int{one.bits}" for name, one in codes.items()}, state=changed, codes=dict(codes)
    )
