"""Sensitivity: what quantizing each operator costs, by itself and once all others are quantized.

The distance (:mod:`..distance`) of the answers from the original's is measured on calibration rows with fake
quantization: of each operator ``alone``, and of all but it, ``without``. The first tells how much it does harm, the
second how much is won by leaving it in float when the others are not.

Source: the one-at-a-time analysis of mixed precision, such as HAWQ's (Dong et al. 2019, arXiv 1905.03696), with the
measured distance in place of curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ...errors import UsageError
from ...models.data import Batch
from ...models.workload import Progress, Workload
from ...plan import QuantizationPlan
from ..distance import by_class, distance
from ..score.evidence import BATCH
from . import bias_correction, quantize
from .fake import check_imitable, quantized

T = TypeVar("T")

SCHEMES = ("int8", "int8-dynamic")
"""Those whose rounding can be tried one operator at a time."""


@dataclass(frozen=True)
class Sensitivity:
    """Mean distances over rows: nats for classes and tokens, a share of the mean square for other answers."""

    whole: float
    """Of the plan as it is."""
    alone: Mapping[str, float]
    """By module, where only it is quantized."""
    without: Mapping[str, float]
    """By module, where all but it are quantized."""

    def order(self, milliseconds: Mapping[str, float] | None = None) -> list[str]:
        """The modules, that first which is to be left in float first: by the mean of what it costs alone and of what
        leaving it in float wins, for each of the ``milliseconds`` that it then takes longer, where these are known."""
        cost = {name: self.alone[name] + self.whole - self.without[name] for name in self.alone}
        return sorted(cost, key=lambda name: -cost[name] / (milliseconds[name] if milliseconds else 1.0))


class Trials:
    """Rows, and the original's answers to them."""

    def __init__(self, workload: Workload, *, rows: int, seed: int) -> None:
        self.workload = workload
        self.batches: Sequence[Batch] = list(workload.data.calibration.take(rows, seed).batches(BATCH))
        with torch.no_grad():
            self.wanted: list[Tensor] = [workload.forward(batch.inputs) for batch in self.batches]

    def distance(self, plan: QuantizationPlan, names: Collection[str]) -> float:
        """The mean over rows where only the modules ``names`` of ``plan`` are quantized."""
        total, count, classes = 0.0, 0, by_class(self.workload)
        with torch.no_grad(), quantized(self.workload.module, plan, names):
            for batch, wanted in zip(self.batches, self.wanted, strict=True):
                found = self.workload.forward(batch.inputs)
                total += float(distance(wanted, found, batch, by_class=classes).sum())
                count += len(batch.rows)
        return total / count


def uncorrected(
    workload: Workload, scheme: str, *, rotate: bool = False, seed: int = 0, progress: Progress | None = None
) -> QuantizationPlan:
    """The plan of ``scheme`` to measure: without biases that make up for rounding, see :func:`corrected`.

    Raises UsageError for a scheme that is not in ``SCHEMES``, and UnavailableError for recurrent layers.
    """
    if scheme not in SCHEMES:
        raise UsageError(f"What '{scheme}' costs operator by operator is not known (it is for: {', '.join(SCHEMES)}).")
    if scheme == "int8":
        return quantize(workload, scheme, rotate=rotate, correct_bias=False, seed=seed, progress=progress)
    found = quantize(workload, scheme, rotate=rotate, seed=seed)
    check_imitable(workload.module, found.weights)
    return found


def measure(
    workload: Workload, plan: QuantizationPlan, *, rows: int = 32, seed: int = 0, progress: Progress | None = None
) -> Sensitivity:
    """The sensitivity of each module that ``plan`` quantizes, on ``rows`` calibration rows: two passes for each.

    ``plan``'s state must leave the function as it is: biases that make up for the rounding of a module are wrong where
    it is not rounded.
    """
    trials, names = Trials(workload, rows=rows, seed=seed), list(plan.weights)
    alone, without = {}, {}
    for done, name in enumerate(names, 1):
        alone[name] = trials.distance(plan, [name])
        without[name] = trials.distance(plan, [other for other in names if other != name])
        if progress:
            progress(done, len(names), "operators tried")
    return Sensitivity(trials.distance(plan, names), alone, without)


def fewest(most: int, inside: Callable[[int], bool]) -> int:
    """The least of 1 … ``most`` for which ``inside`` holds, as it does for all that are larger and for ``most``.

    Where it does not hold for all larger ones, one that holds while that before it does not. Doubled until it holds,
    for it mostly is a small one, then halved.
    """
    low, high = 1, 1  # all below ``low`` are outside
    while high < most and not inside(high):
        low, high = high + 1, min(2 * high, most)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if inside(middle) else (middle + 1, high)
    return high


def keeping(plan: QuantizationPlan, names: Collection[str]) -> QuantizationPlan:
    """``plan`` with the modules ``names`` left in float."""

    def rest(of_module: Mapping[str, T]) -> dict[str, T]:
        return {name: value for name, value in of_module.items() if name not in names}

    return replace(
        plan,
        weights=rest(plan.weights),
        activations=rest(plan.activations),
        codes=rest(plan.codes),
        smooth=rest(plan.smooth),
    )


def corrected(
    workload: Workload, plan: QuantizationPlan, in_float: Collection[str] = (), *, seed: int = 0
) -> QuantizationPlan:
    """What is written of an :func:`uncorrected` plan: with ``in_float`` left in float, and the biases of the rest."""
    kept = keeping(plan, in_float)
    if not kept.activations:
        return kept
    return replace(kept, state={**kept.state, **bias_correction.corrected(workload, kept, seed=seed)})
