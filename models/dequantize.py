"""A model with the weights that a quantization plan stands for: what an artifact of that plan computes, in float."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from ..errors import InputError
from ..plan import QuantizationPlan
from .layers import matrix
from .workload import Workload


def dequantized(workload: Workload, plan: QuantizationPlan) -> Workload:
    """A copy of ``workload`` with the plan's ``state`` and ``codes``; weights that it names without codes stay as they
    are. Raises InputError where an entry does not fit the module."""
    module = copy.deepcopy(workload.module)
    own = module.state_dict()  # tensors of the module itself: to write to them is to write to it
    with torch.no_grad():
        for name, tensor in plan.state.items():
            if name not in own or own[name].shape != tensor.shape:
                raise InputError(
                    f"The plan replaces '{name}' {list(tensor.shape)}, which {workload.name} does not have."
                )
            own[name].copy_(tensor)
        for name, codes in plan.codes.items():
            layer = dict(module.named_modules()).get(name)
            if layer is None or matrix(layer).shape != codes.codes.shape:
                raise InputError(f"The plan has codes {list(codes.codes.shape)} of '{name}', which do not fit.")
            matrix(layer).copy_(codes.weight())
    return replace(workload, module=module)
