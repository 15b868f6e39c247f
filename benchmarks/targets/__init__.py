"""Targets: where and how an artifact runs. A target is a runtime, a device, a number of threads, and a host.

A kind of host is one file with ``connect(host)``, a context manager whose ``run(argv)`` returns what the command
printed, and whose ``put(folder)`` returns the folder's path over there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ...errors import UnavailableError, UsageError
from ..environment import usable_cpus

TARGETS = ("local",)
PLANNED = {
    "cuda": "ONNX Runtime on an NVIDIA GPU",
    "tensorrt": "TensorRT",
    "ssh://user@host/cpu:2": "a device over ssh",
}

THERE_IS = "there is: cpu, cpu:N with a number of threads, cpu:openvino, cpu:openvino:N"
NO_OPENVINO = "OpenVINO is missing: pip install 'edgepress[openvino]' brings it."


@dataclass(frozen=True)
class Target:
    """``host`` names a file of this folder; ``threads`` is the size of the pool one operator is split over.

    ``runtime`` is what artifacts are written for; those that are there already run on their own.
    """

    host: str
    runtime: str
    device: str
    threads: int

    def __str__(self) -> str:
        runtime = "" if self.runtime == "onnx" else f":{self.runtime}"
        return f"{self.device}{runtime}:{self.threads}"


def get(host: str) -> ModuleType:
    """The module ``benchmarks/targets/<host>.py``."""
    if host not in TARGETS:
        raise UsageError(f"There is no kind of host '{host}' (known: {', '.join(TARGETS)}).")
    return import_module(f"{__name__}.{host}")


def parse(text: str) -> Target:
    """``cpu`` (all usable CPUs) or ``cpu:N`` threads, for ONNX Runtime; ``cpu:openvino`` or ``cpu:openvino:N``.

    UnavailableError for what is only planned, or not installed.
    """
    match = re.fullmatch(r"cpu(:openvino)?(?::(\d+))?", text)
    if match:
        cpus = usable_cpus()
        threads = int(match[2]) if match[2] else cpus
        if not 1 <= threads <= cpus:
            raise UsageError(f"The target '{text}' asks for {threads} threads; this machine has {cpus} usable CPUs.")
        if match[1] and not find_spec("openvino"):
            raise UnavailableError(NO_OPENVINO)
        return Target("local", "openvino" if match[1] else "onnx", "cpu", threads)
    for word, what in PLANNED.items():
        if text == word or text.split(":", maxsplit=1)[0] == word.split(":")[0]:
            raise UnavailableError(f"The target '{text}' ({what}) is not available yet in this version ({THERE_IS}).")
    raise UsageError(f"There is no target '{text}' ({THERE_IS}).")


def listing() -> list[dict[str, Any]]:
    """Every target, whether this machine can run it, and if not what is missing."""
    cpus = usable_cpus()
    found = find_spec("openvino") is not None
    rows: list[dict[str, Any]] = []
    for n in sorted({1, cpus}):
        threads = f"{n} of {cpus} threads"
        rows.append({"target": f"cpu:{n}", "available": True, "note": f"{threads}, ONNX Runtime"})
        note = f"{threads}, OpenVINO" if found else NO_OPENVINO
        rows.append({"target": f"cpu:openvino:{n}", "available": found, "note": note})
    rows += [
        {"target": word, "available": False, "note": f"{what}: not available yet in this version"}
        for word, what in PLANNED.items()
    ]
    return rows
