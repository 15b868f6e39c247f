"""TensorRT through one seam: the modules ``tensorrt`` (10 and 11) and ``tensorrt_rtx`` build the same graphs.

A network is strongly typed in either: precision is what the graph says. ``tensorrt`` builds for the GPU that is
present; ``tensorrt_rtx`` builds ahead of time, for a named compute capability or for all from 8.0 up, without a GPU.

Source: docs.nvidia.com/deeplearning/tensorrt and .../tensorrt-rtx, "CPU-Only AOT and TensorRT-RTX Engines", "Working
with Dynamic Shapes", "Weight-Stripped Engines"; for 11, "Migrating from TensorRT 10.x to 11.x".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import InputError, UnavailableError, UsageError
from ..files import write_bytes
from . import layers
from .layers import Layer

LIBRARIES = ("tensorrt", "tensorrt_rtx")
NEEDS = {
    "fp8": (89, "FP8 products"),
    "bf16": (80, "BF16 products"),
    "2:4": (80, "2:4 sparse products"),
    "": (75, "TensorRT"),
}
"""The least compute capability, times ten, of what is not everywhere."""


@dataclass(frozen=True)
class Range:
    """Sizes of one input that an engine takes, and those that its kernels are chosen for."""

    least: tuple[int, ...]
    tuned: tuple[int, ...]
    most: tuple[int, ...]


@dataclass(frozen=True)
class Engine:
    plan: bytes
    library: str
    version: str
    capability: str
    """Such as ``"sm89"``; ``"sm80+"`` for an engine that is completed on the GPU that it meets."""
    layers: tuple[Layer, ...]


def library(only: str | None = None) -> ModuleType:
    """The first of :data:`LIBRARIES` that is installed and whole, or that one ``only``; UnavailableError if none is."""
    for name in LIBRARIES if only is None else [name for name in LIBRARIES if name == only]:
        try:
            found = import_module(name)
        except (ImportError, OSError, RuntimeError):  # the wrapper alone, without its libraries, fails in any of these
            continue
        if hasattr(found, "OnnxParser"):
            return found
    raise UnavailableError(
        f"{only or 'TensorRT'} is missing: pip install 'edgepress[tensorrt]' brings TensorRT-RTX; on a Jetson or a "
        "server, the package 'tensorrt' of its own installation is used."
    )


def present() -> int | None:
    """Ten times the compute capability of the first GPU, or nothing."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def target(trt: ModuleType, capability: str | None) -> int | None:
    """Ten times the capability to build for; nothing for any from 8.0 up. Raises UsageError or UnavailableError."""
    known = getattr(trt, "ComputeCapability", None)  # TensorRT-RTX alone has it
    here = present()
    if capability is None:
        if known is None and here is None:
            raise UnavailableError(f"{trt.__name__} builds engines on an NVIDIA GPU, and there is none here.")
        return here if known is None or hasattr(known, f"SM{here}") else None
    match = re.fullmatch(r"sm(\d{2,3})", capability)
    if not match:
        raise UsageError(f"'{capability}' is not a compute capability like sm89.")
    wanted = int(match[1])
    if wanted < NEEDS[""][0]:
        raise UnavailableError(f"TensorRT needs compute capability {_dotted(NEEDS[''][0])}; {capability} is older.")
    if known is None and wanted != here:
        there = f"this one is sm{here}" if here else "there is none here"
        raise UnavailableError(
            f"{trt.__name__} builds for the GPU that is present only, and {there}: not {capability}."
        )
    if known is not None and not hasattr(known, f"SM{wanted}"):
        able = ", ".join(sorted((n.lower() for n in dir(known) if n.startswith("SM")), key=lambda n: int(n[2:])))
        raise UnavailableError(f"{trt.__name__} {trt.__version__} builds for {able}, not for {capability}.")
    return wanted


