"""What a target needs of a machine, what of that is not there, and the one command that adds it."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..device import gpu, gpu_without_driver, providers
from ..runner import RUNTIMES

LIBRARIES = ("tensorrt", "tensorrt_rtx")
ONNXRUNTIME_GPU = "pip uninstall -y onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]'"


@dataclass(frozen=True)
class Lack:
    what: str
    command: str
    """Empty where no command adds it, and ``hint`` says what helps."""
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.what} is missing: {f'{self.command} brings it' if self.command else self.hint}"


def sentence(lacks: Sequence[Lack]) -> str:
    """All that is missing, as one sentence."""
    return "; ".join(map(str, lacks)) + "."


def here(runtime: str, device: str = "cpu", form: str = "") -> list[Lack]:
    """What this machine lacks to run ``runtime`` on ``device`` in a ``form``; see ``benchmarks/runtimes``."""
    found = [_no_gpu()] if device == "cuda" and gpu() is None else []
    if runtime == "onnx" and device == "cuda":
        found += _providers(form)
    elif runtime == "openvino" and not find_spec("openvino"):
        found.append(Lack("OpenVINO", "pip install 'edgepress[openvino]'"))
    elif runtime == "executorch" and not find_spec("executorch"):
        found.append(Lack("ExecuTorch", "pip install 'edgepress[executorch]'"))
    elif runtime == "tensorrt" and not any(map(find_spec, LIBRARIES)):
        found.append(Lack("TensorRT", "pip install 'edgepress[tensorrt]'"))
    elif runtime == "torch" and device == "cuda" and not _torch_has_cuda():
        cuda = "pip install --force-reinstall --index-url https://pypi.org/simple torch"
        found.append(Lack("PyTorch for CUDA", cuda))
    if form == "compile":
        found += _compiler()
    return found


def _no_gpu() -> Lack:
    if not gpu_without_driver():
        hint = "a machine that has one is measured with --target ssh://user@host/cuda, or with edgepress on it"
        return Lack("an NVIDIA GPU", "", hint)
    ubuntu = "sudo ubuntu-drivers install" if shutil.which("ubuntu-drivers") else ""
    return Lack("the NVIDIA GPU's driver", ubuntu or "sudo apt-get install nvidia-driver")


def _providers(form: str) -> list[Lack]:
    """Of ONNX Runtime's build, and of TensorRT where its provider is to run."""
    have = providers()
    found = [] if "cuda" in have else [Lack("ONNX Runtime's CUDA provider", ONNXRUNTIME_GPU)]
    if form == "tensorrt" and not find_spec("tensorrt"):
        found.append(Lack("TensorRT", "pip install tensorrt"))
    return found


def _torch_has_cuda() -> bool:
    import torch

    return torch.version.cuda is not None


def _compiler() -> list[Lack]:
    """What Inductor compiles its kernels with."""
    command = os.environ.get("CXX") or "g++"
    found = [] if shutil.which(command) else [Lack(f"a C++ compiler ({command})", "sudo apt-get install g++")]
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        found.append(Lack("Python.h", "sudo apt-get install python3-dev"))
    return found


def there(environment: Mapping[str, Any], runtime: str, device: str = "cpu") -> list[str]:
    """Packages that a device lacks to run ``runtime``, by the names that pip knows."""
    needed = ["numpy", RUNTIMES[runtime][0].partition(".")[0]] if runtime in RUNTIMES else []
    if runtime == "onnx" and device == "cuda" and "cuda" not in environment.get("providers", ()):
        needed[1] = "onnxruntime-gpu"
    return [package for package in needed if package not in environment["packages"]]


def no_gpu(environment: Mapping[str, Any], device: str) -> bool:
    """Whether a device lacks the GPU that ``device`` asks for."""
    return device == "cuda" and environment.get("gpu") is None


def versions(packages: Mapping[str, str], runtime: str) -> dict[str, str]:
    """The packages of ``runtime`` that were found, with their versions."""
    names = {
        "onnx": ("onnxruntime-gpu", "onnxruntime"),
        "tensorrt": LIBRARIES,
        "torch": ("torch",),
    }.get(runtime, (runtime,))
    found = {name: packages[name] for name in names if name in packages}
    return dict([*found.items()][:1])
