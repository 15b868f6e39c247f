"""The zoo: real trained models with real labelled rows, by name.

An entry is one file with ``load(*, seed, progress) -> Workload``; ``zoo:minilm-reviews`` is ``zoo/minilm_reviews.py``.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ...errors import UsageError
from ..workload import Progress, Workload

ZOO = ("minilm-reviews",)


def get(name: str) -> ModuleType:
    """The module of an entry; UsageError where there is none."""
    if name not in ZOO:
        raise UsageError(f"There is no zoo model '{name}' (known: {', '.join(ZOO)}).")
    return import_module(f"{__name__}.{name.replace('-', '_')}")


def load(name: str, *, seed: int = 0, progress: Progress | None = None) -> Workload:
    """The workload ``zoo:name``, fetched and fitted where it is not in the cache yet."""
    workload: Workload = get(name).load(seed=seed, progress=progress)
    return workload
