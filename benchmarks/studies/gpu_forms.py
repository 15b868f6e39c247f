"""The forms of :mod:`.gpu`: variants of a model, and each made ready to run in PyTorch, ONNX Runtime or TensorRT."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from edgepress.benchmarks.runtimes import onnx as onnx_runtime
from edgepress.benchmarks.runtimes import torch as torch_runtime
from edgepress.compress.prune.inputs import linear_layers
from edgepress.models import workload as workloads
from numpy.typing import NDArray
from torch import Tensor, nn

Feeds = dict[str, NDArray[Any]]
TORCH_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    change: str
    """``original``, ``pruned`` (half of the heads and channels, distilled) or ``2:4``."""
    precision: str
    runtime: str
    """``torch``, ``onnxruntime`` or ``tensorrt``."""
    form: str
    """Of PyTorch: ``eager``; ``graph``, the same as a CUDA graph; ``compile``, by Inductor, as a CUDA graph."""
    seconds: float = 2
    """What it takes to make it, about; it is not begun where less time is left."""

    @property
    def name(self) -> str:
        return f"{self.change} {self.precision} {self.runtime} {self.form}"


REFERENCE = Variant("original", "fp32", "torch", "eager")
PLAIN = Variant("original", "fp16", "torch", "graph")
"""Measured again beside whatever is measured later, so that there is something to compare with."""
VARIANTS = (
    REFERENCE,
    Variant("original", "fp16", "torch", "eager"),
    *(Variant("original", precision, "torch", "graph") for precision in ("fp32", "tf32", "fp16", "bf16")),
    Variant("pruned", "fp16", "torch", "graph"),
    *(Variant("original", precision, "torch", "graph") for precision in ("fp8", "int8")),
    Variant("2:4", "fp16", "torch", "eager"),
    Variant("2:4", "fp16", "torch", "graph"),
    Variant("original", "fp16", "torch", "compile", 25),
    Variant("pruned", "fp16", "torch", "compile", 25),
    *(Variant("original", precision, "tensorrt", "engine", 15) for precision in ("fp16", "int8", "fp8", "fp32")),
    *(Variant("pruned", precision, "tensorrt", "engine", 15) for precision in ("fp16", "int8", "fp8")),
    *(Variant("2:4", precision, "tensorrt", "engine", 15) for precision in ("fp16", "int8")),
    *(Variant("original", precision, "torch", "compile", 25) for precision in ("fp8", "int8")),
    Variant("pruned", "fp8", "torch", "compile", 25),
    Variant("2:4", "fp16", "torch", "compile", 25),
    *(Variant("original", precision, "onnxruntime", "cuda", 10) for precision in ("fp32", "fp16", "int8")),
    Variant("pruned", "fp16", "onnxruntime", "cuda", 10),
)


@dataclass(frozen=True)
class Prepared:
    """A variant ready to run in one input shape."""

    go: Callable[[], Any]
    """One inference of what lies on the device, waited for."""
    whole: Callable[[Feeds], NDArray[Any]]
    """From the host's arrays to the host's array."""
    size_bytes: int
    params: int


class Unavailable(Exception):  # noqa: N818 - a reason, which becomes a row
    """Why there is no such variant here, in the library's words."""


# ---- PyTorch


class Quantized(nn.Module):
    """A linear layer in 8 bits, by PyTorch's own products: a scale for each row of the input as it comes, and one for
    each output channel. ``kind`` is ``fp8`` (E4M3) or ``int8``."""

    def __init__(self, layer: nn.Linear, kind: str) -> None:
        super().__init__()
        self.kind, self.bias = kind, layer.bias
        self.code_type, self.most = (torch.float8_e4m3fn, 448.0) if kind == "fp8" else (torch.int8, 127.0)
        codes, scales = self.rounded(layer.weight.detach().float())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.T.contiguous())

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scales = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / self.most
        codes = x.float() / scales
        return (codes.round() if self.kind == "int8" else codes).to(self.code_type), scales

    def forward(self, x: Tensor) -> Tensor:
        codes, scales = self.rounded(x.flatten(0, -2))
        weight, of_channel = self.get_buffer("codes"), self.get_buffer("scales")
        if self.kind == "fp8":
            made = torch._scaled_mm(codes, weight.t(), scales, of_channel, out_dtype=torch.bfloat16)
        else:
            made = torch._int_mm(codes, weight.t()) * scales * of_channel
        made = made.to(x.dtype).reshape(*x.shape[:-1], -1)
        return made if self.bias is None else made + self.bias


def torch_module(workload: Any, variant: Variant, device: str) -> nn.Module:
    """The module in the precision of ``variant``; what FP8 and INT8 leave is BF16, whose range the product gives."""

    module: nn.Module = copy.deepcopy(workload.module)
    narrow = TORCH_DTYPES.get(variant.precision, torch.bfloat16)
    module.to(device=device, dtype=narrow)
    names = linear_layers(workload)
    for name in names:
        layer: Any = module.get_submodule(name)
        if variant.precision in {"fp8", "int8"}:
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, Quantized(layer, variant.precision))
        elif variant.change == "2:4":
            layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()), False)
    return module.eval().requires_grad_(False)


def prepare_torch(workload: Any, variant: Variant, feeds: Feeds, *, module: nn.Module, device: str) -> Prepared:
    narrow = TORCH_DTYPES.get(variant.precision, torch.bfloat16)
    inputs = {name: torch_runtime.placed(array, device, narrow) for name, array in feeds.items()}
    gpu = device != "cpu"

    def forward() -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = variant.precision == "tf32"
        with torch.no_grad():
            return workloads.answer(called(**inputs))

    called: Callable[..., Any] = module
    if variant.form == "compile":
        torch._dynamo.reset()
        called = torch.compile(module, dynamic=False)
    run = torch_runtime.graphed(forward) if gpu and variant.form != "eager" else forward

    def go() -> Tensor:
        made = run()
        if gpu:
            torch.cuda.synchronize()
        return made

    def whole(arrays: Feeds) -> NDArray[Any]:
        for name, array in arrays.items():
            inputs[name].copy_(torch.from_numpy(array))
        answer: NDArray[Any] = run().float().numpy(force=True)
        return answer

    size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    return Prepared(go, whole, size, workload.params)


# ---- ONNX Runtime and TensorRT


def prepare_onnxruntime(artifact: Any, params: int, feeds: Feeds) -> Prepared:
    told = {"model": str(artifact.model_file), "device": "cuda", "disabled_optimizers": []}
    try:
        session = onnx_runtime.session(told, threads=torch.get_num_threads())
    except SystemExit as ended:
        raise Unavailable(str(ended)) from ended
    go = onnx_runtime.bound(session, feeds, "cuda")
    return Prepared(go, lambda arrays: session.run(None, arrays)[0], artifact.size_bytes, params)


def prepare_tensorrt(artifact: Any, params: int, feeds: Feeds, *, stack: contextlib.ExitStack) -> Prepared:
    from edgepress.export.backends import tensorrt  # type: ignore[attr-defined,unused-ignore]

    session = stack.enter_context(tensorrt.open_session(artifact, device="cuda"))
    return Prepared(session.prepared(feeds), lambda arrays: session.run(arrays)[0], artifact.size_bytes, params)
