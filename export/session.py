"""Open artifacts: an ONNX or OpenVINO file as its manifest says that it is to be run, without PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, UnavailableError, UsageError
from .artifact import Artifact, Session

PAST = "past_key_values."
"""How the names of inputs begin that are keys and values; as in ``generate.py``, which stands alone."""


@contextmanager
def open_onnx(artifact: Artifact, *, device: str = "cpu", threads: int = 1) -> Iterator[OnnxSession]:
    """Open an artifact, on "cpu" or "cuda"; ``threads`` is the size of the pool that one operator is split over."""
    if device not in {"cpu", "cuda"}:
        raise UsageError(f"The onnx runtime runs on 'cpu' or 'cuda', not on '{device}'.")
    try:
        import onnxruntime
    except ImportError as error:
        raise UnavailableError("ONNX Runtime is missing: pip install onnxruntime brings it.") from error

    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        if hasattr(onnxruntime, "preload_dlls"):
            with redirect_stdout(sys.stderr):  # where it then says what it does not find
                onnxruntime.preload_dlls()
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            artifact.model_file,
            options,
            providers=providers,
            disabled_optimizers=list(artifact.manifest.session.disabled_optimizers),
        )
    except Exception as error:
        # ONNX Runtime's own exceptions derive from Exception alone, one class per status code.
        raise InputError(f"ONNX Runtime cannot load {artifact.model_file}: {str(error).splitlines()[0]}") from error
    if device == "cuda" and "CUDAExecutionProvider" not in session.get_providers():
        raise UnavailableError(
            "ONNX Runtime cannot load its CUDA provider here: pip install 'onnxruntime-gpu[cuda,cudnn]' brings it."
        )
    yield OnnxSession(session)


class OnnxSession:
    """An open file: ``run`` maps input arrays by name to the list of outputs."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def run(self, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        outputs: list[NDArray[Any]] = self._session.run(None, {**self._no_past(feeds), **feeds})
        return outputs

    def _no_past(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Keys and values of no tokens, for those that are not fed."""
        shapes = {one.name: one.shape for one in self._session.get_inputs() if one.name not in feeds}
        rows = len(next(iter(feeds.values())))
        past = [name for name in shapes if name.startswith(PAST)]
        return {name: np.zeros((rows, shapes[name][1], 0, shapes[name][3]), np.float32) for name in past}


def openvino() -> ModuleType:
    """The module ``openvino``; UnavailableError where it is not installed or not whole."""
    try:
        return import_module("openvino")
    except (ImportError, OSError) as error:
        raise UnavailableError("OpenVINO is missing: pip install 'edgepress[openvino]' brings it.") from error


@contextmanager
def open_openvino(artifact: Artifact, *, device: str = "cpu", threads: int = 1) -> Iterator[OpenVinoSession]:
    """Open an artifact for running; ``threads`` is the size of the pool that one operator is split over."""
    if device != "cpu":
        raise UsageError(f"The openvino runtime runs on 'cpu', not on '{device}'.")
    library = openvino()
    told = settings(artifact.manifest.session, threads)
    try:
        compiled = library.Core().compile_model(artifact.model_file, "CPU", told)
    except RuntimeError as error:
        raise InputError(f"OpenVINO cannot load {artifact.model_file}: {reason(error)}") from error
    yield OpenVinoSession(compiled)


def settings(told: Session, threads: int) -> dict[str, Any]:
    """What OpenVINO is told on the CPU."""
    found: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if told.inference_precision:
        found["INFERENCE_PRECISION_HINT"] = told.inference_precision
    if told.dynamic_quantization is not None:
        found["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = told.dynamic_quantization
    return found


def reason(error: RuntimeError) -> str:
    """What an error of OpenVINO says, after the lines that name its own sources."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith(("Exception from", "Check '"))), type(error).__name__)


class OpenVinoSession:
    """A compiled model: ``run`` maps input arrays by name to the list of outputs."""

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        return list(self.compiled(dict(feeds)).values())
