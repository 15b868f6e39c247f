"""Totals that an independent count agrees with."""

from __future__ import annotations

from typing import Any

import edgepress as ep
import torch
from edgepress.models.inspect import inspect
from torch.utils.flop_counter import FlopCounterMode


def _counted(workload: Any) -> int:
    """Multiply-accumulates of one full row, by torch's own counter."""
    length = workload.max_length
    inputs = {
        "input_ids": torch.ones(1, length, dtype=torch.int64),
        "attention_mask": torch.ones(1, length, dtype=torch.int64),
    }
    for module in workload.module.modules():
        if hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        workload.forward(inputs)
    return int(counter.get_total_flops()) // 2


def test_totals(workload: Any) -> None:
    pruned = ep.prune(workload, ep.score(workload, "random"), ratio=0.4)
    for item in (workload, pruned):
        found = inspect(item)
        assert found["params"] == sum(p.numel() for p in item.module.parameters())
        assert abs(found["macs"] - _counted(item)) / found["macs"] < 0.02
        assert sum(block["params"] for block in found["blocks"]) < found["params"]
