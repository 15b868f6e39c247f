"""How far each unit turns what it is added to.

Of a stream s that holds the contribution c of a unit, among others, 1 - cos(s, s - c) says how much its direction
changes when the unit goes: ShortGPT's block influence (Men et al. 2024, arXiv 2403.03853), for parts of a block too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...models.structure import Site


def turns(stream: Tensor, x: Tensor, weight: Tensor, site: Site, places: Tensor) -> Tensor:
    """1 - cos(s, s - c) for every token and unit of ``site``, [tokens, count].

    ``stream`` [tokens, out] is s, ``x`` [tokens, columns] what the reader with the matrix ``weight`` [out, columns] is
    given. A unit contributes c = W[:, S] x[S], where S are the columns that ``places`` [parts, columns of each] gives
    to its parts.
    """
    if places.shape[1] == 1:
        own, columns = _at(x, places[:, 0]), _at(weight, places[:, 0])
        along, square = own * (stream @ columns), own.square() * columns.square().sum(dim=0)
        if len(places) == site.count:
            return turn(stream.square().sum(dim=1, keepdim=True), along, square)
    owner = torch.tensor(site.parts)
    made = [x[:, own] @ weight[:, own].T for own in (places[owner == unit].flatten() for unit in range(site.count))]
    along = torch.stack([(stream * c).sum(dim=1) for c in made], dim=1)
    square = torch.stack([c.square().sum(dim=1) for c in made], dim=1)
    return turn(stream.square().sum(dim=1, keepdim=True), along, square)


def _at(x: Tensor, columns: Tensor) -> Tensor:
    """``x[:, columns]``, without a copy where these are all in order."""
    return x if torch.equal(columns, torch.arange(x.shape[1])) else x[:, columns]


def turn(whole: Tensor, along: Tensor, part: Tensor) -> Tensor:
    """1 - cos(s, s - c) from |s|^2, s·c and |c|^2, without the loss of digits that the plain formula has where c is
    small: there it is sin^2 / (1 + cos)."""
    rest = (whole - 2 * along + part).clamp(min=0)
    norms = (whole * rest).clamp(min=torch.finfo(whole.dtype).tiny)
    cosine = ((whole - along) / norms.sqrt()).clamp(-1, 1)
    sine_square = (whole * part - along.square()).clamp(min=0) / norms
    return torch.where(cosine > 0, sine_square / (1 + cosine), 1 - cosine)
