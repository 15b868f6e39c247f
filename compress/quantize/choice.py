"""Choice: the modules that integer schemes quantize, the same for all of them."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...models.workload import Workload

LARGE = 1 << 16
"""Tables with fewer weights stay in float: nothing is gained by them."""


def products(workload: Workload) -> list[str]:
    """Every linear layer inside the blocks; in a model without blocks every one.

    The layers after the last block stay in float: they are a thousandth of the work and decide the answer. A layer all
    of whose features went is still there, but computes nothing.
    """
    return [
        name for name, child in _inside(workload) if isinstance(child, (nn.Linear, Conv1D)) and child.weight.numel() > 0
    ]


def recurrent(workload: Workload) -> list[str]:
    """Every LSTM inside the blocks; in a model without blocks every one."""
    return [name for name, child in _inside(workload) if isinstance(child, nn.LSTM)]


def tables(workload: Workload) -> list[str]:
    """Every large embedding table that is looked up in; an encoder-decoder's ``shared`` holds weights alone."""
    children = workload.module.named_modules()
    large = {
        name: child for name, child in children if isinstance(child, nn.Embedding) and child.weight.numel() >= LARGE
    }
    read: set[nn.Module] = set()
    with ExitStack() as stack, torch.no_grad():
        for child in large.values():
            stack.callback(child.register_forward_hook(lambda module, *_: read.add(module)).remove)
        workload.forward(workload.example)
    return [name for name, child in large.items() if child in read]


def _inside(workload: Workload) -> list[tuple[str, nn.Module]]:
    blocks = tuple(f"{stack.path}." for stack in workload.structure.stacks) or ("",)
    return [(name, child) for name, child in workload.module.named_modules() if name.startswith(blocks)]
