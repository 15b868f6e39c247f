"""A model with the weights that a quantization plan stands for: what an artifact of that plan computes, in float."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..plan import QuantizationPlan
from .layers import matrix, tied
from .workload import Workload


def dequantized(workload: Workload, plan: QuantizationPlan) -> Workload:
    """A copy of ``workload`` with the plan's ``state`` and ``codes``; weights that it names without codes stay as they
    are, and tied ones for which it has two values become two. Raises InputError where an entry does not fit the
    module."""
    module = copy.deepcopy(workload.module)
    _untie(module, plan)
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


def _untie(module: nn.Module, plan: QuantizationPlan) -> None:
    def given(name: str) -> Tensor | None:
        codes = plan.codes.get(name.removesuffix(".weight"))
        return plan.state.get(name) if codes is None else codes.weight()

    for name, owner in tied(module).items():
        one, other = given(name), given(owner)
        if one is not None and other is not None and not torch.equal(one, other):
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, nn.Parameter(module.get_parameter(owner).detach().clone()))
