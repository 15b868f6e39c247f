"""INT8 weights, activations quantized as they come.

What    Weights of linear layers in signed 8 bits, one scale per output channel; their inputs are quantized to unsigned
        8 bits at run time from the tensor's own range. Embedding tables in 8 bits, dequantized at the look-up.
When    Transformers on a CPU with integer dot products (VNNI, or NEON dotprod); no calibration rows are needed.
Cost    None beyond writing the file; at run time one pass over each layer's input to find its range.
Source  onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

from ...errors import UsageError
from ...models.workload import Workload
from ...plan import QuantizationPlan
from .choice import products, recurrent, tables


def quantize(workload: Workload, *, embeddings: bool = True) -> QuantizationPlan:
    """Every linear layer and LSTM inside the blocks and, with ``embeddings``, every large embedding table.

    UsageError where there is nothing of the kind.
    """
    names = [*products(workload), *recurrent(workload), *(tables(workload) if embeddings else ())]
    if not names:
        raise UsageError(f"{workload.name} has no linear layer, LSTM or large table that int8-dynamic could quantize.")
    return QuantizationPlan("int8-dynamic", dict.fromkeys(names, "int8"))
