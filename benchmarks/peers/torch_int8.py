"""torchao's INT8 of weights and activations, in PyTorch itself: eager, and compiled where there is a C++ compiler.

It quantizes the linear layers inside the blocks, as edgepress does, with ``Int8DynamicActivationInt8WeightConfig``.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from edgepress.models.workload import Workload, answer
from numpy.typing import NDArray
from torch import Tensor, nn

Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class TorchContender:
    """A quantized module, and the file of its weights, whose size is told."""

    name: str
    module: nn.Module
    model: Path
    compiled: bool
    tool: str = "torchao"
    runtime: str = "torch"
    seconds: float | None = None

    @property
    def size_bytes(self) -> int:
        return self.model.stat().st_size

    def open(self, threads: int, feeds: Feeds) -> Callable[[], Any]:
        """What runs it once on ``feeds``; compiled for these shapes alone."""
        torch.set_num_threads(threads)
        module: Any = torch.compile(self.module, dynamic=False) if self.compiled else self.module
        given = _tensors(feeds)

        def run() -> Any:
            with torch.no_grad():
                return module(**given)

        run()
        return run

    def read(self) -> Callable[[dict[str, NDArray[Any]]], list[NDArray[Any]]]:
        """What returns the logits and what the last linear layer reads, uncompiled: it is the same arithmetic."""
        seen: dict[str, Tensor] = {}
        module = copy.deepcopy(self.module)  # without hooks where it is timed

        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen["last"] = args[0]

        for child in module.modules():
            if isinstance(child, nn.Linear):
                child.register_forward_pre_hook(see)

        def run(feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
            with torch.no_grad():
                logits = answer(module(**_tensors(feeds)))
            return [logits.numpy(), seen["last"].numpy()]

        return run


def of_torchao(workload: Workload, folder: Path) -> Iterator[TorchContender]:
    """ImportError where torchao is not installed."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    inside = tuple(f"{stack.path}." for stack in workload.structure.stacks)
    module = copy.deepcopy(workload.module).eval()

    def wanted(child: nn.Module, name: str) -> bool:
        return isinstance(child, nn.Linear) and name.startswith(inside)

    quantize_(module, Int8DynamicActivationInt8WeightConfig(), filter_fn=wanted)
    path = folder / "torchao.pt"
    torch.save(module.state_dict(), path)
    yield TorchContender("torchao int8-dynamic", module, path, compiled=False)
    if shutil.which(os.environ.get("CXX", "g++")):
        yield TorchContender("torchao int8-dynamic, compiled", module, path, compiled=True)


def _tensors(feeds: Feeds) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in feeds.items()}
