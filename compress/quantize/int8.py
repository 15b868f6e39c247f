"""INT8 weights and activations, ranges known beforehand.

What    Weights of linear layers in signed 8 bits, one scale per output channel; their inputs in unsigned 8 bits in a
        range calibrated on rows. Outlying channels are smoothed first, biases make up for what rounding shifts.
        Embedding tables in 8 bits, dequantized at the look-up.
When    Transformers on a CPU with integer dot products (VNNI, or NEON dotprod): no pass over an input for its range.
Cost    Four passes over the calibration rows and a search of the smoothing strengths: a minute for a small model.
Source  Jacob et al. 2018 (arXiv 1712.05877); SmoothQuant (arXiv 2211.10438); bias correction (arXiv 1906.04721)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...errors import UsageError
from ...models.workload import Progress, Workload
from ...plan import QuantizationPlan
from .bias_correction import corrected
from .calibrate import observer as known_observer
from .calibrate import output_ranges, ranges
from .choice import products, tables
from .fake import holding
from .smoothquant import Smoothing, smoothed

SMOOTH = ("none", "folded", "all")


def quantize(
    workload: Workload,
    *,
    observer: str = "minmax",
    smooth: str = "all",
    correct_bias: bool = True,
    rows: int = 128,
    embeddings: bool = True,
    keep: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> QuantizationPlan:
    """Every linear layer inside the blocks and, with ``embeddings``, every large table, but those in ``keep``.

    ``observer`` is one of :data:`.calibrate.OBSERVERS`. ``smooth`` is ``"folded"`` for smoothing where it costs nothing
    at run time, ``"all"`` for all layers that gain by it, or ``"none"``. A layer that none of the ``rows`` calibration
    rows reaches stays in float. Raises UsageError on a word or a name that does not exist, and where there is nothing
    to quantize or no row.
    """
    known_observer(observer)
    if smooth not in SMOOTH:
        raise UsageError(f"There is no smoothing '{smooth}' (known: {', '.join(SMOOTH)}).")
    linear, large = products(workload), tables(workload) if embeddings else []
    unknown = [name for name in keep if name not in {*linear, *tables(workload)}]
    if unknown:
        raise UsageError(f"'{unknown[0]}' is to stay in float, but is not a layer that int8 quantizes.")
    chosen = [name for name in linear if name not in keep]
    if not chosen:
        raise UsageError(f"{workload.name} has no linear layer that int8 could quantize.")
    found = Smoothing()
    if smooth != "none":
        found = smoothed(
            workload,
            linear,
            quantized=chosen,
            observe=observer,
            at_run_time=smooth == "all",
            rows=rows,
            seed=seed,
            progress=progress,
        )
    with holding(workload.module, found.state):
        spans = ranges(workload, chosen, observe=observer, smooth=found.smooth, rows=rows, seed=seed, progress=progress)
        heads = [name for name in _projections(workload) if name in spans]
        outputs = output_ranges(workload, heads, rows=rows, seed=seed, progress=progress) if heads else {}
    weights = dict.fromkeys([*spans, *(name for name in large if name not in keep)], "int8")
    scales = {name: scale for name, scale in found.smooth.items() if name in spans}
    plan = QuantizationPlan("int8", weights, spans, found.state, smooth=scales, outputs=outputs)
    if not correct_bias:
        return plan
    biases = corrected(workload, plan, rows=rows, seed=seed, progress=progress)
    return replace(plan, state={**found.state, **biases})


def _projections(workload: Workload) -> list[str]:
    """The layers whose outputs are the queries, keys and values of heads."""
    sites = (site for kind in ("head", "kv", "cross_head") for site in workload.structure.of_kind(kind))
    return list(dict.fromkeys(cut.layer for site in sites for cut in site.cuts if cut.side == "out"))
