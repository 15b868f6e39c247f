"""INT4 weights in blocks, everything else in float.

What    Weights of linear layers in 4 bits, with a scale and a zero point for each block of columns of each row; tables
        in 8 bits, and where asked for the head as well.
When    Decoders that make one token at a time, whose time goes into reading weights; files of an eighth of FP32.
Cost    With GPTQ or AWQ a forward pass of the calibration rows for each tensor that layers read, and seconds of solving
        a layer; with HQQ or rounding to nearest seconds for all, and no rows.
Source  GPTQ arXiv 2210.17323; AWQ arXiv 2306.00978; HQQ mobiusml.github.io/hqq_blog; com.microsoft::MatMulNBits
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ...models.layers import matrix
from ...models.surgery import prune as copy_of
from ...models.workload import Progress, Workload
from ...plan import Codes, PruningPlan, QuantizationPlan
from ..score.readers import Moments
from . import awq, blocks, choice, hqq, weight_only
from .fold import Input, fold, inputs
from .gptq import gptq
from .sequential import calibrated

METHODS = ("gptq", "awq-gptq", "awq", "hqq", "rtn")
BITS = 4


def quantize(
    workload: Workload,
    *,
    method: str = "gptq",
    block: int = 32,
    symmetric: bool = False,
    act_order: bool = True,
    head: bool = False,
    embeddings: bool = True,
    rows: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> QuantizationPlan:
    """Every linear layer in the blocks in 4 bits; with ``head`` those after them in 8, with ``embeddings`` the tables.

    ``method`` is one of :data:`METHODS`: ``rtn`` rounds to nearest, ``awq-gptq`` scales columns and then solves. GPTQ
    and AWQ see ``rows`` calibration rows, each layer what it is given once those before it are quantized; GPTQ rounds
    columns of most energy first, or with ``act_order`` off as they stand. UsageError on a word or a block that does not
    exist, and where there is nothing to quantize or no row to see.
    """
    if method not in METHODS:
        raise UsageError(f"There is no way '{method}' to round 4-bit weights (known: {', '.join(METHODS)}).")
    blocks.check(block)
    names = choice.products(workload)
    if not names:
        raise UsageError(f"{workload.name} has no linear layer that int4 could quantize.")
    form: dict[str, Any] = {"bits": BITS, "block": block, "symmetric": symmetric}
    result = copy_of(workload, PruningPlan())
    codes: dict[str, Codes] = {}
    if method not in {"rtn", "hqq"}:
        tensors = inputs(result, names)
        for tensor, moments in calibrated(result, tensors, rows=rows, seed=seed, progress=progress):
            gram = moments.covariance(centred=False)
            if method.startswith("awq") and tensor.maker:
                gram = _scale(result, tensor, moments, codes, form)
            for name in tensor.layers:
                weight = matrix(result.module.get_submodule(name)).detach()
                solved = method.endswith("gptq")
                codes[name] = gptq(weight, gram, act_order=act_order, **form) if solved else _nearest(weight, form)
                weight.copy_(codes[name].weight())
    for name in names:
        if name not in codes:  # no rows are needed, or none of the example's tokens reaches the layer
            weight = matrix(result.module.get_submodule(name)).detach()
            codes[name] = hqq.hqq(weight, **form) if method == "hqq" else _nearest(weight, form)
    codes |= weight_only.outside(workload, head=head, embeddings=embeddings, block=block, symmetric=symmetric)
    return weight_only.plan("int4", workload, result, codes)


def _nearest(weight: Tensor, form: dict[str, Any]) -> Codes:
    return blocks.to_nearest(weight, **form)


def _scale(result: Workload, tensor: Input, moments: Moments, codes: dict[str, Codes], form: dict[str, Any]) -> Tensor:
    """Fold AWQ's scales into the module of ``result``, and into the codes of a maker that has some already: a row has
    scales of its own, so that is exact. Returns the Gram matrix of the scaled tensor."""
    module = result.module
    weights = [matrix(module.get_submodule(name)).detach() for name in tensor.layers]
    scales = awq.scales(tensor, weights, moments, **form)
    parameters = module.named_parameters(remove_duplicate=False)
    fold(result, {name: parameter.detach() for name, parameter in parameters}, tensor, scales)
    made = codes.get(tensor.maker)
    if made is not None:
        of_feature = torch.ones(len(made.scales), 1)
        of_feature[torch.tensor(tensor.features), 0] = scales.float()
        codes[tensor.maker] = Codes(made.bits, made.block, made.codes, made.scales / of_feature, made.zeros)
    return moments.covariance(centred=False) / torch.outer(scales, scales)