def check(capability: int | None, scheme: str, *, sparse: bool = False, stripped: bool = False) -> None:
    """Raise UnavailableError where ``capability`` has no such products, or the weights cannot be stripped here."""
    if stripped and present() is None:
        raise UnavailableError("TensorRT strips an engine's weights on an NVIDIA GPU only, and there is none here.")
    for word in (scheme, *(["2:4"] if sparse else [])):
        least, what = NEEDS.get(word, (0, ""))
        if (capability or 80) < least:
            name = f"sm{capability}" if capability else f"an engine for any GPU from sm80 up (name one: sm{least})"
            raise UnavailableError(f"{what} need compute capability {_dotted(least)} or newer, which {name} is not.")


def _dotted(capability: int) -> str:
    return f"{capability // 10}.{capability % 10}"


def build(
    graph: Path,
    ranges: Mapping[str, Range],
    *,
    capability: str | None = None,
    sparse: bool = False,
    compatible: bool = False,
    stripped: bool = False,
    timing_cache: Path | None = None,
) -> Engine:
    """Build the ONNX file ``graph`` for inputs in ``ranges``; the options are those of ``backends.tensorrt.write``.

    Raises UnavailableError with the library's own reason where it cannot.
    """
    trt = library()
    log = logger(trt)
    wanted = target(trt, capability)
    builder = trt.Builder(log)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # 11 knows no other kind
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        raise InputError(f"{trt.__name__} cannot read {graph.name}: {_first_line(parser.get_error(0).desc())}.")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is fp32
    if sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    if stripped:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    ahead = hasattr(trt, "ComputeCapability")
    if ahead:
        if wanted:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{wanted}"), 0)
    elif compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    profile = builder.create_optimization_profile()
    for name, sizes in ranges.items():
        profile.set_shape(name, sizes.least, sizes.tuned, sizes.most)
    config.add_optimization_profile(profile)
    if timing_cache is not None:
        cache = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.is_file() else b"")
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise InputError(f"{timing_cache} is no timing cache for this GPU and {trt.__name__} {trt.__version__}.")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UnavailableError(f"{trt.__name__} {trt.__version__} cannot build this engine: {log.reason()}.")
    if timing_cache is not None:
        write_bytes(timing_cache, bytes(cache.serialize()))
    content = bytes(plan)
    found = layers.of_log(log.listing) if ahead else inspected(trt, log, content)
    return Engine(content, trt.__name__, trt.__version__, f"sm{wanted}" if wanted else "sm80+", found)


def load(trt: ModuleType, log: Any, content: bytes, *, own: bool = False) -> Any:
    """The engine on the present GPU; UnavailableError with the library's own reason where it does not run there.

    Code for the CPU that an engine for other versions brings along is run of an ``own`` one only, which was built here.
    """
    runtime = trt.Runtime(log)
    if own and hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = True
    found = runtime.deserialize_cuda_engine(content)
    if found is None:
        raise UnavailableError(f"{trt.__name__} {trt.__version__} cannot load this engine: {log.reason()}.")
    return found


def refit(trt: ModuleType, log: Any, engine: Any, graph: Path) -> None:
    """Give a weight-stripped engine the weights of the graph that it was built from."""
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
        raise UnavailableError(f"{trt.__name__} cannot refit the engine from {graph.name}: {log.reason()}.")


def inspected(trt: ModuleType, log: Any, content: bytes) -> tuple[Layer, ...]:
    """The layers by the engine inspector, which needs the GPU, of an engine that was built here."""
    inspector = load(trt, log, content, own=True).create_engine_inspector()
    return layers.of_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def logger(trt: ModuleType) -> Any:
    """A logger of ``trt`` that keeps errors, of which the first is the reason, and the list of an engine's layers."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.listing = ""
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in {trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR}:
                self.errors.append(message)
            elif message.startswith(layers.LISTING):
                self.listing = message

        def reason(self) -> str:
            said = self.errors[0] if self.errors else "it gave no reason"
            self.errors.clear()
            return _first_line(said)

    return Log()


def _first_line(text: str) -> str:
    """The library's message without the place in its source that it comes from."""
    said = re.sub(r"^\S+: Error Code \d+: ", "", text.strip().splitlines()[0])
    said = re.sub(r"\[[\w.]+:\d+: \w+\] | In \w+ at /\S+", "", said)
    return said.rstrip(". )") + (")" if said.count("(") > said.rstrip(". )").count(")") else "")
