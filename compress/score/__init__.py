"""Scores: how much each unit matters, under one method. A higher score means that more is lost with the unit.

A method is one file with ``NEEDS``, the statistics of the calibration rows that it is made of, and
``score(evidence, …) -> Tensor[num_units]``, whose keyword arguments are its options. The statistics of all methods that
are asked for come from one pass (:mod:`.evidence`). Scores are compared within one kind of unit only, never between
kinds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError, UsageError
from ...models.structure import Structure
from ...models.workload import Progress, Workload

METHODS = (
    "masked_taylor",
    "second_order",
    "fisher",
    "fisher_block",
    "taylor",
    "head_gate",
    "hessian",
    "obs",
    "wanda",
    "block_influence",
    "magnitude",
    "lamp",
    "random",
    "ablation",
)


@dataclass(frozen=True)
class Scores:
    """``values`` is float64 of shape [num_units], in the order of ``structure.units``."""

    method: str
    structure: Structure
    values: Tensor

    def of(self, kind: str) -> list[list[float]]:
        """The scores of one kind: a list for each layer."""
        return [self.values[place].tolist() for site, place in self.structure.slices() if site.kind == kind]


def canonical(name: str) -> str:
    """``name`` as it stands in ``METHODS``: the command line also writes it with hyphens."""
    found = name.replace("-", "_")
    if found not in METHODS:
        raise UsageError(f"There is no score '{name}' (known: {', '.join(METHODS)}).")
    return found


def get(name: str) -> ModuleType:
    """The module ``compress/score/<name>.py``."""
    return import_module(f"{__name__}.{canonical(name)}")


def cheap() -> tuple[str, ...]:
    """The methods that one pass over the rows serves, all together."""
    return tuple(name for name in METHODS if "rows" not in get(name).NEEDS)


def score(
    workload: Workload,
    method: str = "masked_taylor",
    *,
    rows: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Scores:
    """Score every unit of ``workload`` on ``rows`` calibration rows (taken in the labels' shares by ``seed``).

    ``options`` are the method's keyword arguments. Raises InputError where a score is not finite, or where a NaN or an
    infinity arises on the way, naming the layer and the row.
    """
    (scores,) = score_all(workload, (method,), rows=rows, seed=seed, progress=progress, options={method: options})
    return scores


def score_all(
    workload: Workload,
    methods: Sequence[str],
    *,
    rows: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Scores]:
    """The scores of several methods on the same rows, as :func:`score` gives each, from one pass for all of them.

    ``options`` holds keyword arguments by method. Methods that need more than one pass make their own after it. Raises
    InputError where ``workload`` has no units.
    """
    from .evidence import gather

    modules = {canonical(method): get(method) for method in methods}
    chosen = {canonical(method): given for method, given in (options or {}).items()}
    if not workload.structure.num_units:
        raise InputError(f"Nothing in {workload.name} can be removed: {'; '.join(workload.structure.notes)}.")
    needs = {need for module in modules.values() for need in module.NEEDS}
    sample = workload.data.calibration.take(rows, seed)
    evidence = gather(workload, needs, rows=sample, seed=seed, progress=progress)
    found = []
    for method, module in modules.items():
        values: Tensor = module.score(evidence, **chosen.get(method, {}))
        bad = int((~torch.isfinite(values)).sum())
        if bad:
            raise InputError(f"{bad} of {len(values)} {method} scores of {workload.name} are not finite numbers.")
        found.append(Scores(method, workload.structure, values.double().cpu()))
    return found


def to_json(*scores: Scores, validation: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``units`` with the cost of each and its score by every method, and ``validation``, empty where none was made.

    All ``scores`` are of one structure.
    """
    units = [
        {
            "kind": site.kind,
            "layer": site.layer,
            "index": index,
            "params": site.params,
            "macs": site.macs,
            "scores": {one.method: float(one.values[place.start + index]) for one in scores},
        }
        for site, place in (scores[0].structure.slices() if scores else ())
        for index in range(site.count)
    ]
    return {"units": units, "validation": dict(validation or {})}
