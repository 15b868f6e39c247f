"""Quantization-aware distillation: what rounding costs is trained away.

What    A model in 8 bits is trained to answer as the original does, on the training rows, with rounding and clipping in
        every pass: weights and biases, and the ranges of inputs where the scheme has them.
When    What ``int8`` or ``int8-dynamic`` lose is too much, and minutes of training are to be had.
Cost    A training step of the recovery, and rounding in it, for each batch.
Source  Polino et al. 2018 (arXiv 1802.05668); the gradients and the learned ranges are those of fake.py
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...models.dequantize import dequantized
from ...models.workload import Progress, Workload
from ...plan import QuantizationPlan
from ..recover import recover
from .calibrate import output_ranges
from .fake import check_imitable


@dataclass(frozen=True)
class Distilled:
    """What is written: the trained ``workload`` by ``plan``. ``trace`` is that of the recovery."""

    workload: Workload
    plan: QuantizationPlan
    trace: tuple[dict[str, Any], ...]


def distilled(
    workload: Workload,
    plan: QuantizationPlan,
    *,
    original: Workload | None = None,
    steps: int = 80,
    batch: int = 32,
    lr: float = 1e-4,
    checkpoint: Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Distilled:
    """``workload`` trained to answer as ``original`` (itself, if not said) once ``plan`` is written; options as
    :func:`..recover.recover` has them.

    Raises UsageError where the plan's weights are codes that are rounded already, UnavailableError where a layer is
    recurrent, and as the recovery does.
    """
    if plan.codes or plan.scheme not in {"int8", "int8-dynamic"}:
        raise UsageError(f"A model is trained for int8 or int8-dynamic, not for '{plan.scheme}' or codes that are set.")
    check_imitable(workload.module, plan.weights)
    recovered = recover(
        dequantized(workload, plan),
        original or workload,
        steps=steps,
        batch=batch,
        lr=lr,
        quantization=replace(plan, state={}),
        checkpoint=checkpoint,
        seed=seed,
        progress=progress,
    )
    assert recovered.quantization is not None
    outputs = output_ranges(recovered.workload, plan.outputs, seed=seed) if plan.outputs else {}
    learned = replace(recovered.quantization, outputs=outputs)
    return Distilled(recovered.workload, learned, recovered.trace)
