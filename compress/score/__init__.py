"""Scores: how much each unit matters, under one method. A higher score means that more is lost with the unit.

A method is one file with ``score(workload, structure, *, rows, progress, …) -> Tensor[num_units]``; scores are compared
within one kind of unit only, never between kinds.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, UsageError
from ...models.structure import Structure
from ...models.workload import Progress, Workload

METHODS = ("fisher", "taylor", "magnitude", "random")


@dataclass(frozen=True)
class Scores:
    """``values`` is float64 of shape [num_units], in the order of ``structure.units``."""

    method: str
    structure: Structure
    values: Tensor

    def of(self, kind: str) -> list[list[float]]:
        """The scores of one kind: a list for each layer."""
        return [self.values[place].tolist() for site, place in self.structure.slices() if site.kind == kind]


def get(name: str) -> ModuleType:
    """The module ``compress/score/<name>.py``."""
    if name not in METHODS:
        raise UsageError(f"There is no score '{name}' (known: {', '.join(METHODS)}).")
    return import_module(f"{__name__}.{name}")


def score(
    workload: Workload,
    method: str = "fisher",
    *,
    rows: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Scores:
    """Score every unit of ``workload`` on ``rows`` calibration rows (taken in the labels' shares by ``seed``).

    ``options`` are the method's keyword arguments. Raises InputError where a score is not finite.
    """
    sample = workload.data.calibration.take(rows, seed)
    values: Tensor = get(method).score(
        workload, workload.structure, rows=sample, seed=seed, progress=progress, **options
    )
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise InputError(f"{bad} of {len(values)} {method} scores of {workload.name} are not finite numbers.")
    return Scores(method, workload.structure, values.double())


def to_json(scores: Scores) -> dict[str, Any]:
    """``units`` with the cost and the score of each, and ``validation``, which is empty until it has been made."""
    units = [
        {
            "kind": site.kind,
            "layer": site.layer,
            "index": index,
            "params": site.params,
            "macs": site.macs,
            "scores": {scores.method: float(value)},
        }
        for site, place in scores.structure.slices()
        for index, value in enumerate(scores.values[place])
    ]
    return {"units": units, "validation": {}}
