"""TensorRT and TensorRT-RTX, on an NVIDIA GPU: buffers on the device, and a CUDA graph of what can be captured.

It opens the engine as :mod:`edgepress.export.backends.tensorrt` does, so it runs where edgepress is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any


def open_model(artifact: dict[str, Any], threads: int, feeds: dict[str, Any]) -> Callable[[], Any]:
    from edgepress.errors import EdgepressError
    from edgepress.export.artifact import open_artifact
    from edgepress.export.backends import tensorrt

    with ExitStack() as stack:
        try:
            opened = open_artifact(Path(artifact["model"]).parent)
            session = stack.enter_context(tensorrt.open_session(opened, device=artifact["device"]))
            run = session.prepared(feeds)
        except EdgepressError as error:
            raise SystemExit(str(error)) from error
        kept = stack.pop_all()  # open until the process ends

    def once() -> Any:
        assert kept
        return run()

    return once
