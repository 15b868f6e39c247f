"""Saved datasets: folders that ``datasets.Dataset.save_to_disk`` wrote, read through the memory map of that library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError, UnavailableError
from . import MOST_ROWS, Table

HELD_OUT = ("test", "validation", "eval", "dev")


def takes(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


@dataclass(frozen=True)
class _Column(Sequence[Any]):
    """One column of a dataset, read where it is asked for."""

    dataset: Any
    name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: Any) -> Any:
        value = self.dataset[int(position)][self.name]
        if isinstance(value, dict) and value.get("path") and not value.get("bytes"):
            return Path(value["path"])
        return value["bytes"] if isinstance(value, dict) and "bytes" in value else value


def read(path: Path, columns: Mapping[str, str], *, seed: int) -> Table:
    """The columns of a dataset; of several splits, the first of ``HELD_OUT`` is kept for evaluation.

    Images and recordings come as their files' bytes; nothing of the library's own decoding is asked for.
    """
    try:
        import datasets
    except ImportError as error:
        raise UnavailableError("Saved datasets need the datasets library: install edgepress[datasets].") from error
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises what its parsers raise
        raise InputError(f"{path} cannot be read as a saved dataset: {' '.join(str(error).split())}.") from error
    parts = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
    held = next((name for name in HELD_OUT if name in parts and len(parts) > 1), None)
    chosen = [_undecoded(parts[name], datasets) for name in parts if name == held or name not in HELD_OUT]
    flags = [np.full(len(parts[name]), name == held) for name in parts if name == held or name not in HELD_OUT]
    whole = datasets.concatenate_datasets(chosen)
    held_out = np.concatenate(flags) if held else None
    if len(whole) > MOST_ROWS:
        kept = np.sort(np.random.default_rng(seed).permutation(len(whole))[:MOST_ROWS])
        whole, held_out = whole.select(kept), held_out[kept] if held_out is not None else None
    feature = whole.features.get(columns.get("label", "label"))
    names = tuple(map(str, getattr(getattr(feature, "feature", feature), "names", None) or ()))
    return Table(str(path), {name: _Column(whole, name) for name in whole.column_names}, held_out, names)


def _undecoded(part: Any, datasets: Any) -> Any:
    for name, feature in part.features.items():
        if isinstance(feature, (datasets.Image, datasets.Audio)):
            part = part.cast_column(name, type(feature)(decode=False))
    return part
