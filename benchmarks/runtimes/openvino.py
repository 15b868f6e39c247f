"""OpenVINO, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def open_model(artifact: dict[str, Any], threads: int, feeds: dict[str, Any]) -> Callable[[], Any]:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if artifact.get("inference_precision"):
        settings["INFERENCE_PRECISION_HINT"] = artifact["inference_precision"]
    if artifact.get("dynamic_quantization") is not None:
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = artifact["dynamic_quantization"]
    request = openvino.Core().compile_model(artifact["model"], "CPU", settings).create_infer_request()
    return lambda: request.infer(feeds, share_inputs=True, share_outputs=True)
