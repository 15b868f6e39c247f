"""Readers: what the layers that read units are given, watched by hooks and kept as running means."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...models import padding
from ...models.layers import columns, matrix
from ...models.structure import Cut, Site, Structure
from .contribution import turn, turns
from .weights import places

TOKENS = 512
"""So many are looked at together: what is made of them on the way fits in a processor's cache."""


@dataclass
class Moments:
    """Running means over all inputs x of one reader, in float32 or finer. ``gram`` may be None."""

    count: int
    mean: Tensor
    """[columns]"""
    square: Tensor
    """[columns], the mean of x^2"""
    gram: Tensor | None
    """[columns, columns], the mean of x xᵀ"""

    @classmethod
    def nothing(cls, width: int, like: Tensor, *, gram: bool) -> Moments:
        mean, square = like.new_zeros(2, width)
        return cls(0, mean, square, like.new_zeros(width, width) if gram else None)

    def add(self, x: Tensor) -> None:
        """Take in ``x`` [any, columns]."""
        if not len(x):
            return
        self.count += len(x)
        share = len(x) / self.count
        self.mean.lerp_(x.mean(dim=0), share)
        self.square.lerp_(torch.linalg.vector_norm(x, dim=0).square() / len(x), share)
        if self.gram is not None:
            self.gram.addmm_(x.T, x, beta=1 - share, alpha=1 / self.count)

    def covariance(self, *, centred: bool) -> Tensor:
        """A new matrix, the mean of x xᵀ in float64, about the mean where ``centred``: that part of an error which a
        bias cannot make up for."""
        assert self.gram is not None
        gram, mean = self.gram.to(torch.float64, copy=True), self.mean.double()
        return gram.addr_(mean, mean, alpha=-1) if centred else gram


@dataclass
class Mean:
    """A running mean over tokens, in float64."""

    count: int = 0
    total: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        """Take in ``values`` [tokens, …]."""
        self.count += len(values)
        self.total = self.total + values.sum(dim=0, dtype=torch.float64)

    @property
    def value(self) -> Tensor:
        return torch.as_tensor(self.total, dtype=torch.float64) / max(self.count, 1)


@dataclass
class Seen:
    """What was seen of all batches so far."""

    moments: dict[str, Moments] = field(default_factory=dict)
    """By the reader's path."""
    turned: dict[Site, Mean] = field(default_factory=dict)
    """How far each unit turns the residual stream (where there is none, its reader's output): [count] by site."""
    moved: dict[str, Mean] = field(default_factory=dict)
    """By the block's path, the mean of |block(x) - x|^2: [1]."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """The model's inputs of the batch at work."""

    def finite(self) -> bool:
        means = [moments.square for moments in self.moments.values()]
        means += [mean.value for mean in (*self.turned.values(), *self.moved.values())]
        return all(bool(torch.isfinite(mean).all()) for mean in means)

    def tokens(self, name: str, site: Site, values: Tensor) -> Tensor:
        """``values`` [batch, …, features] at the module ``name`` as [tokens, features] in float32 or finer, without
        those of padding.

        Padding is known as :mod:`...models.padding` says.
        """
        values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
        mask = padding.real(self.inputs, values, name, row_axis=site.row_axis)
        return values.flatten(0, -2) if mask is None or bool(mask.all()) else values[mask]


