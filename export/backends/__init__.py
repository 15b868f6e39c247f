"""Runtimes: for each, how an artifact is written and how it is opened.

A backend is one file with ``write(workload, plan, folder) -> Artifact`` and ``open_session(artifact, *, device,
threads)``, a context manager whose ``run(feeds)`` never times itself.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ...errors import UsageError

BACKENDS = ("onnx", "tensorrt", "openvino", "executorch")


def get(name: str) -> ModuleType:
    """The module ``export/backends/<name>.py``; raises UsageError where there is none."""
    if name in BACKENDS:
        return import_module(f"{__name__}.{name}")
    raise UsageError(f"There is no runtime '{name}' (known: {', '.join(BACKENDS)}).")


def writing(scheme: str, name: str) -> ModuleType:
    """The runtime ``name``; raises UsageError where it cannot write ``scheme``."""
    runtime = get(name)
    if scheme not in runtime.SCHEMES:
        able = ", ".join(runtime.SCHEMES)
        raise UsageError(f"The {name} runtime cannot write the scheme '{scheme}' (it can: {able}).")
    return runtime
