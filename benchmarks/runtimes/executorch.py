"""ExecuTorch's own Python, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def open_model(artifact: dict[str, Any], threads: int, feeds: dict[str, Any]) -> Callable[[], Any]:
    import torch

    method = program(artifact, threads).load_method("forward")
    inputs = [torch.from_numpy(feeds[name]) for name in artifact["inputs"]]
    return lambda: method.execute(inputs)


def program(artifact: dict[str, Any], threads: int, **more: Any) -> Any:
    """The program, loaded with ``more`` of ExecuTorch's options."""
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(threads)
    return Runtime.get().load_program(artifact["model"], **more)
