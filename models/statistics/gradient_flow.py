"""Gradient flow: how strongly the loss pulls at each layer, and which units it does not reach.

The gradient is that of the mean loss of all rows. ``update_ratio`` is the norm of the update of one step of plain
gradient descent over the norm of the weight, per unit of learning rate: |gradient| / |weight|, the inverse of the trust
ratio of LARS (You et al. 2017, arXiv 1708.03888). Times a learning rate it is the share of a weight that a step moves.

A layer's gradient vanishes, or explodes, where the root mean square of its entries is less than ``VANISHING`` times, or
more than ``EXPLODING`` times, the median of the same layer in all blocks (of all matrices, in a model without blocks).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..counts import CONVOLUTIONS
from ..structure import Site
from ..workload import Workload
from .finite import on_gradient
from .tokens import Tokens

VANISHING, EXPLODING = 0.01, 100.0


class Features:
    """Extremes over all rows of what a layer reads, and whether any of it ever had a gradient, by input feature."""

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.pulled: Tensor | None = None

    def update(self, values: Tensor) -> None:
        """Add values [any, features]."""
        if len(values):
            low, high = values.amin(dim=0), values.amax(dim=0)
            self.low = low if self.low is None else torch.minimum(self.low, low)
            self.high = high if self.high is None else torch.maximum(self.high, high)

    def pull(self, gradient: Tensor) -> None:
        """Add the gradients [any, features] of such values."""
        pulled = (gradient != 0).any(dim=0)
        self.pulled = pulled if self.pulled is None else self.pulled | pulled

    def dead(self, site: Site) -> dict[str, list[int]]:
        """The units of ``site`` that are ``zero`` or ``constant`` on all rows, or had ``no_gradient`` in any."""
        if self.low is None or self.high is None:
            return {}
        constant = self.low == self.high
        zero = constant & (self.low == 0)
        still = torch.zeros_like(constant) if self.pulled is None else ~self.pulled
        owner = torch.full(constant.shape, site.count)  # features of no unit fall to one more than there are
        for part, unit in enumerate(site.parts):
            owner[site.gates[0].features([part])] = unit
        dead = {}
        for name, of_features in (("zero", zero), ("constant", constant & ~zero), ("no_gradient", still)):
            alive = torch.zeros(site.count + 1, dtype=torch.long).index_add_(0, owner, (~of_features).long())
            dead[name] = (alive[:-1] == 0).nonzero().flatten().tolist()
        return dead


@contextmanager
def observed(workload: Workload, tokens: Tokens) -> Iterator[Mapping[str, Features]]:
    """Within the context what units make is watched where it is read; yields it by the name of the reader."""
    paths = {layer: stack.path for stack in workload.structure.stacks for layer in stack.layers}
    readers = {site.consumer: site for site in workload.structure.sites if site.gates}
    found = {name: Features() for name in readers}

    def see(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            by_feature = args[0].movedim(1, -1) if isinstance(layer, CONVOLUTIONS) else args[0]
            site = readers[name]
            found[name].update(tokens.of(paths.get(site.layer, ""), by_feature.detach(), site.row_axis))
            if by_feature.requires_grad:
                on_gradient(by_feature, lambda gradient: found[name].pull(gradient.flatten(0, -2)))

        return hook

    handles = [workload.module.get_submodule(name).register_forward_pre_hook(see(name)) for name in readers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def summary(workload: Workload, gradients: Mapping[str, Tensor], units: Mapping[str, Features]) -> dict[str, Any]:
    """``layers``: for each block, and for each weight matrix in and outside the blocks, its ``name``, ``kind`` (block,
    matrix, embedding, head), ``block`` (its number or None), ``gradient_norm``, ``weight_norm``, ``update_ratio`` and
    ``flag`` (vanishing, exploding, zero, or None). ``dead``: for each kind of unit in each layer that has some, the
    indices of units that are ``zero`` or ``constant`` on all rows, or have ``no_gradient``."""
    layers = _layers(workload, gradients)
    for entry in layers:
        peers = [_rms(other) for other in layers if other["role"] == entry["role"] and entry["role"]]
        entry["flag"] = _flag(_rms(entry), median(peers) if peers else None)
    shown = [{key: entry[key] for key in FIELDS} for entry in layers]
    limits = {"vanishing": VANISHING, "exploding": EXPLODING}
    return {"limits": limits, "layers": shown, "dead": list(_dead(workload.structure.sites, units))}


FIELDS = ("name", "kind", "block", "params", "gradient_norm", "weight_norm", "update_ratio", "flag")


def _layers(workload: Workload, gradients: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Blocks, each followed by its matrices, and the matrices outside, in the model's order.

    ``role`` is the same for layers that are compared with each other, and empty for those that are not.
    """
    module, structure = workload.module, workload.structure
    blocks = {f"{s.path}.{n - s.start}": n for s in structure.stacks for n in s.layers}
    parameters: dict[str, Tensor] = dict(module.named_parameters())
    owners = dict(module.named_modules())
    inside: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        block = next((path for path in blocks if name.startswith(f"{path}.")), "")
        inside.setdefault(block or name, {})[name] = parameter
    layers = []
    for path, held in inside.items():
        if path in blocks:
            layers.append(
                {**_norms(held, gradients), "name": path, "kind": "block", "block": blocks[path], "role": "."}
            )
        for name, parameter in held.items():
            if parameter.dim() < 2:
                continue
            owner = name.rpartition(".")[0]
            kind = "matrix" if path in blocks or not blocks else "head"
            if kind == "head" and (isinstance(owners[owner], nn.Embedding) or "embed" in owner):
                kind = "embedding"
            role = name.removeprefix(path) if path in blocks else "" if blocks else "matrix"
            short = name.removesuffix(".weight")
            one = _norms({name: parameter}, gradients)
            layers.append({**one, "name": short, "kind": kind, "block": blocks.get(path), "role": role})
    return layers


def _norms(parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, Any]:
    weight = math.hypot(*(float(p.detach().norm()) for p in parameters.values()))
    gradient = math.hypot(*(float(gradients[name].norm()) for name in parameters if name in gradients))
    return {
        "params": sum(p.numel() for p in parameters.values()),
        "gradient_norm": gradient,
        "weight_norm": weight,
        "update_ratio": gradient / weight if weight else None,
    }


def _rms(entry: Mapping[str, Any]) -> float:
    return float(entry["gradient_norm"]) / math.sqrt(max(entry["params"], 1))


def _flag(size: float, usual: float | None) -> str | None:
    if size == 0:
        return "zero"
    if usual is None or VANISHING * usual <= size <= EXPLODING * usual:
        return None
    return "vanishing" if size < usual else "exploding"


def _dead(sites: tuple[Site, ...], units: Mapping[str, Features]) -> Iterator[dict[str, Any]]:
    for site in sites:
        dead = units[site.consumer].dead(site) if site.gates else {}
        if any(dead.values()):
            yield {"kind": site.kind, "layer": site.layer, "count": site.count, **dead}
