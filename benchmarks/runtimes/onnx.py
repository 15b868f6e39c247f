"""ONNX Runtime, on the CPU or an NVIDIA GPU; there by its CUDA provider, or with ``form`` "tensorrt" by TensorRT's.

Source: onnxruntime.ai/docs/api/python, "IOBinding"; .../execution-providers, "CUDA" and "NVIDIA - TensorRT".
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import Any

PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
BY_PRECISION = {"fp16": "trt_fp16_enable", "bf16": "trt_bf16_enable", "int8": "trt_int8_enable"}
"""What lets TensorRT's kernels compute in the precision of the graph."""


def open_model(artifact: dict[str, Any], threads: int, feeds: dict[str, Any]) -> Callable[[], Any]:
    return bound(session(artifact, threads), feeds, artifact.get("device", "cpu"))


def session(artifact: dict[str, Any], threads: int, trace: str = "") -> Any:
    """The session, on the device that is asked for: ONNX Runtime itself would take the CPU where that fails.

    Where there is a ``trace`` it writes what it does to a file whose name begins so.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # An idle session's threads go on spinning for their next run, and take the CPUs from the session being timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if trace:
        options.enable_profiling = True
        options.profile_file_prefix = trace
    wanted = providers(artifact)

    def made() -> Any:
        disabled = artifact["disabled_optimizers"]
        return onnxruntime.InferenceSession(artifact["model"], options, providers=wanted, disabled_optimizers=disabled)

    if artifact.get("device", "cpu") == "cpu":
        return made()
    _preload(artifact.get("form", ""))
    first, why = wanted[0][0], "it took another"
    try:
        found = made()
    except Exception as error:  # ONNX Runtime's own derive from it alone
        found, why = None, next(iter(str(error).splitlines()), type(error).__name__)
    if found is None or first not in found.get_providers():
        brings = "tensorrt" if first == PROVIDERS["tensorrt"] else "'onnxruntime-gpu[cuda,cudnn]'"
        raise SystemExit(
            f"ONNX Runtime {onnxruntime.__version__} does not run on its {first} here ({why}): pip install {brings} "
            "brings the libraries that it looks for"
        )
    return found


def _preload(form: str) -> None:
    """Load the libraries of CUDA, and for ``form`` "tensorrt" those of TensorRT, that pip brought."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    if form == "tensorrt":
        with suppress(ImportError):  # where the system's own are found by themselves
            import_module("tensorrt")


def providers(artifact: dict[str, Any]) -> list[Any]:
    """The providers in the order in which they take operators, with their options. FP32 is FP32, and not TF32."""
    if artifact.get("device", "cpu") == "cpu":
        return ["CPUExecutionProvider"]
    found: list[Any] = [(PROVIDERS["cuda"], {"use_tf32": "0"}), "CPUExecutionProvider"]
    if artifact.get("form") != "tensorrt":
        return found
    flag = BY_PRECISION.get(artifact.get("precision", ""))
    return [(PROVIDERS["tensorrt"], {flag: "1"} if flag else {}), *found]


def bound(opened: Any, feeds: dict[str, Any], device: str) -> Callable[[], Any]:
    """What runs a session on ``feeds``, which are copied to ``device`` now, into outputs that stay there."""
    import onnxruntime

    binding = opened.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0))
    names = [one.name for one in opened.get_outputs()]
    for name in names:
        binding.bind_output(name, device)
    opened.run_with_iobinding(binding)
    outputs = binding.get_outputs()
    for name, output in zip(names, outputs):  # noqa: B905 - Python 3.8 knows no strict
        binding.bind_ortvalue_output(name, output)  # the buffer that every later run writes to

    def run() -> Any:
        opened.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return outputs

    return run
