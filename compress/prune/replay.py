"""Replay: a model's rows run up to one layer after another, without computing again the blocks that are done with.

Of every batch what the furthest finished block of each stack has put out is kept. In the next pass that block returns
it at once, and so do those before it, whose outputs nobody looks at. Layers visited in the order of the blocks then
cost each block a few times, however deep the model is; from the start, the n-th would cost n blocks.

They wait in a temporary file (:mod:`.spill`): of 512 rows they may be larger than the model.

Not every model can be replayed: a block may read what an earlier one has left in a cache, or a head may read states
from midway. It is tried on the workload's example, one row, at every block: where the answer is not the same to the
last bit, all passes run from the start. So do those of batches whose states do not fit: into the room of the
parameters, or on the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...models.data import Batch
from ...models.structure import Site, Structure
from ...models.workload import Workload
from ..score.ablation import recorded, skipped
from ..score.readers import first
from .spill import Spill, Spilled

Found = TypeVar("Found")


class Replay:
    """Batches of one workload, and what its finished blocks have made of each.

    Weights may change between two passes, but only in the block last visited and in what runs after it. Where all stay
    (``fixed``), the last look into a block is done with it.
    """

    def __init__(self, workload: Workload, batches: Sequence[Batch], *, fixed: bool = False) -> None:
        self.workload, self.batches, self.fixed = workload, batches, fixed
        self.blocks = _replayable(workload)
        self.spill = Spill()
        self.done: list[dict[str, Any]] = [{} for _ in batches]
        """Of each batch what every finished block is to return, by path, its tensors spilled."""
        self.numbers = [0 for _ in batches]
        """How many numbers that is."""

    def at(self, site: Site, number: int) -> list[tuple[Tensor, Tensor]]:
        """Of batch ``number`` the input of the site's consumer and the residual sum after it, each [batch, sequence,
        features]: once, or every time that a shared block runs."""
        last = self.fixed and site == [one for one in self.workload.structure.sites if consumed(one, site.block)][-1]
        return self.through(
            site.block, number, lambda inputs: _seen(self.workload, site, inputs, whole=last), last=last
        )

    def through(
        self, block: str, number: int, look: Callable[[Mapping[str, Tensor]], Found], *, last: bool = False
    ) -> Found:
        """What ``look`` returns, which runs the model on the inputs of batch ``number`` into ``block`` or further.

        What it changes for its run, a mask or a weight, must be in that block. The ``last`` visit of a block is done
        with it, where it has run to its end.
        """
        module, structure = self.workload.module, self.workload.structure
        known = not block or block in self.blocks
        # otherwise the visits are not in the order in which the blocks run, or from the start
        follows = known and block not in self.done[number]
        early = _each(Spilled, self.spill.read, self.done[number]) if follows else {}
        with torch.no_grad(), skipped(module, early), recorded(module, structure) as made:
            found = look(self.batches[number].inputs)
        paths = [path for path in made if known and path in self.blocks]
        ended = block not in paths  # a look may end within the block
        before = paths if ended or last else paths[: paths.index(block)]
        done = _furthest(structure, {path: made[path] for path in before})
        if done.keys() != self.done[number].keys():  # the same blocks have the same states: they are finished
            self._keep(number, done)
        return found

    def _keep(self, number: int, outputs: Mapping[str, Any]) -> None:
        """``outputs`` of batch ``number`` in place of those that are kept, or none where they do not fit."""
        _each(Spilled, self.spill.free, self.done[number])
        self.done[number], self.numbers[number] = {}, 0
        if sum(self.numbers) + _numbers(outputs) > self.workload.params:
            return
        put: list[Spilled] = []

        def keep(state: Tensor) -> Spilled:
            put.append(self.spill.put(state))
            return put[-1]

        try:
            self.done[number] = _each(Tensor, keep, outputs)
            self.numbers[number] = _numbers(outputs)
        except OSError:
            for spilled in put:
                self.spill.free(spilled)


def _replayable(workload: Workload) -> frozenset[str]:
    """The blocks that may return what they did before, whichever they are, without the answer to the example changing:
    all that are :func:`.recorded`, or none."""
    module, structure = workload.module, workload.structure
    with torch.no_grad(), recorded(module, structure) as made:
        wanted = workload.forward(workload.example)
    order = list(made)
    for last in range(1, len(order)):
        early = _furthest(structure, {path: made[path] for path in order[:last]})
        with torch.no_grad(), skipped(module, early):
            if not torch.equal(workload.forward(workload.example), wanted):
                return frozenset()
    return frozenset(order)


def _furthest(structure: Structure, made: Mapping[str, Any]) -> dict[str, Any]:
    """What each block of ``made``, in the order in which they ran, is to return: its stack's last output."""
    stack_of = {f"{stack.path}.{place}": stack.path for stack in structure.stacks for place in range(stack.count)}
    last = {stack_of[path]: output for path, output in made.items()}
    return {path: last[stack_of[path]] for path in made}


def _each(kind: type, change: Callable[[Any], Any], outputs: Mapping[str, Any]) -> dict[str, Any]:
    """What blocks return, ``outputs`` by path, with all of a ``kind`` in it changed; what several paths share they
    share still."""
    apart = {id(output): output for output in outputs.values()}
    found = {own: _changed(kind, change, output) for own, output in apart.items()}
    return {path: found[id(output)] for path, output in outputs.items()}


def _changed(kind: type, change: Callable[[Any], Any], output: Any) -> Any:
    if type(output) is tuple:
        return tuple(_changed(kind, change, part) for part in output)
    return change(output) if isinstance(output, kind) else output


def _numbers(outputs: Mapping[str, Any]) -> int:
    """The numbers in the states that blocks are to return, each tensor counted once."""
    found: dict[int, Tensor] = {id(output): first(output) for output in outputs.values()}
    return sum(state.numel() for state in found.values())


class Enough(Exception):  # noqa: N818 - not an error: it ends a forward pass once what it was run for has been seen
    pass


def consumed(site: Site, block: str = "") -> bool:
    """Whether the units of ``site`` have a consumer in a block (in this one) that is solved for them."""
    return bool(site.block) and site.kind not in {"block", "kv"} and block in {"", site.block}


def _seen(
    workload: Workload, site: Site, inputs: Mapping[str, Tensor], *, whole: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """The consumer's input and the residual sum after it; the pass ends there, or at the end of the ``whole`` block,
    unless the block is shared."""
    shared = any(stack.shared and site.layer in stack.layers for stack in workload.structure.stacks)
    features: list[Tensor] = []
    sums: list[Tensor] = []

    def consumer_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        features.append(args[0])

    def keep(stream: Tensor) -> None:
        sums.append(stream)
        if not (shared or whole):
            raise Enough

    def next_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        keep(args[0])

    def block_output(_: nn.Module, __: Any, output: Any) -> None:
        if not site.sum_at:
            keep(first(output))
        if whole and not shared:
            raise Enough

    handles = [workload.module.get_submodule(site.consumer).register_forward_pre_hook(consumer_input)]
    handles.append(workload.module.get_submodule(site.block).register_forward_hook(block_output))
    if site.sum_at:
        handles.append(workload.module.get_submodule(site.sum_at).register_forward_pre_hook(next_input))
    try:
        workload.forward(inputs)
    except Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return list(zip(features, sums, strict=True))
