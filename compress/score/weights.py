"""What each unit owns of a module's weights: the rows that make it and the columns that read it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...models.layers import matrix, window
from ...models.structure import Cut, Site, Structure


def power_sums(module: nn.Module, structure: Structure, site: Site, power: int) -> tuple[Tensor, Tensor]:
    """The sum of |w|^power over the weights of each unit of ``site``, and their number, both float64 [count].

    A unit's weights are its rows in every layer that makes it and its columns in every one that reads it; a key/value
    group has those of its query heads too, a block all of its parameters. Biases, norms and tables of embeddings do not
    count.
    """
    if site.kind == "block":
        parameters = [p.detach().double() for p in module.get_submodule(site.block).parameters()]
        total = torch.stack([p.abs().pow(power).sum() for p in parameters]).sum().cpu()
        return total[None], torch.tensor([sum(p.numel() for p in parameters)], dtype=torch.float64)
    sums, sizes = torch.zeros(2, site.count, dtype=torch.float64)
    for cut in site.cuts:
        for own in _owned(module, cut, site.count):
            sums += own.double().abs().pow(power).sum(dim=1).cpu()
            sizes += own.shape[1]
    heads = structure.find("head", site.layer) if site.kind == "kv" else None
    if heads is not None:
        owner = torch.tensor(site.parts)
        along, more = power_sums(module, structure, heads, power)
        sums, sizes = sums.index_add(0, owner, along), sizes.index_add(0, owner, more)
    return sums, sizes


def _owned(module: nn.Module, cut: Cut, count: int) -> Iterator[Tensor]:
    """The weights of ``count`` units in ``cut``, a row for each; nothing where it is not of a layer with a matrix."""
    path, _, name = cut.layer.rpartition(".")
    layer = getattr(module.get_submodule(path), name)
    if not isinstance(layer, nn.Module) or isinstance(layer, nn.Embedding) or layer.get_parameter("weight").dim() < 2:
        return
    weight = matrix(layer).detach()
    by_feature, step = (weight, 1) if cut.side == "out" else (weight.T, window(layer))
    for offset in cut.offsets:
        yield by_feature[offset * step : (offset + count * cut.width) * step].reshape(count, -1)


def places(layer: nn.Module, site: Site, cut: Cut) -> Tensor:
    """For each part of ``site`` the columns that it has in the matrix of ``layer``, which reads it through ``cut``:
    int64 [parts, columns of each]."""
    step, parts = window(layer), len(site.parts)
    features = torch.tensor([cut.features([part]) for part in range(parts)])
    return (features[..., None] * step + torch.arange(step)).flatten(1)


def by_unit(site: Site, of_parts: Tensor) -> Tensor:
    """The sum over each unit's parts: [parts, …] gives [count, …]."""
    return of_parts.new_zeros(site.count, *of_parts.shape[1:]).index_add(0, torch.tensor(site.parts), of_parts)


def of_blocks(structure: Structure, scores: Tensor) -> Tensor:
    """``scores`` [num_units] with each block's set to the sum over the units that are in it, each feature once."""
    scores = scores.clone()
    inside = {site.block: torch.zeros((), dtype=scores.dtype) for site in structure.of_kind("block")}
    for site, place in structure.slices():
        if site.block in inside and site.kind not in {"block", "kv"}:
            inside[site.block] += scores[place].sum()
    for site, place in structure.slices():
        if site.kind == "block":
            scores[place] = inside[site.block]
    return scores
