"""Saved datasets: folders that ``datasets.Dataset.save_to_disk`` wrote, read through the memory map of that library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError, UnavailableError
from . import HELD_OUT, MOST_ROWS, Table


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
    """The columns of a dataset. Of its splits ``train`` is read, or all whose names say nothing of evaluation, and the
    first of ``HELD_OUT``, which is kept for that.

    Of more than ``MOST_ROWS`` rows ``seed`` draws a sample. Images and recordings come as their files' bytes; nothing
    of the library's own decoding is asked for.
    """
    try:
        import datasets
    except ImportError as error:
        raise UnavailableError("Saved datasets need the datasets library: install edgepress[datasets].") from error
    try:
        found = datasets.load_from_disk(str(path))
        parts = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
        others = ["train"] if "train" in parts else [name for name in parts if name not in HELD_OUT]
        held = next((name for name in HELD_OUT if name in parts), None) if others else None
        chosen = [*others, held] if held else others or list(parts)
        whole = datasets.concatenate_datasets([_undecoded(parts[name], datasets) for name in chosen])
    except Exception as error:  # the library raises what its parsers raise
        raise InputError(f"{path} cannot be read as a saved dataset: {' '.join(str(error).split())}.") from error
    held_out = np.repeat([name == held for name in chosen], [len(parts[name]) for name in chosen]) if held else None
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
