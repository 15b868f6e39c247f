"""BF16 weights: stored in the upper half of float32.

What    Every floating weight in bfloat16: the range of float32 with 8 bits of precision. On a CPU, where ONNX Runtime
        computes next to nothing in it, weights become float32 as the file is loaded, and all is computed in float32.
When    A file of half the size for models whose weights are beyond the range of FP16, or were trained in BF16. Others
        lose less in FP16, which has three bits more.
Cost    None beyond writing the file.
Source  Kalamkar et al. 2019, "A Study of BFLOAT16 for Deep Learning Training", arXiv 1905.12322
"""

from __future__ import annotations

import torch

from ...models.workload import Workload
from ...plan import QuantizationPlan
from .floats import stored


def quantize(workload: Workload) -> QuantizationPlan:
    """Every floating weight. Raises InputError where one rounds to infinity."""
    return stored(workload, "bf16", torch.bfloat16)
