"""Recovery: the pruned model is trained to answer as the original does.

What    Distillation on the training rows, without labels unless asked: the student's last hidden states and logits are
        pulled to the original's. Embeddings stay as they are. Gradients are watched, and trouble is mended.
When    After reconstruction, where it alone does not bring back enough.
Cost    One forward pass of the original and one training step of the pruned model per batch.
Source  Hinton et al. 2015 (arXiv 1503.02531); last-layer features as in Sanh et al. 2019 (arXiv 1910.01108) and
        Minitron (arXiv 2407.14679), each term relative to the size of its own target so that none needs a weight

The same call trains in one process, or in each of those that ``torchrun`` or ``accelerate launch`` starts: they share
each batch out among them, and the first one alone writes. Each has the whole model, or with ``accelerate launch
--use_fsdp``, which sets ACCELERATE_USE_FSDP, a shard of the student's parameters, gradients and optimizer state (FSDP2,
the blocks and the rest as groups), and the original whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from ...errors import UnavailableError, UsageError
from ...models import tasks
from ...models.surgery import prune as copy_of
from ...models.workload import Progress, Workload, check_finite
from ...plan import PruningPlan, QuantizationPlan
from ..quantize import fake
from . import lora
from .flow import DivergedError
from .loop import Options, Training
from .losses import DEFAULT, objective

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["DivergedError", "Precision", "Recovered", "recover"]

Precision = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True)
class Recovered:
    workload: Workload
    trace: tuple[dict[str, Any], ...]
    """Of every step ``step``, ``loss``, ``lr``, ``grad_norm``, the ``norms`` of the gradient in each of ``layers``, and
    ``events``: what was wrong and what was done, as flow.py says; a number that is not finite is None. Where rows are
    held out, ``held_out`` is the metric on them after the step."""
    layers: tuple[str, ...]
    quantization: QuantizationPlan | None = None
    """The one that was trained for, with the ranges that were learned."""


def recover(
    pruned: Workload,
    original: Workload,
    *,
    steps: int = 160,
    batch: int = 32,
    lr: float = 5e-4,
    losses: Sequence[str] = DEFAULT,
    temperature: float = 2.0,
    rank: int = 0,
    precision: Precision = "auto",
    evaluate_every: int = 0,
    patience: int = 0,
    quantization: QuantizationPlan | None = None,
    checkpoint: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Recovered:
    """A copy of ``pruned`` after ``steps`` steps of distillation from ``original`` on its training rows.

    AdamW with a linear warm-up and a cosine decay to zero, gradients clipped to norm 1. ``losses`` are terms of
    losses.py, ``temperature`` is that of ``kl``. With a ``rank`` only low-rank adapters are trained, and merged in the
    end. With ``precision`` ``auto`` the forward passes are in bfloat16 on a GPU that has it. With ``evaluate_every`` a
    tenth of the training rows is held out and judged every so many steps; the best weights are returned, and after
    ``patience`` judgements without better ones training ends. With a ``quantization``, whose state is in the module
    already, the copy answers as it will once that is written, and is trained to do so; see fake.py. The file
    ``checkpoint`` keeps the state of every 20th step, from which the same call goes on after it was killed.
    Deterministic by ``seed`` on one machine.

    Raises DivergedError where lower rates do not help, InputError where the pruned model is not finite to begin with or
    the state cannot be read, UsageError for options that do not go together or a state of another run.
    """
    if patience and not evaluate_every:
        raise UsageError(f"A patience of {patience} needs evaluate_every, which says how often rows are judged.")
    if quantization and rank:
        raise UsageError("Adapters are not trained with quantization in the loop: leave the rank, or the quantization.")
    check_finite(pruned.module, "The pruned model")
    options = Options(steps, batch, lr, evaluate_every, patience, seed)
    facts = {
        **asdict(options),
        "losses": list(losses),
        "temperature": temperature,
        "rank": rank,
        "precision": precision,
        **({"quantization": quantization.to_json()} if quantization else {}),
    }
    accelerator, sharded = _accelerator()
    if accelerator.num_processes > 1 and original.task is tasks.RETRIEVAL:
        # a row is compared with the others of its batch, and a process sees its own share of them only
        raise UnavailableError(f"{original.name} compares the rows of a batch, so one process alone can recover it.")
    if accelerator.num_processes > 1 and quantization:
        raise UnavailableError("Quantization is trained with in one process alone in this version.")
    if sharded and set(losses) == {"relations"}:
        # gradients would start within a block, whose weights are gathered again when they reach its output
        raise UnavailableError("FSDP cannot train by the loss 'relations' alone; add 'hidden' to it.")
    student = copy_of(pruned, PruningPlan())
    with (
        _at_work(accelerator.device, original, *([] if sharded else [student])),
        fake.learning(student.module, quantization or QuantizationPlan("fp32")) as ranges,
    ):
        weights = _trained(student.module, rank, seed)
        training = Training(
            accelerator,
            student,
            original,
            objective(student, original, losses, temperature=temperature),
            weights,
            options=options,
            mixed=_mixed(accelerator.device, precision),
            run=_digest(pruned, original, facts),
            sharded=sharded,
        )
        training.go_on(checkpoint)
        training.train(checkpoint, progress)
        if sharded:
            student = copy_of(pruned, PruningPlan())
            weights = _trained(student.module, rank, seed)
            training.give(weights)
        else:  # a launcher may ask for autocast
            accelerator.unwrap_model(training.wrapped.module, keep_fp32_wrapper=False)
        if rank:
            lora.merge(student.module)
    for parameter in student.module.parameters():
        parameter.requires_grad_(True)
    if quantization:
        learned = {name: one.learned() for name, one in ranges.items()}
        quantization = replace(quantization, activations={**quantization.activations, **learned})
    return Recovered(student, tuple(training.trace), training.flow.layers, quantization)


def _accelerator() -> tuple[Accelerator, bool]:
    """What knows the device and the other processes, and whether they shard the student.

    accelerate itself shards on GPUs alone, by what it guesses to be blocks: its switch is read, loop.py does the rest.
    Raises UnavailableError for other ways to share a model out.
    """
    from accelerate import Accelerator, DistributedType
    from accelerate.utils import parse_flag_from_env

    accelerator = Accelerator(cpu=not torch.accelerator.is_available())  # said, or CPU processes would not meet
    kind = accelerator.distributed_type
    whole = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    if kind not in whole | {DistributedType.FSDP}:
        raise UnavailableError(f"Recovery shares rows out among processes, or the model by FSDP, not by {kind.value}.")
    return accelerator, kind != DistributedType.NO and bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def _trained(module: nn.Module, rank: int, seed: int) -> dict[str, nn.Parameter]:
    """What is trained: adapters of this ``rank``, or all weights but those of embeddings."""
    if rank:
        chosen = {id(parameter) for parameter in lora.adapt(module, rank, seed=seed)}
    else:
        tables = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        chosen = {id(p) for p in module.parameters() if p.is_floating_point()} - tables
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    return {name: parameter for name, parameter in module.named_parameters() if id(parameter) in chosen}


@contextmanager
def _at_work(device: torch.device, *workloads: Workload) -> Iterator[None]:
    """Within the context the modules are on ``device``; the caller's random numbers are as before when it ends."""
    devices = [device] if device.type == "cuda" else []
    try:
        for workload in workloads:
            workload.module.to(device)
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for workload in workloads:
            workload.module.to("cpu")


def _mixed(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """The precision of the forward passes. A CPU may gain from bfloat16 too, but then equal calls on two machines would
    train two models: there it has to be asked for."""
    if precision not in {"auto", "fp32", "bf16"}:
        raise UsageError(f"There is no precision '{precision}' to train in (there are: auto, fp32, bf16).")
    able = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" or (precision == "auto" and able))


def _digest(pruned: Workload, original: Workload, facts: dict[str, Any]) -> str:
    """What the run depends on: both models, the rows and the options."""
    parts = [pruned.fingerprint(), original.fingerprint(), json.dumps(facts, sort_keys=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
