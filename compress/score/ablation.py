"""Ablation: the true change of the loss.

What    mean over rows of loss(unit masked) - loss(whole): below zero where the model is better without the unit.
When    To rank heads and blocks, of which there are few, and as what every other score is validated against.
Cost    For each unit a forward pass over the rows, less the blocks before it, whose outputs are kept. No gradients.
Source  Leave-one-out, as in Michel et al. 2019, arXiv 1905.10650, section 3.2
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...models.data import Rows
from ...models.structure import Structure
from ...models.surgery import gated
from ...models.token_merging import MergingBlock
from ...models.workload import Progress, Workload
from .evidence import Evidence, batches

NEEDS = ("rows",)


def score(evidence: Evidence) -> Tensor:
    """The mean change of the loss, float64 [num_units]."""
    workload = evidence.workload
    sets = [(unit,) for unit in range(workload.structure.num_units)]
    return changes(workload, sets, rows=evidence.rows, seed=evidence.seed, progress=evidence.progress).mean(dim=1)


def changes(
    workload: Workload,
    sets: Sequence[Sequence[int]],
    *,
    rows: Rows,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """By how much each row's loss changes when a set of units is masked, float64 [sets, rows].

    A set holds positions in ``structure.units``.
    """
    module, structure = workload.module, workload.structure
    found = torch.zeros(len(sets), len(rows), dtype=torch.float64)
    gates = torch.ones(structure.num_units).to(next(module.parameters()))
    done = 0
    for batch in batches(rows):
        with torch.no_grad():
            with recorded(module, structure) as outputs:
                whole = workload.losses(batch, seed=seed).double()
            for place, units in enumerate(sets):
                mask = gates.index_fill(0, torch.tensor(units, dtype=torch.long, device=gates.device), 0.0)
                with gated(module, structure, mask), skipped(module, before(structure, mask, outputs)):
                    found[place, batch.rows] = (workload.losses(batch, seed=seed).double() - whole).cpu()
                if progress and not place % 16:
                    progress(done + place * len(batch.rows), len(sets) * len(rows), "masked rows")
        done += len(sets) * len(batch.rows)
    return found


@contextmanager
def recorded(module: nn.Module, structure: Structure) -> Iterator[dict[str, Any]]:
    """Yields the output of every block by its path, in the order in which they run.

    It has none of blocks that run twice, and of those that merge tokens, which hand on more than they return.
    """
    outputs: dict[str, Any] = {}
    paths = [f"{stack.path}.{place}" for stack in structure.stacks if not stack.shared for place in range(stack.count)]
    paths = [path for path in paths if not isinstance(module.get_submodule(path), MergingBlock)]

    def keep(path: str) -> Any:
        return lambda _, __, output: outputs.update({path: output})

    with ExitStack() as stack:
        for path in paths:
            stack.callback(module.get_submodule(path).register_forward_hook(keep(path)).remove)
        yield outputs


def before(structure: Structure, mask: Tensor, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``outputs`` that were there before any unit of ``mask`` had a part in them."""
    masked = {site.block for site, place in structure.slices() if bool((mask[place] == 0).any())}
    if not masked <= outputs.keys():
        return {}
    first = min(list(outputs).index(path) for path in masked) if masked else 0
    return dict(list(outputs.items())[:first])


@contextmanager
def skipped(module: nn.Module, outputs: Mapping[str, Any]) -> Iterator[None]:
    """Within the context blocks do not compute but return what they are given in ``outputs``."""
    blocks = {module.get_submodule(path): output for path, output in outputs.items()}
    for block, output in blocks.items():
        block.forward = lambda *_, _output=output, **__: _output
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is there again
