"""INT8 weights, activations quantized as they come.

What    Weights of linear layers in signed 8 bits, one scale per output channel; their inputs are quantized to unsigned
        8 bits at run time from the tensor's own range. Embedding tables in 8 bits, dequantized at the look-up.
When    Transformers on a CPU with integer dot products (VNNI, or NEON dotprod); no calibration rows are needed.
Cost    None beyond writing the file; at run time one pass over each layer's input to find its range.
Source  onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...errors import UsageError
from ...models.workload import Workload
from ...plan import QuantizationPlan


def quantize(workload: Workload, *, embeddings: bool = True) -> QuantizationPlan:
    """Every linear layer inside the blocks and, with ``embeddings``, every embedding table.

    The layers after the last block stay in float: they are a thousandth of the work and decide the answer. In a model
    without blocks every linear layer and every LSTM is quantized. UsageError where there is nothing of the kind.
    """
    blocks = tuple(f"{stack.path}." for stack in workload.structure.stacks) or ("",)
    weights = {
        name: "int8"
        for name, child in workload.module.named_modules()
        if (_has_products(child) and name.startswith(blocks))
        or (embeddings and isinstance(child, nn.Embedding) and child.weight.numel() >= 1 << 16)
    }
    if not weights:
        raise UsageError(f"{workload.name} has no linear layer, LSTM or large table that int8-dynamic could quantize.")
    return QuantizationPlan("int8-dynamic", weights)


def _has_products(child: nn.Module) -> bool:
    """A feed-forward layer all of whose channels went is still there, but computes nothing."""
    return isinstance(child, nn.LSTM) or (isinstance(child, (nn.Linear, Conv1D)) and child.weight.numel() > 0)
