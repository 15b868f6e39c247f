"""Maps: where every head of a model looks in one row, kept as they are, for pictures.

The statistics of ``attention.py`` sum maps up over many rows and keep none; here the same observer keeps those of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import token_merging
from ..workload import Workload
from . import attention
from .tokens import Tokens

LONGEST = 400
"""Keys or queries of a map that is kept, at most."""


@dataclass(frozen=True)
class Map:
    """The heads of one attention; ``run`` counts how often shared blocks have run before."""

    stack: str
    layer: int
    kind: str
    run: int
    heads: NDArray[np.float32]
    """[heads, queries, keys]; each row of keys sums to 1."""


class _Keeping(attention.Observer):
    """Keeps the maps of a batch of one row instead of summing them up."""

    def __init__(self, places: list[attention.Place], tokens: Tokens) -> None:
        super().__init__(places, tokens)
        self.kept: list[Map] = []

    def _see(self, place: attention.Place, maps: attention.Maps) -> None:
        batch, heads, queries, keys = maps.shape
        run = self.runs[place.name]
        self.runs[place.name] += 1
        if batch != 1 or heads != place.heads or max(queries, keys) > LONGEST:  # windows of an image are a batch
            return
        taken: Any = maps.part(slice(None))[0].float().numpy(force=True)
        self.kept.append(Map(place.stack, place.layer, place.kind, run, taken))


def of_row(workload: Workload, inputs: Mapping[str, Tensor]) -> list[Map]:
    """The maps of the attentions of ``workload`` that one row, a batch of one, goes through, in their order.

    None where it has no attention, or merges tokens as it goes.
    """
    if not workload.structure.of_kind("head") or token_merging.merged(workload.module):
        return []
    tokens = Tokens(workload.structure)
    tokens.start(None)
    with torch.no_grad(), attention.observed(workload, tokens, _Keeping) as observer:
        workload.forward(inputs)
    return observer.kept
