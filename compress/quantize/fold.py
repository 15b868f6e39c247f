"""Folding: scales of a layer's input channels that cost nothing, because what makes the input can hold them.

A layer's input x is replaced by x / s and the columns of its weight are multiplied by s. Where x comes out of a norm
that nothing else reads, the norm's weight and bias are divided by s; where it is attention's mix of values, the rows
of the value projection; in a gated feed-forward those of the layer that is not activated; before ReLU those of the
layer itself, as ReLU(x / s) = ReLU(x) / s for s > 0. Which of these holds is not declared but tried: with powers of
two as scales, which floating point multiplies by exactly, the model's answer to its example must stay the same to the
last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...models.counts import CONVOLUTIONS
from ...models.layers import in_features, matrix, out_features, window
from ...models.structure import Cut, Site
from ...models.workload import Workload
from .fake import holding

State = MutableMapping[str, Tensor]


@dataclass(frozen=True)
class Input:
    """One tensor, and the layers that read it."""

    layers: tuple[str, ...]
    maker: str = ""
    """The module that can hold scales of it; empty where there is none."""
    features: tuple[int, ...] = ()
    """For every channel the maker's feature that it is; channels of one feature need one scale."""

    def tied(self, scales: Tensor) -> Tensor:
        """``scales`` [in] with the largest of each maker's feature for all of its channels."""
        if not self.maker:
            return scales
        at = torch.tensor(self.features)
        largest = scales.new_zeros(int(at.max()) + 1)
        return largest.scatter_reduce(0, at, scales, "amax")[at]


def inputs(workload: Workload, names: Iterable[str]) -> list[Input]:
    """The tensors that the layers ``names`` read, in the order in which they are read for the example, each with its
    maker where there is one."""
    readers, norms = _readers(workload, names)
    with torch.no_grad():
        wanted = workload.forward(workload.example)
    found = []
    for layers in readers:
        plain = Input(layers)
        candidates = (one for one in _candidates(workload, plain, norms) if _is_maker(workload, one, wanted))
        found.append(next(candidates, plain))
    return found


def made_by_norms(workload: Workload, names: Iterable[str]) -> dict[str, str]:
    """Those of the layers ``names`` that read what a norm put out for the example, with the norm."""
    return _readers(workload, names)[1]


def fold(workload: Workload, state: State, tensor: Input, scales: Tensor) -> None:
    """Divide ``tensor`` by ``scales`` [in], tied, where it is made, and multiply what reads it.

    That is done to entries of ``state``, to which those that it lacks are added from the module.
    """
    maker = workload.module.get_submodule(tensor.maker)
    of_feature = torch.ones(out_features(maker) or len(matrix(maker)), dtype=scales.dtype)
    of_feature[torch.tensor(tensor.features)] = scales
    for path, name in ((tensor.maker, "weight"), (tensor.maker, "bias")):
        if getattr(maker, name, None) is not None:
            rows = _entry(workload, state, path, name)
            as_matrix(maker, rows).div_(of_feature[:, None].to(rows))
    for path in tensor.layers:
        layer = workload.module.get_submodule(path)
        weight = _entry(workload, state, path, "weight")
        as_matrix(layer, weight).mul_(scales.repeat_interleave(window(layer)).to(weight))


def _entry(workload: Workload, state: State, path: str, name: str) -> Tensor:
    """The state's own copy of a parameter, to be written to."""
    key = f"{path}.{name}"
    if key not in state:
        state[key] = workload.module.get_parameter(key).detach().clone()
    return state[key]


def as_matrix(layer: nn.Module, parameter: Tensor) -> Tensor:
    """``parameter``, of the shape of the layer's weight or bias, as [out, …]; a view."""
    if parameter.dim() == 1:
        return parameter[:, None]
    return parameter.T if isinstance(layer, Conv1D) else parameter.flatten(1)


