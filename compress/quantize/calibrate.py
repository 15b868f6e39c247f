"""Calibration: the range in which each layer's input is quantized, from histograms that rows stream into.

A histogram has bins of one width around zero, and its top is a power of two. Where a value lies beyond, the top is
doubled and every two bins become one, so that the counts are those of all values seen in the bins as they are now,
whatever the order in which values came. No activation is kept: memory is ``BINS`` counts for each tensor, however many
rows there are. Every range includes 0, which padding and ReLU make of so many values that it must be exact.

Observers turn a histogram into a range (low, high):

minmax      the least and the greatest value
percentile  the values between which ``SHARE`` of all lie, as much being cut off on either side
mse         the range of the least mean squared error after rounding and clipping
entropy     the range of the least Kullback-Leibler divergence between the values' distribution, the clipped ones at its
            ends, and that of the 256 levels (Migacz 2017, "8-bit inference with TensorRT"), here for two ends

The last two are searched for in steps of ``STEP`` of the greatest range, by turns at either end until neither moves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InputError, UsageError
from ...models.workload import Progress, Workload
from ..prune.inputs import visit
from .fake import LEVELS, Span, grid
from .fold import inputs

BINS = 1 << 14
"""A range of an eighth of the top still has eight bins to a level of 8 bits."""
CHUNK = 1 << 18
"""So many values are counted together."""
SHARE = 0.9999
STEP = 0.02

Floats = NDArray[np.float64]
Cost = Callable[[float, float], float]


class Histogram:
    """Counts of values in bins of equal width over [-top, top), and the exact extremes."""

    def __init__(self, bins: int = BINS) -> None:
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.top = 0.0
        """A power of two; 0 before any value other than 0 was seen."""
        self.low, self.high = 0.0, 0.0
        """The least and the greatest value seen, and 0."""

    @property
    def width(self) -> float:
        return 2 * self.top / len(self.counts)

    def add(self, x: Tensor) -> None:
        """Count all values of ``x``, which are finite; ValueError where they are not."""
        if not x.numel():
            return
        low, high = (float(end) for end in x.aminmax())
        if not math.isfinite(low + high):
            raise ValueError("a value is NaN or infinite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._reach(max(-low, high))
        half = len(self.counts) // 2
        per_bin = 1 / self.width if self.top else 0.0
        for part in torch.split(x.flatten(), CHUNK):
            # a product with a power of two is exact, so that a value on an edge goes to the bin above it
            self.counts += torch.bincount((part * per_bin).floor_().long() + half, minlength=len(self.counts))

    def _reach(self, value: float) -> None:
        """Double the top until it is above ``value``."""
        if not self.top and value:
            self.top = 2.0 ** math.frexp(value)[1]  # whatever is counted already is 0, at the same place in any width
        while value and value >= self.top:
            quarter = len(self.counts) // 4
            pairs = self.counts.view(-1, 2).sum(dim=1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[quarter:-quarter] = pairs
            self.top *= 2

    def filled(self) -> tuple[Floats, Floats]:
        """The middles of the bins that hold values, ascending, and their counts."""
        at = self.counts.nonzero()[:, 0]
        middles = (at.double() + 0.5) * self.width - self.top
        return middles.clamp(self.low, self.high).numpy(), self.counts[at].double().numpy()


def minmax(histogram: Histogram) -> Span:
    return histogram.low, histogram.high


def percentile(histogram: Histogram, *, share: float = SHARE) -> Span:
    """The two quantiles, interpolated within their bins."""
    _, counts = histogram.filled()
    if not len(counts):
        return 0.0, 0.0
    below = np.concatenate([[0.0], np.cumsum(histogram.counts.double().numpy())])
    edges = np.linspace(-histogram.top, histogram.top, len(below))
    tail = (1 - share) / 2
    low, high = np.interp([tail * below[-1], (1 - tail) * below[-1]], below, edges)
    return max(min(float(low), 0.0), histogram.low), min(max(float(high), 0.0), histogram.high)


def mse(histogram: Histogram) -> Span:
    values, counts = histogram.filled()

    def cost(low: float, high: float) -> float:
        scale, zero = grid((low, high))
        error = (np.clip(np.rint(values / scale) + zero, 0, LEVELS) - zero) * scale - values
        return float(counts @ (error * error))

    return _search(histogram, cost)


def entropy(histogram: Histogram) -> Span:
    values, counts = histogram.filled()

    def cost(low: float, high: float) -> float:
        if high - low < (LEVELS + 1) * histogram.width:
            return math.inf  # no bin would be merged with another, and nothing seem lost
        scale, zero = grid((low, high))
        first, last = np.searchsorted(values, low, "left"), np.searchsorted(values, high, "right")
        inside = counts[first:last]
        if not len(inside):
            return math.inf
        clipped = inside.copy()
        clipped[0] += counts[:first].sum()
        clipped[-1] += counts[last:].sum()
        level = np.clip(np.rint(values[first:last] / scale) + zero, 0, LEVELS).astype(np.int64)
        spread = (np.bincount(level, inside) / np.maximum(np.bincount(level), 1))[level]
        p, q = clipped / clipped.sum(), spread / spread.sum()
        return float(p @ np.log(p / q))

    return _search(histogram, cost)


OBSERVERS: dict[str, Callable[[Histogram], Span]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mse,
}


def _search(histogram: Histogram, cost: Cost) -> Span:
    """The range of least cost that is reached from the greatest one: by shrinking both ends alike, then by turns."""
    shares = np.arange(1, STEP / 2, -STEP)
    lows, highs = shares * histogram.low, shares * histogram.high

    def best(ranges: Iterable[tuple[float, float]]) -> int:
        return int(np.argmin([cost(float(low), float(high)) for low, high in ranges]))

    low = high = best(zip(lows, highs, strict=True))
    while histogram.low < 0 < histogram.high:
        before = low, high
        high = best((lows[low], end) for end in highs)
        low = best((end, highs[high]) for end in lows)
        if (low, high) == before:
            break
    return float(lows[low]), float(highs[high])


def observer(name: str) -> Callable[[Histogram], Span]:
    """The observer of that name; UsageError where there is none."""
    if name not in OBSERVERS:
        raise UsageError(f"There is no observer '{name}' (known: {', '.join(OBSERVERS)}).")
    return OBSERVERS[name]


def ranges(
    workload: Workload,
    names: Iterable[str],
    *,
    observe: str = "mse",
    smooth: Mapping[str, Tensor] | None = None,
    rows: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Span]:
    """The range of the input of each layer in ``names``, over its ``smooth`` where it has one, over ``rows``
    calibration rows, padding left out.

    A layer that no row reaches has no range. InputError where an input is not finite.
    """
    chosen, scales = observer(observe), smooth or {}
    tensors = [tensor.layers for tensor in inputs(workload, names)]
    found: dict[str, Histogram] = {}

    def see(name: str, x: Tensor) -> None:
        try:
            found.setdefault(name, Histogram()).add(x / scales[name].to(x) if name in scales else x)
        except ValueError as error:
            raise InputError(f"{workload.name} cannot be calibrated: in the input of '{name}' {error}.") from error

    visit(workload, [layers[0] for layers in tensors], see, rows=rows, seed=seed, progress=progress)
    spans = {name: chosen(histogram) for name, histogram in found.items()}
    return {name: spans[layers[0]] for layers in tensors for name in layers if layers[0] in spans}


def output_ranges(
    workload: Workload, names: Iterable[str], *, rows: int = 128, seed: int = 0, progress: Progress | None = None
) -> dict[str, Span]:
    """The least and the greatest value, and 0, of what each layer in ``names`` puts out for ``rows`` calibration rows,
    padding left out."""
    groups = {tensor.layers[0]: tensor.layers for tensor in inputs(workload, names)}
    found: dict[str, Span] = {}

    def see(first: str, x: Tensor) -> None:
        for name in groups[first]:
            layer = workload.module.get_submodule(name)
            low, high = (float(end) for end in type(layer).forward(layer, x).aminmax())  # past the hooks
            before = found.get(name, (0.0, 0.0))
            found[name] = min(before[0], low), max(before[1], high)

    visit(workload, groups, see, rows=rows, seed=seed, progress=progress)
    return found
