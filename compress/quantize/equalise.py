"""Cross-layer equalisation: two layers in a row share the spread of the channels between them.

What    Where a tensor between two layers can be scaled by channel without a change of the function (:mod:`.fold`: ReLU,
        plain chains, values), feature i of the first layer is divided by s_i and column i of the second multiplied by
        it, with s_i = sqrt(r1_i / r2_i) for the largest weights r1_i of the feature and r2_i of the column. Both then
        have the same largest weight, sqrt(r1_i r2_i), and one scale for a whole weight fits its channels better.
When    Without rows, before weights are quantized with one scale each, and where convolutions follow one another. With
        a scale for each output channel the second layer alone gains. Where rows are at hand, smoothing sees the inputs
        too. ``quantize(workload, scheme, equalise=True)``.
Cost    A pass of the example for each pair of layers, and ``rounds`` times two vectors a pair; no rows.
Source  Nagel et al. 2019, arXiv 1906.04721, section 4.1
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...models.counts import CONVOLUTIONS
from ...models.layers import matrix, window
from ...models.workload import Workload
from .choice import products
from .fake import holding
from .fold import Input, fold, inputs

ROUNDS = 20
"""Chains settle geometrically; scales closer to 1 than ``SETTLED`` end them sooner."""
SETTLED = 1e-3


def equalised(workload: Workload, names: Sequence[str] | None = None, *, rounds: int = ROUNDS) -> dict[str, Tensor]:
    """State entries of the equalised layers, from the layers ``names`` that read the tensors: all linear layers of the
    blocks and all convolutions. Only tensors that a layer with a weight matrix makes and one layer reads take part."""
    module = workload.module
    convolutions = [name for name, child in module.named_modules() if isinstance(child, CONVOLUTIONS)]
    readers = [*products(workload), *convolutions] if names is None else list(names)
    pairs = [tensor for tensor in inputs(workload, readers) if _is_pair(module, tensor)]
    state: dict[str, Tensor] = {}
    for _ in range(rounds):
        largest = 1.0
        for tensor in pairs:
            with holding(module, state):
                scales = _scales(module, tensor)
            fold(workload, state, tensor, scales)
            largest = max(largest, float(scales.amax()), float(1 / scales.amin()))
        if largest < 1 + SETTLED:
            break
    return state


def _is_pair(module: nn.Module, tensor: Input) -> bool:
    if not tensor.maker or len(tensor.layers) != 1:
        return False
    return module.get_parameter(f"{tensor.maker}.weight").dim() > 1


def _scales(module: nn.Module, tensor: Input) -> Tensor:
    """s [in]; 1 for a feature that is all zeros, or never read."""
    reader, at = module.get_submodule(tensor.layers[0]), torch.tensor(tensor.features)
    first = matrix(module.get_submodule(tensor.maker)).detach().abs().amax(dim=1)[at]
    columns = matrix(reader).detach().abs().amax(dim=0)
    second = tensor.tied(columns.reshape(-1, window(reader)).amax(dim=1))
    return torch.where((first > 0) & (second > 0), (first / second).sqrt(), torch.ones_like(first))
