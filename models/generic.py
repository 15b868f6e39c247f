"""The generic route: a model of no known family, cut where torch-pruning's dependency graph says that it can be.

The graph is traced from a forward pass. Each group of layers that share channels becomes a site of ``channel`` units if
three things hold: something reads the channels (the model's own answer keeps its width), every layer of the group is of
a kind that can be cut, and a trial shows that a removed channel gives the outputs of a masked one. What fails is left
alone, and the structure's notes say so.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from .counts import CONVOLUTIONS, RECURRENT, Call, layer_macs, observe, row_axes
from .layers import drop, matrix, window
from .structure import Cut, Site, Structure

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.PReLU)
MAKERS = (nn.Linear, *CONVOLUTIONS)
TOLERANCE = 1e-9
"""Largest difference of outputs, in units of their largest, between a masked and a removed channel in float64."""


def structure(module: nn.Module, example: Mapping[str, Tensor], before: Structure | None = None) -> Structure:
    """The channels of ``module`` that can be removed, one site a group of coupled layers, in the layers' order.

    A site's ``layer`` is the place of its group's first layer among all layers with a matrix: pruning does not change
    it, as it may the groups (a depthwise convolution with one channel left is an ordinary one). What was a site
    ``before`` pruning needs no second trial.
    """
    calls = observe(module, example)
    total = sum(layer_macs(module.get_submodule(name), made) for name, made in calls.items())
    sites: list[Site] = []
    notes: list[str] = []
    try:
        groups = _groups(module, example)
    except Exception as error:  # tracing runs the model's own code and follows what it finds
        groups = []
        notes.append(f"its dependency graph cannot be traced ({type(error).__name__}), so everything is left alone")
    layers = [name for name, child in module.named_modules() if isinstance(child, MAKERS)]
    for root, cuts, count in groups:
        gates = tuple(cut for cut in cuts if cut.side == "in")
        site = Site("channel", layers.index(root), count, cuts, gates)
        tried = before is not None and before.find("channel", site.layer) is not None
        problem = _problem(module, site) or ("" if tried else _failure(module, example, site))
        if problem:
            notes.append(f"the {count} channels that {root} makes are left alone: {problem}")
        else:
            params, macs = _costs(module, calls, cuts)
            sites.append(replace(site, params=params, macs=macs))
    axes = row_axes(module, example, {site.consumer for site in sites})
    sites = [replace(site, row_axis=axes.get(site.consumer, 0)) for site in sites]
    recurrent = [name for name, child in module.named_modules() if isinstance(child, RECURRENT)]
    notes += [f"{name} is recurrent: its state is left alone" for name in recurrent]
    return Structure("generic", (), tuple(sites), 0, total, tuple(notes))


def _groups(module: nn.Module, example: Mapping[str, Tensor]) -> list[tuple[str, tuple[Cut, ...], int]]:
    """Every group of coupled layers: the name of its first, its cuts, its number of channels."""
    order = {name: place for place, (name, _) in enumerate(module.named_modules())}
    module = copy.deepcopy(module)
    for name, child in list(module.named_modules()):
        if isinstance(child, RECURRENT):
            module.set_submodule(name, _StandIn(child))
    owners = {
        part: name for name, child in module.named_modules() if isinstance(child, _StandIn) for part in child.modules()
    }
    names = {child: owners.get(child, name) for name, child in module.named_modules()}
    with torch.enable_grad():
        graph: Any = tp.DependencyGraph().build_dependency(module, dict(example))
    groups = list(graph.get_all_groups(root_module_types=MAKERS))
    found = []
    for group in groups:
        count = len(group[0].idxs)
        cuts: dict[tuple[str, str], Cut] = {}
        for item in group:
            layer = item.dep.target.module
            if layer not in names:
                continue
            side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            width = max(len(item.idxs) // count, 1)
            cuts[names[layer], side] = Cut(names[layer], side, width, (int(item.idxs[0]),))
        listed = tuple(sorted(cuts.values(), key=lambda cut: order[cut.layer]))
        makers = [cut.layer for cut in listed if cut.side == "out"]
        makers = [name for name in makers if not isinstance(module.get_submodule(name), _StandIn)]
        root = next((name for name in makers if isinstance(module.get_submodule(name), MAKERS)), None)
        if root is not None:
            found.append((root, listed, count))
    return sorted(found, key=lambda entry: order[entry[0]])


class _StandIn(nn.Module):
    """A recurrent layer for the tracer: what it reads and makes, without the recurrence, which cannot be followed."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.directions = 2 if layer.bidirectional else 1
        self.copies, self.batch_first = layer.num_layers * self.directions, layer.batch_first
        self.cell = isinstance(layer, nn.LSTM)
        self.makes = nn.Linear(layer.input_size, layer.hidden_size * self.directions)
        self.holds = nn.Linear(layer.input_size, layer.hidden_size)

    def forward(self, x: Tensor, _: Any = None) -> Any:
        state = self.holds(x).mean(dim=1 if self.batch_first else 0).expand(self.copies, -1, -1)
        return self.makes(x), (state, state) if self.cell else state


