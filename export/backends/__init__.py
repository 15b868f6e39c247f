"""Runtimes: for each, how an artifact is written and how it is opened.

A backend is one file with ``write(workload, plan, folder) -> Artifact`` and ``open_session(artifact, *, device,
threads)``, a context manager whose ``run(feeds)`` never times itself.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ...errors import UnavailableError, UsageError

BACKENDS = ("onnx", "tensorrt")
PLANNED = ("openvino",)


def get(name: str) -> ModuleType:
    """The module ``export/backends/<name>.py``; raises UsageError, or UnavailableError for a planned one."""
    if name in BACKENDS:
        return import_module(f"{__name__}.{name}")
    if name in PLANNED:
        raise UnavailableError(
            f"Export to {name} is not available yet in this version (available: {', '.join(BACKENDS)})."
        )
    raise UsageError(f"There is no runtime '{name}' (known: {', '.join((*BACKENDS, *PLANNED))}).")
