"""Sequential calibration: what layers are given once those before them have been quantized.

Layers are visited in the order in which they run, those that read the same tensor together. What stands before them is
as the caller has left it, so an error that has been made is seen by what can still make up for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from ...errors import UsageError
from ...models.workload import Progress, Workload
from ..prune.inputs import BATCH, site_of
from ..prune.replay import Enough, Replay
from ..score.readers import Moments, Seen
from .fold import Input


def calibrated(
    workload: Workload, tensors: Sequence[Input], *, rows: int, seed: int = 0, progress: Progress | None = None
) -> Iterator[tuple[Input, Moments]]:
    """Each of ``tensors``, in the order of :func:`.fold.inputs`, with its moments over ``rows`` calibration rows.

    Before the next is asked for, the weights of what reads the tensor, of their block and of what runs after it may be
    changed. A pass runs one block, so all of them cost the model's blocks times the tensors of a block. Memory is one
    Gram matrix [in, in]; the rows' hidden states wait in a temporary file. Raises UsageError where there are no rows.
    """
    sample = workload.data.calibration.take(rows, seed)
    if not len(sample):
        raise UsageError(f"What the layers of {workload.name} are given is not known without rows; give --data.")
    replay = Replay(workload, list(sample.batches(BATCH)))
    for done, tensor in enumerate(tensors, 1):
        yield tensor, _moments(replay, tensor.layers[0])
        if progress:
            progress(done, len(tensors), "layers' inputs seen")


def _moments(replay: Replay, name: str) -> Moments:
    """Of all that the layer is given: one that a block runs twice, on two tensors, is to serve both."""
    workload = replay.workload
    site, stacks = site_of(workload, name), workload.structure.stacks
    once = site.block and not any(stack.shared and name.startswith(f"{stack.path}.") for stack in stacks)
    seen = Seen()
    found: list[Moments] = []

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = seen.tokens(name, site, args[0])
        if not found:
            found.append(Moments.nothing(x.shape[1], x, gram=True))
        found[0].add(x)

    def stop(*_: Any) -> None:
        raise Enough

    def look(inputs: Mapping[str, Tensor]) -> None:
        seen.inputs = inputs
        with suppress(Enough):
            workload.forward(inputs)

    handles = [workload.module.get_submodule(name).register_forward_pre_hook(see)]
    if once:
        handles.append(workload.module.get_submodule(site.block).register_forward_hook(stop))
    try:
        for number in range(len(replay.batches)):
            replay.through(site.block, number, look)
    finally:
        for handle in handles:
            handle.remove()
    return found[0]