def _costs(module: nn.Module, calls: Mapping[str, list[Call]], cuts: tuple[Cut, ...]) -> tuple[int, int]:
    """Parameters and multiply-accumulates that one channel takes with it."""
    params = macs = 0
    for cut in cuts:
        child: Any = module.get_submodule(cut.layer)
        rows = matrix(child).shape[0] if cut.side == "out" else matrix(child).shape[1] // window(child)
        owned = [p for p in child.parameters(recurse=False) if p is child.weight or cut.side == "out"]  # not the bias
        params += sum(p.numel() for p in owned) * cut.width // rows
        if not isinstance(child, NORMS):
            macs += layer_macs(child, calls.get(cut.layer, [])) * cut.width // rows
    return params, macs


def _problem(module: nn.Module, site: Site) -> str:
    """Why the graph alone says that a site cannot be cut, or nothing."""
    if not site.gates:
        return "they are the model's answer, or nothing reads them"
    strange = [c.layer for c in site.cuts if not _known(module.get_submodule(c.layer))]
    if strange:
        return f"{strange[0]} is a {type(module.get_submodule(strange[0])).__name__} of a kind that is not cut"
    if site.count < 2:
        return "there is only one"
    return ""


def _failure(module: nn.Module, example: Mapping[str, Tensor], site: Site) -> str:
    """How a trial removal of one channel goes wrong, or nothing."""
    from .surgery import gated
    from .workload import answer

    trial = copy.deepcopy(module).double()
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in example.items()}
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trial.parameters():  # weights of zero would prove anything
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=parameter.dtype) / 4)
    gates = torch.ones(site.count, dtype=torch.float64)
    gone = [site.count // 2]
    gates[gone] = 0
    alone = Structure("generic", (), (site,))
    try:
        with torch.no_grad():
            with gated(trial, alone, gates):
                masked = trial(**inputs)
            for cut in site.cuts:
                drop(trial, cut.layer, cut.side, cut.features(gone))
            removed = trial(**inputs)
    except Exception as error:  # a model's own code may ask for the width that it was written with
        return f"without one of them the model fails ({type(error).__name__})"
    ours, theirs = answer(masked), answer(removed)
    same = ours.shape == theirs.shape and (ours - theirs).abs().max() <= TOLERANCE * ours.abs().max().clamp(min=1e-12)
    return "" if same else "removing one is not the same as masking it"


def _known(layer: Any) -> bool:
    """Whether one unit of the layer is one row, or one column, of its matrix: not so in grouped or transposed ones."""
    if isinstance(layer, CONVOLUTIONS):
        return not layer.transposed and layer.groups in {1, layer.in_channels}
    return isinstance(layer, (nn.Linear, *NORMS))
