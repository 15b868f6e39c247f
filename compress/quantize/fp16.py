"""FP16 weights: stored in half precision.

What    Every floating weight in IEEE half precision; a weight beyond 65504 is refused. On a CPU, where ONNX Runtime has
        next to no half-precision kernels, they become float32 as the file is loaded, and all is computed in float32.
When    A file of half the size with no loss that can be measured; it runs as fast as FP32, and in as much memory.
Cost    None beyond writing the file.
Source  IEEE 754-2008 binary16; onnx.ai/onnx/operators/onnx__Cast.html
"""

from __future__ import annotations

import torch

from ...models.workload import Workload
from ...plan import QuantizationPlan
from .floats import check_activations, stored


def quantize(workload: Workload, *, compute: bool = False, rows: int = 64, seed: int = 0) -> QuantizationPlan:
    """Every floating weight; with ``compute``, for a runtime that computes in half precision too, it is also checked on
    ``rows`` calibration rows that no layer's output is beyond the range. Raises InputError that names the layer."""
    plan = stored(workload, "fp16", torch.float16)
    if compute:
        check_activations(workload, "fp16", torch.float16, rows=rows, seed=seed)
    return plan
