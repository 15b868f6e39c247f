"""What is wrong with a batch: which layer makes the first NaN or infinity, and for which row."""

from __future__ import annotations

import torch

from ...errors import InputError
from ...models.data import Batch
from ...models.statistics import finite
from ...models.surgery import gated
from ...models.workload import Workload


def complaint(workload: Workload, batch: Batch, *, seed: int) -> InputError:
    """The error for a ``batch`` in which something was not finite; one more look at it costs nothing once it is over.

    ``seed`` is that of :meth:`Workload.losses`.
    """
    for place, row in enumerate(batch.rows):
        labels = None if batch.labels is None else batch.labels[place : place + 1]
        inputs = {name: tensor[place : place + 1] for name, tensor in batch.inputs.items()}
        found = _problem(workload, Batch(batch.rows[place : place + 1], inputs, labels), seed)
        if found:
            return InputError(f"{workload.name}: {found} for calibration row {row}.")
    found = _problem(workload, batch, seed) or "a statistic of what its layers read is NaN or infinite"
    return InputError(f"{workload.name}: {found} for a batch of calibration rows that starts with row {batch.rows[0]}.")


def _problem(workload: Workload, batch: Batch, seed: int) -> str:
    gates = torch.ones(len(batch.rows), workload.structure.num_units, requires_grad=True)
    gates = gates.to(next(workload.module.parameters()).device)
    try:
        with torch.enable_grad(), gated(workload.module, workload.structure, gates), finite.checked(workload.module):
            loss = workload.losses(batch, seed=seed).sum()
            finite.check(loss, "the loss")
            torch.autograd.grad(loss, gates)
    except finite.NotFiniteError as error:
        return str(error)
    return ""
