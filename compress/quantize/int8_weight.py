"""INT8 weights in blocks, everything else in float.

What    Weights of linear layers in 8 bits, rounded to nearest, with a scale and a zero point for each block of columns
        of each row; tables likewise, and where asked for the head.
When    Files of a little over a quarter of FP32 with next to no loss, for models whose activations must stay in float.
Cost    Seconds, and no rows. Many tokens at once run slower than with one scale a row, as int8-dynamic has.
Source  com.microsoft::MatMulNBits with 8 bits, github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from ...errors import UsageError
from ...models.layers import matrix
from ...models.workload import Workload
from ...plan import QuantizationPlan
from . import blocks, choice, weight_only


def quantize(
    workload: Workload, *, block: int = 32, symmetric: bool = False, head: bool = False, embeddings: bool = True
) -> QuantizationPlan:
    """Every linear layer in the blocks; with ``head`` those after them, with ``embeddings`` large tables.

    UsageError on a block that does not exist, and where there is nothing to quantize.
    """
    blocks.check(block)
    names = choice.products(workload)
    if not names:
        raise UsageError(f"{workload.name} has no linear layer that int8-weight could quantize.")
    weights = {name: matrix(workload.module.get_submodule(name)).detach() for name in names}
    codes = {
        name: blocks.to_nearest(weight, bits=8, block=block, symmetric=symmetric) for name, weight in weights.items()
    }
    codes |= weight_only.outside(workload, head=head, embeddings=embeddings, block=block, symmetric=symmetric)
    return weight_only.plan("int8-weight", workload, workload, codes)
