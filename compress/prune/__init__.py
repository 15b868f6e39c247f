"""Pruning: from scores and a budget to a plan, to a smaller model, to one whose rest makes up for what went."""

from __future__ import annotations

from collections.abc import Mapping

from ...models import surgery
from ...models.workload import Workload
from ..score import Scores
from .allocate import by_ratio
from .allocate import uniform as same_everywhere


def prune(
    workload: Workload,
    scores: Scores,
    *,
    ratio: float | Mapping[str, float] = 0.5,
    uniform: bool = False,
    in_place: bool = False,
) -> Workload:
    """``workload`` without the ``ratio`` of its units that score lowest: a new workload, really smaller.

    A number is the share of heads and of channels that goes; a mapping gives it by kind. With ``uniform`` every layer
    loses the same number. ``in_place`` cuts the given module itself, and needs no memory for a second one.
    """
    allocate = same_everywhere if uniform else by_ratio
    return surgery.prune(workload, allocate(workload.structure, scores.values, ratio), in_place=in_place)
