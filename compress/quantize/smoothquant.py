"""SmoothQuant: outlying channels of a layer's input are divided down, and the weight multiplied up.

What    Of x Wᵀ = (x / s) (W s)ᵀ the right side is quantized, with s_j = max|x_j|^p / max|W_j|^(1 - p). The strength p
        is searched for each tensor: the one whose layers' outputs, weights and inputs rounded, are nearest to the
        original's on a sample of tokens. Where no strength is better than none, there is none.
When    Before the ranges are calibrated. Transformers, whose norms leave a few channels far larger than the others.
Cost    One pass over the rows and, for each strength, a product of the sampled tokens with each layer. The sample of
        all layers together takes ``ROOM`` floats at most, whatever the number of rows.
Source  Xiao et al. 2022, arXiv 2211.10438; the search of the strength by layer as in its successors (AWQ, Lin et al.
        2023, arXiv 2306.00978, section 3.2)

The scales are folded (:mod:`.fold`) into what makes the tensor where nothing else reads it: pre-norm blocks, values,
the plain half of a gated feed-forward. The norm of a post-norm block also feeds the residual stream, and GELU lets no
scale through. There the input is divided at run time: one product with a vector for each tensor, which all layers that
read it share and a backend merges into their quantization. It is used only where it takes ``PAYS`` of the error away.

Scaling a LayerNorm's weight and bias by channel so that one scale serves all channels of its output is also what
RepQ-ViT does (Li et al. 2023, arXiv 2212.08254); its shift of the channels' middles is not done here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...models.layers import matrix
from ...models.workload import Progress, Workload
from ..prune.inputs import visit
from .calibrate import Histogram, observer
from .fake import rounded, rounded_input
from .fold import Input, fold, inputs

STRENGTHS = tuple(step / 20 for step in range(1, 20))
TOKENS = 512
"""Sampled of each tensor, where that is within ``ROOM``."""
ROOM = 1 << 24
SEARCH_BINS = 1 << 11
PAYS = 0.1


@dataclass(frozen=True)
class Smoothing:
    """What a plan takes over, and the strengths that were found."""

    state: dict[str, Tensor] = field(default_factory=dict)
    """Entries of the state dict with the folded scales."""
    smooth: dict[str, Tensor] = field(default_factory=dict)
    """By layer, [in], what its input is divided by at run time."""
    strengths: dict[str, float] = field(default_factory=dict)
    """By layer; 0 where none is best."""


class Sample:
    """So many tokens of all that come by, each with the same chance, and the greatest size of each channel."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.random = size, torch.Generator().manual_seed(seed)
        self.lots = torch.empty(0)
        self.tokens = torch.empty(0)
        self.largest = torch.empty(0)

    def add(self, x: Tensor) -> None:
        """Take in ``x`` [tokens, channels]: every token draws a lot, and the lowest lots stay."""
        if not len(x):
            return
        largest = x.abs().amax(dim=0)
        self.largest = torch.maximum(self.largest, largest) if len(self.largest) else largest
        lots = torch.cat([self.lots, torch.rand(len(x), generator=self.random)])
        stay = lots.argsort()[: self.size]
        old = len(self.lots)
        came, before = stay[stay >= old] - old, stay[stay < old]
        self.tokens = torch.cat([self.tokens[before], x[came]]) if old else x[came]
        self.lots = torch.cat([lots[before], lots[came + old]])


