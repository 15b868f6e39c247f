"""Low rank: a linear layer as the product of two smaller ones, and the record of which layers are.

The record is plain data, ``{path: rank}``, read off the module; a checkpoint replays it on the skeleton, before the
pruning plan. Surgery cuts output features out of ``up`` and input features out of ``down``; the rank stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import InputError
from ..plan import PruningPlan
from .layers import GroupedLinear, in_features, matrix, out_features, tied
from .structure import Structure


class LowRank(nn.Module):
    """``up(down(x))``: a layer of [out, in] through ``rank`` features in between; the bias is ``up``'s."""

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.down, self.up = down, up

    @classmethod
    def empty(cls, layer: nn.Module, rank: int) -> LowRank:
        """One of ``layer``'s shape, type, device and grouping, with ``layer``'s bias and with weights yet to be set."""
        bias: Any = layer.bias
        weight = layer.get_parameter("weight")
        like: Any = {"device": weight.device, "dtype": weight.dtype}
        down = nn.Linear(in_features(layer), rank, bias=False, **like)
        up = nn.Linear(rank, matrix(layer).shape[0], bias=False, **like)
        up.bias = bias
        if isinstance(layer, GroupedLinear):
            up = GroupedLinear.of(up, layer.groups, layer.head_dim)
        return cls(down, up).train(layer.training)

    @property
    def in_features(self) -> int:
        return in_features(self.down)

    @property
    def out_features(self) -> int:
        return out_features(self.up)

    @property
    def rank(self) -> int:
        return in_features(self.up)

    @property
    def weight(self) -> Tensor:
        """The matrix [out, in] that the two make."""
        return matrix(self.up) @ matrix(self.down)

    @property
    def bias(self) -> Any:
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.up(self.down(x))
        return made


def holder(module: nn.Module, name: str, side: str) -> str:
    """The path of the layer that holds the features of the layer ``name`` on its ``side``, "out" or "in"."""
    if name and isinstance(module.get_submodule(name), LowRank):
        return f"{name}.{'up' if side == 'out' else 'down'}"
    return name


def ranks(module: nn.Module) -> dict[str, int]:
    """The rank of every factored layer, by path."""
    return {name: child.rank for name, child in module.named_modules() if isinstance(child, LowRank)}


def pays(layer: nn.Module) -> int:
    """The highest rank at which two factors have fewer weights than ``layer``: in * out / (in + out), less than it."""
    rows, columns = matrix(layer).shape
    return max((rows * columns - 1) // (rows + columns), 0)


def owner(module: nn.Module, name: str) -> str:
    """The path of the factored layer that the layer ``name`` is a factor of; ``name`` where it is none."""
    parent = name.rpartition(".")[0]
    return parent if isinstance(module.get_submodule(parent), LowRank) else name


def check(module: nn.Module, structure: Structure, wanted: Mapping[str, Any]) -> dict[str, int]:
    """``wanted`` where it says {path: rank} of layers of ``module`` that can be factored; else InputError."""
    if not structure.stacks:
        raise InputError("Layers are factored in models with blocks only: in others the plan's numbers would shift.")
    shared = {name.rpartition(".")[0] for pair in tied(module).items() for name in pair}
    children = dict(module.named_modules())
    for name, rank in wanted.items():
        layer = children.get(name)
        if type(layer) not in {nn.Linear, GroupedLinear, Conv1D} or name in shared:
            raise InputError(f"'{name}' cannot be factored: it is not a linear layer with a matrix of its own.")
        assert layer is not None
        most = pays(layer)
        if type(rank) is not int or not 1 <= rank <= most:
            rows, columns = matrix(layer).shape
            raise InputError(
                f"'{name}' has {rows} x {columns} weights: it can be factored at ranks 1 to {most}, not {rank!r}."
            )
    return dict(wanted)


def replay(module: nn.Module, structure: Structure, plan: PruningPlan, recorded: Mapping[str, Any]) -> None:
    """Factor the layers of a skeleton's ``module`` that are ``recorded`` of what ``plan`` leaves of it.

    The factors' weights are not set; ``structure`` is the skeleton's. Raises InputError where that cannot be.
    """
    original = {_before(structure, plan, name): rank for name, rank in recorded.items()}
    for name, rank in check(module, structure, original).items():
        module.set_submodule(name, LowRank.empty(module.get_submodule(name), rank))


def _before(structure: Structure, plan: PruningPlan, name: str) -> str:
    """The path that a module had before the blocks of ``plan`` went."""
    for stack in structure.stacks:
        if name.startswith(f"{stack.path}."):
            number, _, rest = name.removeprefix(f"{stack.path}.").partition(".")
            left = [layer - stack.start for layer in stack.layers if layer not in plan.blocks]
            if not number.isdecimal() or int(number) >= len(left):
                raise InputError(f"'{name}' cannot be factored: {stack.path} has {len(left)} blocks.")
            return f"{stack.path}.{left[int(number)]}.{rest}"
    return name
