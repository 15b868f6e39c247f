"""The gradient of each row's loss in each unit's gate: what the gradient scores are made of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...models.data import Rows
from ...models.structure import Structure
from ...models.surgery import gated
from ...models.workload import Progress, Workload

BATCH = 32


def gate_gradients(workload: Workload, structure: Structure, rows: Rows, progress: Progress | None) -> Iterator[Tensor]:
    """For each batch the tensor [batch, num_units] of d loss(row) / d gate(unit) at gates of one.

    The loss is the cross-entropy with the row's label. Every row has gates of its own, so that one backward pass
    yields the gradients of all rows separately.
    """
    parameter = next(workload.module.parameters())
    done = 0
    for batch in rows.batches(BATCH):
        gates = torch.ones(len(batch.rows), structure.num_units, dtype=parameter.dtype, requires_grad=True)
        with torch.enable_grad(), gated(workload.module, structure, gates):
            loss = cross_entropy(workload.forward(batch.inputs), batch.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, gates)
        done += len(batch.rows)
        if progress:
            progress(done, len(rows), "rows")
        yield gradient.double()
