"""FP8 weights and activations, ranges known beforehand.

What    Weights of linear layers in E4M3 (4 bits of exponent, 3 of mantissa) and their inputs too, in a range calibrated
        on rows; one scale for each input, and one for all weights that read it. All else in half precision.
When    NVIDIA GPUs from Ada and Hopper on (compute capability 8.9), by TensorRT. It takes outlying channels that INT8
        must smooth, for numbers near zero keep their relative precision.
Cost    One pass over the calibration rows.
Source  Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv 2209.05433
"""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import UsageError
from ...models.workload import Progress, Workload
from ...plan import QuantizationPlan
from .calibrate import ranges
from .choice import products


def quantize(
    workload: Workload,
    *,
    observer: str = "minmax",
    rows: int = 128,
    keep: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> QuantizationPlan:
    """Every linear layer inside the blocks but those in ``keep``; a layer that no row reaches stays in half precision.

    ``observer`` is one of :data:`.calibrate.OBSERVERS`. Raises UsageError on a word or a name that does not exist, and
    where there is nothing to quantize or no row.
    """
    linear = products(workload)
    unknown = [name for name in keep if name not in linear]
    if unknown:
        raise UsageError(f"'{unknown[0]}' is to stay in half precision, but is not a layer that fp8 quantizes.")
    chosen = [name for name in linear if name not in keep]
    if not chosen:
        raise UsageError(f"{workload.name} has no linear layer that fp8 could quantize.")
    spans = ranges(workload, chosen, observe=observer, rows=rows, seed=seed, progress=progress)
    return QuantizationPlan("fp8", dict.fromkeys(spans, "fp8"), spans)
