"""Sequential calibration: what layers are given once those before them have been quantized.

Layers are visited in the order in which they run, those that read the same tensor together. What stands before them is
as the caller has left it, so an error that has been made is seen by what can still make up for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...errors import UsageError
from ...models.structure import Cut, Site
from ...models.workload import Progress, Workload
from ..prune.inputs import BATCH, site_of
from ..prune.replay import Replay
from ..score.readers import Moments, Seen
from .fold import Input


def calibrated(
    workload: Workload, tensors: Sequence[Input], *, rows: int, seed: int = 0, progress: Progress | None = None
) -> Iterator[tuple[Input, Moments]]:
    """Each of ``tensors``, in the order of :func:`.fold.inputs`, with its moments over ``rows`` calibration rows.

    Before the next is asked for, the weights of what reads the tensor, of their block and of what runs after it may be
    changed. A pass runs one block, so all of them cost the model's blocks times the tensors of a block. Memory is one
    Gram matrix [in, in], and of the rows' hidden states at most the room of the parameters. Raises UsageError where
    there are no rows.
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
    seen, where = Seen(), site_of(replay.workload, name)
    site: Site = replace(where, gates=(Cut(name, "in", 1),), sum_at="")
    found: Moments | None = None
    for number, batch in enumerate(replay.batches):
        seen.inputs = batch.inputs
        for inputs, _ in replay.at(site, number):
            x = seen.tokens(name, site, inputs)
            found = found or Moments.nothing(x.shape[1], x, gram=True)
            found.add(x)
    assert found is not None
    return found
