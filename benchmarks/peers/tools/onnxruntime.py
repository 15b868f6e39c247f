"""onnxruntime.quantization: quantize_dynamic and quantize_static in their settings, after onnxruntime.transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from edgepress.benchmarks.peers.tools.job import Feeds, Job, Made, main
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader
from onnxruntime.transformers import optimizer
from onnxruntime.transformers.fusion_options import FusionOptions

PRODUCTS = ["MatMul", "Gemm"]


def fuse(source: Path, path: Path, *, family: str, num_heads: int, hidden_size: int) -> None:
    """``source`` with the fusions of onnxruntime.transformers."""
    result = optimizer.optimize_model(
        str(source),
        model_type="vit" if family == "vit" else "bert",
        num_heads=num_heads,
        hidden_size=hidden_size,
        optimization_options=FusionOptions("bert"),
        opt_level=0,
    )
    result.save_model_to_file(str(path))


class Rows(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, feeds: Iterator[Feeds]) -> None:
        self.feeds = feeds

    def get_next(self) -> Feeds | None:
        return next(self.feeds, None)


def dynamic(source: Path, path: Path, *, per_channel: bool) -> None:
    # shape inference ends at operators outside the standard, as the fused graph has
    more = {"DefaultTensorType": onnx.TensorProto.FLOAT}
    quantize_dynamic(source, path, per_channel=per_channel, weight_type=QuantType.QInt8, extra_options=more)


def static(job: Job, path: Path, *, method: str, operators: list[str] | None) -> None:
    # the histograms of percentile and entropy fail on lengths that vary
    rows = Rows(job.rows(None if method == "MinMax" else 128))
    quantize_static(
        job.traced_model,
        path,
        rows,
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=operators,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, method),
    )


def tool(job: Job, made: Made) -> None:
    graphs = {"traced": job.traced_model}
    shape: dict[str, Any] = {name: job.facts[name] for name in ("family", "num_heads", "hidden_size")}
    if shape["num_heads"]:
        graphs["fused"] = job.out / "fused.onnx"
        fuse(job.traced_model, graphs["fused"], **shape)
    for graph, source in graphs.items():
        for per_channel in (False, True):
            name = f"ORT dynamic, {graph}, per {'channel' if per_channel else 'tensor'}"
            made.make(name, "onnx", lambda path: dynamic(source, path, per_channel=per_channel))  # noqa: B023
            if graph == "traced" and per_channel:  # what one switch of the runtime gives
                same = job.out / made.contenders[-1]["model"]
                made.add(f"{name}, no skip-LayerNorm", "onnx", same, disabled=("SkipLayerNormFusion",))
    for method, operators in (("MinMax", PRODUCTS), ("MinMax", None), ("Percentile", PRODUCTS), ("Entropy", PRODUCTS)):
        if job.facts["quick"] and method != "MinMax":
            continue
        name = f"ORT static, {method}, {'products' if operators else 'all operators'}"
        made.make(name, "onnx", lambda path: static(job, path, method=method, operators=operators))  # noqa: B023


if __name__ == "__main__":
    main(tool)