def smoothed(
    workload: Workload,
    names: Sequence[str],
    *,
    quantized: Collection[str] | None = None,
    observe: str = "mse",
    at_run_time: bool = True,
    strengths: Sequence[float] = STRENGTHS,
    rows: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> Smoothing:
    """The smoothing of all tensors that the layers ``names`` read.

    ``names`` are all linear layers of the model that might read one of them; those in ``quantized`` (all) are rounded.
    Without ``at_run_time`` only what can be folded is smoothed.
    """
    chosen = frozenset(names if quantized is None else quantized)
    tensors = [tensor for tensor in inputs(workload, names) if chosen.intersection(tensor.layers)]
    tensors = [tensor for tensor in tensors if at_run_time or tensor.maker]
    samples = _samples(workload, tensors, rows=rows, seed=seed, progress=progress)
    found = Smoothing()
    for tensor in tensors:
        if tensor.layers[0] not in samples:
            continue
        readers = [name for name in tensor.layers if name in chosen]
        sample = samples.pop(tensor.layers[0])
        scales, strength = _best(workload, tensor, readers, sample, strengths=strengths, observe=observe)
        found.strengths.update(dict.fromkeys(readers, strength))
        if not strength:
            continue
        if tensor.maker:
            fold(workload, found.state, tensor, scales)
        else:
            found.smooth.update(dict.fromkeys(readers, scales))
    return found


def _samples(
    workload: Workload, tensors: Sequence[Input], *, rows: int, seed: int, progress: Progress | None
) -> dict[str, Sample]:
    """By the first layer of each tensor that any row reaches."""
    widths = [matrix(workload.module.get_submodule(tensor.layers[0])).shape[1] for tensor in tensors]
    size = max(min(TOKENS, ROOM // max(sum(widths), 1)), 1)
    found: dict[str, Sample] = {}

    def see(name: str, x: Tensor) -> None:
        found.setdefault(name, Sample(size, seed)).add(x)

    visit(workload, [tensor.layers[0] for tensor in tensors], see, rows=rows, seed=seed, progress=progress)
    return found


def _best(
    workload: Workload,
    tensor: Input,
    readers: Sequence[str],
    sample: Sample,
    *,
    strengths: Sequence[float],
    observe: str,
) -> tuple[Tensor, float]:
    """The scales [in] of least error, and their strength."""
    layers = [workload.module.get_submodule(name) for name in readers]
    weights = [matrix(layer).detach() for layer in layers]
    centred = [getattr(layer, "bias", None) is not None for layer in layers]
    pays = 0.0 if tensor.maker else PAYS
    return best(sample, weights, centred=centred, observe=observe, strengths=strengths, tied=tensor.tied, pays=pays)


def best(
    sample: Sample,
    weights: Sequence[Tensor],
    *,
    centred: Sequence[bool],
    observe: str,
    strengths: Sequence[float] = STRENGTHS,
    tied: Callable[[Tensor], Tensor] = lambda scales: scales,
    pays: float = PAYS,
) -> tuple[Tensor, float]:
    """The scales [in] of least error for a tensor that is read by products with ``weights`` [out, in], and their
    strength: 0, with scales of 1, where none takes the share ``pays`` of the error away."""
    largest_weight = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
    plain = torch.ones_like(sample.largest)
    least = output_error(sample.tokens, weights, plain, centred=centred, observe=observe) * (1 - pays)
    found = plain, 0.0
    for strength, scales in _tried(sample.largest, largest_weight, strengths):
        common = tied(scales)
        error = output_error(sample.tokens, weights, common, centred=centred, observe=observe)
        if error < least:
            least, found = error, (common, strength)
    return found


def _tried(largest: Tensor, weight: Tensor, strengths: Sequence[float]) -> Iterator[tuple[float, Tensor]]:
    """The scales of each strength; 1 for channels that are always 0 or never read. Only ratios matter: their geometric
    mean is 1."""
    used = (largest > 0) & (weight > 0)
    if not bool(used.any()):
        return
    for strength in strengths:
        logs = strength * largest[used].log() - (1 - strength) * weight[used].log()
        scales = torch.ones_like(largest)
        scales[used] = (logs - logs.mean()).exp()
        yield strength, scales


def output_error(
    x: Tensor, weights: Sequence[Tensor], scales: Tensor, *, centred: Sequence[bool], observe: str = "mse"
) -> float:
    """The squared error, summed over outputs and layers and its mean over the tokens ``x`` [tokens, in], of layers with
    ``weights`` [out, in] each, where x / scales and weight * scales are rounded.

    Of layers that are ``centred`` the mean over tokens does not count: a bias makes up for it.
    """
    smooth = x / scales
    histogram = Histogram(SEARCH_BINS)
    histogram.add(smooth)
    given = rounded_input(smooth, observer(observe)(histogram))
    total = 0.0
    for weight, of_mean in zip(weights, centred, strict=True):
        error = given @ rounded(weight * scales).T - x @ weight.T
        total += float(error.square().sum() - (error.mean(dim=0).square().sum() * len(x) if of_mean else 0.0))
    return total / len(x)
