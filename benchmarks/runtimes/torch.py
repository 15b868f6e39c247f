"""PyTorch: a model that is not exported, on the CPU or an NVIDIA GPU.

``form`` is "" for eager; "compile", by Inductor; on a GPU also "graph", eager's kernels captured as a CUDA graph, and
what is compiled is captured too. ``precision`` is that of all weights and floats. The model is a checkpoint that
edgepress wrote, so it runs where edgepress is.

Source: docs.pytorch.org, "torch.compile" and "CUDA semantics", section "CUDA Graphs".
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def open_model(artifact: dict[str, Any], threads: int, feeds: dict[str, Any]) -> Callable[[], Any]:
    import torch

    torch.set_num_threads(threads)
    from edgepress.models import checkpoint
    from edgepress.models.data import Data
    from edgepress.models.workload import answer

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32
    device, form, dtype = artifact["device"], artifact["form"], getattr(torch, DTYPES[artifact["precision"]])
    workload = checkpoint.read(Path(artifact["model"]).parent, Data.empty(), artifact["function"])
    module = narrowed(workload.module, device, dtype)
    inputs = {name: placed(array, device, dtype) for name, array in feeds.items()}
    called: Callable[..., Any] = torch.compile(module, dynamic=False) if form == "compile" else module
    mode = torch.no_grad if form else torch.inference_mode  # of which eager is the faster, and graphs know the other

    def forward() -> Tensor:
        with mode():
            return answer(called(**inputs))

    if form == "compile":
        try:
            forward()
        except Exception as error:  # Inductor raises what its parts raise
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise SystemExit(f"torch.compile does not compile {workload.name} here: {said}") from error
    if device == "cpu":
        return lambda: [forward()]
    made = graphed(forward) if form else forward

    def run() -> list[Tensor]:
        found = [made()]
        torch.cuda.synchronize()
        return found

    return run


def narrowed(module: Module, device: str, dtype: Any) -> Module:
    """``module`` itself on ``device``, its weights in ``dtype``; what it computes from no weights, such as the
    frequencies of rotary positions, keeps its precision, as where a model is loaded in ``dtype``."""
    weights = set(module.state_dict())
    kept = [(name, buffer) for name, buffer in module.named_buffers() if name not in weights]
    module.eval().requires_grad_(False).to(device=device, dtype=dtype)
    for name, buffer in kept:
        owner, _, last = name.rpartition(".")
        module.get_submodule(owner)._buffers[last] = buffer.to(device)
    return module


def placed(array: Any, device: str, dtype: Any) -> Tensor:
    """``array`` on ``device``; floats as ``dtype``."""
    import torch

    tensor = torch.from_numpy(array).to(device, copy=True)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def graphed(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``forward`` captured as a CUDA graph, after runs in which what is compiled, tuned or allocated once is."""
    import torch

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = forward()

    def replay() -> Tensor:
        graph.replay()
        return made

    return replay
