"""OpenVINO, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def open_model(artifact: dict[str, Any], threads: int, feeds: dict[str, Any]) -> Callable[[], Any]:
    request = compiled(artifact, threads).create_infer_request()
    return lambda: request.infer(feeds, share_inputs=True, share_outputs=True)


def compiled(artifact: dict[str, Any], threads: int, **more: Any) -> Any:
    """The model with ``more`` of OpenVINO's settings."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **more}
    if artifact.get("inference_precision"):
        settings["INFERENCE_PRECISION_HINT"] = artifact["inference_precision"]
    if artifact.get("dynamic_quantization") is not None:
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = artifact["dynamic_quantization"]
    return openvino.Core().compile_model(artifact["model"], "CPU", settings)
