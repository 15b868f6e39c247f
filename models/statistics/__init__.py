"""Statistics: what a user's own rows say about gradients, representations and attention, from one pass over them.

Every row goes forward and backward once. What is kept are running sums, whose size depends on the model and not on the
number of rows; maps of attention are looked at a layer at a time, in parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from .. import token_merging
from ..data import Batch
from ..workload import Progress, Workload, check_finite
from . import attention, finite, gradient_flow, representation
from .tokens import Tokens


def statistics(
    workload: Workload, *, rows: int = 128, batch: int = 16, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """Gradient flow, representation and attention of ``workload`` on ``rows`` of its calibration rows.

    Plain data: ``gradient_flow``, ``representation`` and ``attention`` as their modules' ``summary`` describes them,
    the number of ``rows``, their mean ``loss``, and ``notes`` on what does not apply to this model. The module is left
    as it was, whatever happens. Raises InputError where there are no rows, or where a NaN or an infinity arises, naming
    the layer and the row.
    """
    if token_merging.merged(workload.module):
        raise InputError(f"{workload.name} merges tokens: look at its statistics before that, or ask for none.")
    sample = workload.data.calibration.take(rows, seed)
    if not len(sample):
        raise InputError(f"{workload.name} has no calibration rows, and statistics need some.")
    check_finite(workload.module, workload.name)
    gradients: dict[str, Tensor] = {}
    loss, done = 0.0, 0
    with ExitStack() as stack:
        tokens = Tokens(workload.structure)
        stack.enter_context(_trainable(workload.module))
        stack.enter_context(finite.checked(workload.module))
        units = stack.enter_context(gradient_flow.observed(workload, tokens))
        changes = stack.enter_context(representation.observed(workload, tokens, seed))
        maps = stack.enter_context(attention.observed(workload, tokens, attention.Observer))
        for part in sample.batches(batch):
            tokens.start(part.labels)
            try:
                loss += _pass(workload, part, gradients, 1 / len(sample), seed)
            except finite.NotFiniteError as error:
                run = partial(_pass, workload, gradients={}, share=1.0, seed=seed)
                raise finite.complaint(part, run, workload.name) from error
            changes.end_batch()
            maps.end_batch()
            done += len(part.rows)
            if progress:
                progress(done, len(sample), "rows")
    found = {
        "rows": len(sample),
        "loss": loss,
        "gradient_flow": gradient_flow.summary(workload, gradients, units),
        "representation": changes.summary(),
        "attention": maps.summary(),
    }
    return {**found, "notes": [*changes.notes(), *maps.notes()]}


def _pass(workload: Workload, part: Batch, gradients: dict[str, Tensor], share: float, seed: int) -> float:
    """One batch forward and backward: adds the gradients of its rows' losses, each times ``share``, to ``gradients``,
    and returns the sum of these losses."""
    parameters = {name: p for name, p in workload.module.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        loss = workload.losses(part, seed=seed).sum() * share
    finite.check(loss, "the loss")
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, gradient in zip(parameters, found, strict=True):
        if gradient is None:
            continue
        finite.check(gradient, f"the gradient of the weight '{name}'")
        gradients[name] = gradients[name].add_(gradient) if name in gradients else gradient
    return loss.item()


@contextmanager
def _trainable(module: nn.Module) -> Iterator[None]:
    """Within the context every parameter has a gradient, frozen ones too."""
    frozen = [p for p in module.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
