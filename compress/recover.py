"""Recovery: the pruned model is trained to answer as the original does.

What    Distillation without labels: the student's last hidden states and logits are pulled to the original's, on the
        training rows. Embeddings stay as they are.
When    After reconstruction, where it alone does not bring back enough.
Cost    One forward pass of the original and one training step of the pruned model per batch.
Source  Hinton et al. 2015 (arXiv 1503.02531); last-layer features as in Sanh et al. 2019 (arXiv 1910.01108) and
        Minitron (arXiv 2407.14679), each term relative to the size of its own target so that none needs a weight
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import EdgepressError
from ..models import hidden
from ..models.data import Batch, Rows
from ..models.surgery import prune as copy_of
from ..models.workload import Progress, Workload
from ..plan import PruningPlan

WARMUP = 0.1
CLIP = 1.0


@dataclass(frozen=True)
class Recovered:
    workload: Workload
    trace: tuple[dict[str, float], ...]
    """``step``, ``loss``, ``lr`` and ``grad_norm`` of every step."""


class DivergedError(EdgepressError):
    """Training left the finite numbers."""


def recover(
    pruned: Workload,
    original: Workload,
    *,
    steps: int = 160,
    batch: int = 32,
    lr: float = 5e-4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Recovered:
    """A copy of ``pruned`` after ``steps`` steps of distillation from ``original`` on its training rows.

    AdamW with a linear warm-up and a cosine decay to zero, gradients clipped to norm 1. Deterministic by ``seed`` on
    one machine. Raises DivergedError where the loss is no longer finite.
    """
    student = copy_of(pruned, PruningPlan())
    frozen = {id(p) for m in student.module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    weights = [p.requires_grad_(id(p) not in frozen) for p in student.module.parameters()]
    trained = [p for p in weights if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    scale = _mean_square_logit(original, batch)
    stream = hidden.kept(original, pruned)
    trace: list[dict[str, float]] = []
    for step, rows in zip(range(steps), _endless(original.data.train, batch, seed), strict=False):
        with torch.no_grad():
            whole, logits = _features(original, rows.inputs)
        target = whole[..., stream] if whole is not None and len(stream) else whole, logits
        loss = _distance(_features(student, rows.inputs), target, rows.inputs.get("attention_mask"), scale)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.clip_grad_norm_(trained, CLIP))
        if not math.isfinite(loss.item() + norm):
            raise DivergedError(f"Recovery diverged at step {step + 1}: loss {loss.item()}; try an lr below {lr:g}.")
        trace.append({"step": step + 1, "loss": loss.item(), "lr": float(schedule.get_last_lr()[0]), "grad_norm": norm})
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1, steps, f"loss {loss.item():.3f}")
    for parameter in weights:
        parameter.requires_grad_(True)
    return Recovered(student, tuple(trace))


def _rate(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _endless(rows: Rows, batch: int, seed: int) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from rows.batches(batch, seed=seed + epoch)
        epoch += 1


def _features(workload: Workload, inputs: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor]:
    """The last block's output [batch, sequence, hidden], of a shared block its last one, and the logits.

    A model without blocks has the logits alone.
    """
    if not workload.structure.stacks:
        return None, workload.forward(inputs)
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    stack = workload.structure.stacks[-1]
    last = workload.module.get_submodule(f"{stack.path}.{stack.count - 1}")
    handle = last.register_forward_hook(keep)
    try:
        logits = workload.forward(inputs)
    finally:
        handle.remove()
    return seen[-1], logits


def _mean_square_logit(original: Workload, batch: int) -> float:
    """The size of the original's logits: their mean square over the calibration rows."""
    squares, count = 0.0, 0
    with torch.no_grad():
        for rows in original.data.calibration.batches(batch):
            logits = original.forward(rows.inputs)
            squares, count = squares + float(logits.square().sum()), count + logits.numel()
    return squares / count


def _distance(
    student: tuple[Tensor | None, Tensor], target: tuple[Tensor | None, Tensor], mask: Tensor | None, scale: float
) -> Tensor:
    """Squared error of hidden states at real tokens over the target's squares, plus that of logits over ``scale``."""
    logits = (student[1] - target[1]).square().mean() / scale
    ours, theirs = student[0], target[0]
    if ours is None or theirs is None:
        return logits
    if mask is not None and mask.shape == ours.shape[:-1]:
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    return (ours - theirs).square().sum() / theirs.square().sum() + logits
