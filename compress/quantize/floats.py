"""Floating weights in a narrower type: what is stored in it, and what does not fit into its range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError, UsageError
from ...models.workload import Workload
from ...plan import QuantizationPlan

BATCH = 8


def stored(workload: Workload, scheme: str, dtype: torch.dtype) -> QuantizationPlan:
    """Every module that has floating parameters of its own, in ``dtype``, which the plan calls ``scheme``.

    Raises InputError, naming the parameter and both numbers, where a weight is beyond the type's range.
    """
    weights = {}
    for name, child in workload.module.named_modules():
        for own, parameter in child.named_parameters(recurse=False):
            if parameter.is_floating_point() and parameter.numel():
                largest = float(parameter.detach().abs().max())
                _check(largest, dtype, f"The largest weight of '{name}.{own}'", scheme)
                weights[name] = scheme
    return QuantizationPlan(scheme, weights)


def check_activations(workload: Workload, scheme: str, dtype: torch.dtype, *, rows: int, seed: int = 0) -> None:
    """Run ``rows`` calibration rows and raise InputError, naming the first layer, where an output is beyond ``dtype``.

    UsageError where there are no rows.
    """
    sample = workload.data.calibration.take(rows, seed)
    if not len(sample):
        raise UsageError(f"Whether {workload.name} fits into {scheme} is not known without rows; give --data.")

    def look(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                _check(float(output.abs().max()), dtype, f"The largest output of '{name}'", scheme)

        return hook

    leaves = [(name, child) for name, child in workload.module.named_modules() if not list(child.children())]
    handles = [child.register_forward_hook(look(name)) for name, child in leaves]
    try:
        with torch.no_grad():
            for batch in sample.batches(BATCH):
                workload.forward(batch.inputs)
    finally:
        for handle in handles:
            handle.remove()


def _check(largest: float, dtype: torch.dtype, what: str, scheme: str) -> None:
    most = torch.finfo(dtype).max
    if not largest <= most:
        raise InputError(
            f"{what} is {largest:.4g}, which {scheme} cannot hold (at most {most:.4g}); bf16 has the range."
        )
