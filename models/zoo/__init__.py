"""The zoo: real trained models with real labelled rows, by name.

An entry is one file with ``ENTRY``, which says what it is, and ``load(*, seed, progress) -> Workload``;
``zoo:minilm-reviews`` is ``zoo/minilm_reviews.py``. What was trained for the zoo is in ``weights/``, each with the log
of its training, and the scripts that did it are in ``recipes/``.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from types import ModuleType
from typing import Any

from ...errors import UsageError
from ..workload import Progress, Workload

ZOO = (
    "minilm-reviews",
    "dinov2-fashion",
    "vit-fashion",
    "cnn-mnist",
    "whisper-tiny-en",
    "llama-stdlib",
    "smollm2-135m",
)


def get(name: str) -> ModuleType:
    """The module of an entry; UsageError where there is none."""
    if name not in ZOO:
        raise UsageError(f"There is no zoo model '{name}' (known: {', '.join(ZOO)}).")
    return import_module(f"{__name__}.{name.replace('-', '_')}")


def load(name: str, *, seed: int = 0, progress: Progress | None = None) -> Workload:
    """The workload ``zoo:name``, fetched and fitted where it is not in the cache yet."""
    workload: Workload = get(name).load(seed=seed, progress=progress)
    return workload


def listing() -> list[dict[str, Any]]:
    """What each entry says of itself, as plain data; nothing is downloaded."""
    rows = []
    for entry in (get(name).ENTRY for name in ZOO):
        quality = {field: value for field, value in asdict(entry.quality).items() if not field.startswith("drop")}
        rows.append(
            {
                "name": entry.name,
                "what": entry.what,
                "task": entry.task,
                "params": entry.params,
                "download_bytes": entry.download,
                "quality": quality,
                "origin": entry.origin,
                "licence": entry.licence,
            }
        )
    return rows
