"""ExecuTorch's own Python, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def open_model(artifact: dict[str, Any], threads: int, feeds: dict[str, Any]) -> Callable[[], Any]:
    import torch
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(threads)
    program = Runtime.get().load_program(artifact["model"])
    method = program.load_method("forward")
    inputs = [torch.from_numpy(feeds[name]) for name in artifact["inputs"]]
    return lambda: method.execute(inputs)