class _Made:
    """What norms have put out, by the memory it lies in; it is kept, so that no other tensor takes the place."""

    def __init__(self) -> None:
        self.by_place: dict[tuple[int, ...], str] = {}
        self.kept: list[Tensor] = []

    def add(self, name: str, output: Tensor) -> None:
        self.kept.append(output)
        self.by_place[place(output)] = name


def place(x: Tensor) -> tuple[int, ...]:
    """Where a tensor lies: equal for two that are the same numbers in memory, whatever their shape."""
    return x.data_ptr(), x.numel(), x.shape[-1]


def _readers(workload: Workload, names: Iterable[str]) -> tuple[list[tuple[str, ...]], dict[str, str]]:
    """Layers that read the same tensor together, and the norm that made what a layer reads."""
    made = _Made()
    groups: dict[tuple[int, ...], list[str]] = {}
    placed: dict[str, tuple[int, ...]] = {}

    def see(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in placed:
                made.kept.append(args[0])
                placed[name] = place(args[0])
                groups.setdefault(placed[name], []).append(name)

        return hook

    def make(name: str) -> Any:
        return lambda _, __, output: made.add(name, output) if isinstance(output, Tensor) else None

    module, handles = workload.module, []
    for name in names:
        handles.append(module.get_submodule(name).register_forward_pre_hook(see(name)))
    for name, child in module.named_modules():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1:
            handles.append(child.register_forward_hook(make(name)))
    try:
        with torch.no_grad():
            workload.forward(workload.example)
    finally:
        for handle in handles:
            handle.remove()
    norms = {name: made.by_place[at] for name, at in placed.items() if at in made.by_place}
    return [tuple(group) for group in groups.values()], norms


def _candidates(workload: Workload, tensor: Input, norms: dict[str, str]) -> Iterator[Input]:
    """What might be the tensor's maker."""
    first = tensor.layers[0]
    width = in_features(workload.module.get_submodule(first))
    if first in norms:
        yield Input(tensor.layers, norms[first], tuple(range(width)))
    for site in workload.structure.sites:
        for gate in site.gates if site.kind not in {"hidden", "block"} else ():
            if gate.layer in tensor.layers:
                for cut in site.cuts:
                    for offset in cut.offsets if cut.side == "out" else ():
                        features = _features(site, gate, cut, offset, width)
                        if features and _holds(workload.module, cut.layer, features):
                            yield Input(tensor.layers, cut.layer, features)


def _holds(module: nn.Module, path: str, features: Sequence[int]) -> bool:
    try:
        layer = module.get_submodule(path)
    except AttributeError:  # a parameter, such as a table of positions
        return False
    return isinstance(getattr(layer, "weight", None), Tensor) and max(features) < len(matrix(layer))


def _features(site: Site, gate: Cut, cut: Cut, offset: int, width: int) -> tuple[int, ...]:
    """The feature of the layer ``cut`` that each of the gate's ``width`` inputs is; empty where they do not match."""
    if gate.width % cut.width or (cut.width > 1 and gate.width != cut.width):
        return ()
    repeat = gate.width // cut.width
    features = [-1] * width
    for part, unit in enumerate(site.parts):
        for position, column in enumerate(gate.features([part])):
            features[column] = offset + unit * cut.width + position % gate.width // repeat
    return tuple(features) if min(features) >= 0 else ()


def _is_maker(workload: Workload, tensor: Input, wanted: Tensor) -> bool:
    """Whether the answer stays the same to the last bit with random powers of two folded into the candidate."""
    layers = [workload.module.get_submodule(path) for path in tensor.layers]
    if any(isinstance(layer, CONVOLUTIONS) and layer.groups != 1 for layer in layers):
        return False  # the columns of a grouped convolution are other channels for each group
    random = torch.Generator().manual_seed(0)
    powers = torch.randint(-2, 3, (len(tensor.features),), generator=random)
    state: dict[str, Tensor] = {}
    fold(workload, state, tensor, tensor.tied(2.0**powers))
    with torch.no_grad(), holding(workload.module, state):
        return torch.equal(workload.forward(workload.example), wanted)
