"""Inputs: what linear layers are given on calibration rows, and its running moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import UsageError
from ...models.layers import GroupedLinear
from ...models.structure import Site
from ...models.workload import Progress, Workload
from ..score.readers import Moments, Seen

BATCH = 32
TOKENS = 2048
"""Of a batch at most, padding included, so that a layer's inputs take no more memory with long rows than with short."""


def linear_layers(workload: Workload) -> list[str]:
    """The paths of all linear layers in the blocks, whose work is nearly all that a transformer does; where there are
    no blocks, of all."""
    inside = tuple(f"{stack.path}." for stack in workload.structure.stacks) or ("",)
    return [
        name
        for name, child in workload.module.named_modules()
        if type(child) in {nn.Linear, GroupedLinear, Conv1D}
        and name.startswith(inside)
        and child.get_parameter("weight").numel()
    ]


def moments(
    workload: Workload, names: Iterable[str], *, rows: int, seed: int = 0, progress: Progress | None = None
) -> dict[str, Moments]:
    """Mean and Gram matrix of the inputs of each layer in ``names`` over ``rows`` calibration rows, padding left out.

    Memory is one matrix [in, in] in float32 a layer. Raises UsageError where there are no rows.
    """
    found: dict[str, Moments] = {}

    def see(name: str, x: Tensor) -> None:
        if name not in found:
            found[name] = Moments.nothing(x.shape[1], x, gram=True)
        found[name].add(x)

    visit(workload, names, see, rows=rows, seed=seed, progress=progress)
    return found


def visit(
    workload: Workload,
    names: Iterable[str],
    see: Callable[[str, Tensor], None],
    *,
    rows: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> None:
    """Call ``see`` with the name of each layer in ``names`` and its inputs [tokens, in], batch after batch.

    They are those of ``rows`` calibration rows, padding left out. Raises UsageError where there are no rows.
    """
    sample = workload.data.calibration.take(rows, seed)
    if not len(sample):
        raise UsageError(f"What the layers of {workload.name} are given is not known without rows; give --data.")
    seen, handles = Seen(), []
    for name in names:
        hook = _hook(seen, name, site_of(workload, name), see)
        handles.append(workload.module.get_submodule(name).register_forward_pre_hook(hook))
    done = 0
    try:
        with torch.no_grad():
            for batch in sample.batches(BATCH, tokens=TOKENS):
                seen.inputs = batch.inputs
                workload.forward(batch.inputs)
                done += len(batch.rows)
                if progress:
                    progress(done, len(sample), "rows seen")
    finally:
        for handle in handles:
            handle.remove()


def ran(workload: Workload, names: Iterable[str]) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """The answer to the example, and what each of the layers ``names`` makes of it, in the order in which they run and
    every time that they do."""
    made: list[tuple[str, Tensor]] = []
    handles = [
        workload.module.get_submodule(name).register_forward_hook(lambda *seen, name=name: made.append((name, seen[2])))
        for name in names
    ]
    try:
        with torch.no_grad():
            return workload.forward(workload.example), made
    finally:
        for handle in handles:
            handle.remove()


def site_of(workload: Workload, name: str) -> Site:
    """A site of the block that the layer is in, which says how its inputs lie."""
    sites = (site for site in workload.structure.sites if site.block and name.startswith(f"{site.block}."))
    return next(sites, Site("layer", 0, 1))


def _hook(seen: Seen, name: str, site: Site, see: Callable[[str, Tensor], None]) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(name, seen.tokens(name, site, args[0]))

    return hook