@contextmanager
def watched(
    module: nn.Module,
    structure: Structure,
    *,
    inputs: bool = False,
    grams: Collection[str] = (),
    turned: bool = False,
    moved: bool = False,
) -> Iterator[Seen]:
    """Within the context all that ``module`` computes counts; set ``inputs`` of what is yielded before each batch.

    With ``inputs`` there are moments of all readers, with Gram matrices of those named in ``grams``; without, moments
    of these alone.
    """
    seen = Seen()
    hooks: list[Any] = []
    for name, site in readers(structure).items():
        if inputs or name in grams:
            hook = _input_hook(seen, name, site, gram=name in grams)
            hooks.append(module.get_submodule(name).register_forward_pre_hook(hook))
    for site in structure.sites if turned or moved else ():
        if site.kind == "block":
            hooks.append(module.get_submodule(site.block).register_forward_hook(_block_hook(seen, site)))
    for site in structure.sites if turned else ():
        for norm in site.norms:
            hooks.append(module.get_submodule(norm).register_forward_pre_hook(_norm_hook(seen, norm, site)))
        for cut in site.gates if not site.norms else ():
            block = structure.find("block", site.layer)
            turned_round = block is not None and block.row_axis != site.row_axis
            hooks += _turn_hooks(module, seen, site, cut, turned_round=turned_round)
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def readers(structure: Structure) -> dict[str, Site]:
    """The path of every layer that reads units, with a site that it reads."""
    return {cut.layer: site for site in structure.sites for cut in site.gates}


def _input_hook(seen: Seen, name: str, site: Site, *, gram: bool) -> Any:
    def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = seen.tokens(name, site, columns(layer, args[0]))
        if name not in seen.moments:
            seen.moments[name] = Moments.nothing(x.shape[1], x, gram=gram)
        seen.moments[name].add(x)

    return hook


def _block_hook(seen: Seen, site: Site) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        states = (seen.tokens(site.block, site, x) for x in (args[0], first(output)))
        for before, after in _pieces(*states):
            change = after - before
            squares = (after.square().sum(1), (after * change).sum(1), change.square().sum(1))
            seen.turned.setdefault(site, Mean()).add(turn(*squares)[:, None])
            seen.moved.setdefault(site.block, Mean()).add(squares[2][:, None])

    return hook


def _norm_hook(seen: Seen, name: str, site: Site) -> Any:
    """A channel of the stream contributes itself."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        for (x,) in _pieces(seen.tokens(name, site, args[0])):
            squares = x.square()
            seen.turned.setdefault(site, Mean()).add(turn(squares.sum(dim=1, keepdim=True), squares, squares))

    return hook


def _turn_hooks(module: nn.Module, seen: Seen, site: Site, cut: Cut, *, turned_round: bool) -> list[Any]:
    """The reader's input is kept until the stream, with its output added, comes by: with rows and positions the other
    way round where ``turned_round``."""
    reader: Any = module.get_submodule(cut.layer)
    own = places(reader, site, cut)
    kept: list[Tensor] = []

    def see(stream: Tensor) -> None:
        if not kept:
            return
        given = kept.pop()
        stream = stream.transpose(0, 1) if turned_round else stream
        weight, scale = matrix(reader).detach(), module.get_parameter(site.scaled_by) if site.scaled_by else None
        s, x = seen.tokens(cut.layer, site, stream), seen.tokens(cut.layer, site, given)
        if stream.shape[:-1] != given.shape[:-1] or stream.shape[-1] != weight.shape[0]:
            s, scale = x @ weight.to(x).T, None
            s = s if reader.bias is None else s + reader.bias.detach()
        weight = (weight if scale is None else scale[:, None] * weight).to(x)
        for stream, given in _pieces(s, x):
            seen.turned.setdefault(site, Mean()).add(turns(stream, given, weight, site, own))

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept[:] = [columns(reader, args[0].detach())]

    hooks: list[Any] = [reader.register_forward_pre_hook(keep)]
    if site.sum_at:
        hooks.append(module.get_submodule(site.sum_at).register_forward_pre_hook(lambda _, args: see(args[0])))
    else:
        last = module.get_submodule(site.block) if site.block else reader
        hooks.append(last.register_forward_hook(lambda _, __, output: see(first(output))))
    return hooks


def _pieces(*values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(tensor, TOKENS) for tensor in values), strict=True)


def first(output: Any) -> Tensor:
    """The hidden states that a block returns, alone or before other things."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
