"""Folders of images or recordings.

Either ``metadata.csv`` (or ``.jsonl``) names the files, in a column ``file_name``, with their labels or texts beside
them; or every class has a folder of its own; or the files have no labels. Where all there is are folders called
``train`` and ``test`` (or ``val`` …), each is such a folder itself: they are the data's own split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from . import HELD_OUT, MOST_ROWS, Table, table

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
RECORDINGS = (".wav", ".flac", ".ogg", ".mp3")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def takes(path: Path) -> bool:
    return path.is_dir()


def read(path: Path, columns: Mapping[str, str], *, seed: int) -> Table:
    """The files below a folder, by the field ``image`` or ``audio``, with ``label`` where the folder says one."""
    described = next((path / name for name in METADATA if (path / name).is_file()), None)
    if described:
        return _described(described, columns, seed)
    parts = {part.name for part in path.iterdir() if part.is_dir()}
    held = next((name for name in HELD_OUT if name in parts), None)
    if held and "train" in parts and parts <= {"train", *HELD_OUT}:
        return _joined(path, *(read(path / name, columns, seed=seed) for name in ("train", held)))
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGES + RECORDINGS and file.is_file())
    if not files:
        raise InputError(f"{path} holds no images, no recordings and no {METADATA[0]}.")
    field = _field(path, files)
    if len(files) > MOST_ROWS:
        files.sort(key=lambda file: hashlib.sha256(f"{seed}\n{file.relative_to(path)}".encode()).digest())
        files = sorted(files[:MOST_ROWS])
    classes = [file.relative_to(path).parts[:-1] for file in files]
    found: dict[str, Any] = {field: files}
    if all(classes):
        found["label"] = [names[0] for names in classes]
    elif any(classes):
        stray = files[next(i for i, names in enumerate(classes) if not names)]
        raise InputError(f"{path}: {stray.name} is in no class's folder, and other files are.")
    return Table(str(path), found, label_names=tuple(sorted(set(found.get("label", ())))))


def _joined(path: Path, train: Table, held: Table) -> Table:
    """The two parts of the data's own split as one table."""
    if set(train.columns) != set(held.columns):
        told = " and ".join(", ".join(part.columns) for part in (train, held))
        raise InputError(f"{path}: the parts for training and for evaluation differ in what they have: {told}.")
    columns = {name: [*values, *held.columns[name]] for name, values in train.columns.items()}
    names = tuple(sorted({*train.label_names, *held.label_names}))
    return Table(str(path), columns, np.repeat([False, True], [len(train), len(held)]), names)


def _field(path: Path, files: list[Path]) -> str:
    kinds = {"audio" if file.suffix.lower() in RECORDINGS else "image" for file in files}
    if len(kinds) > 1:
        raise InputError(f"{path} holds both images and recordings.")
    return kinds.pop()


def _described(path: Path, columns: Mapping[str, str], seed: int) -> Table:
    found = table.read(path, {**columns, "image": "file_name"}, seed=seed)
    if "file_name" not in found.columns:
        raise InputError(f"{path} has no column 'file_name' (it has: {', '.join(found.columns)}).")
    files = [Path(str(file)) for file in found.columns["file_name"]]
    missing = [file for file in files if not file.is_file() or not file.resolve().is_relative_to(path.parent.resolve())]
    if missing:
        raise InputError(
            f"{path} names '{missing[0].name}' ({len(missing)} in all), which is not a file in its folder."
        )
    others = {name: values for name, values in found.columns.items() if name != "file_name"}
    return Table(str(path), {_field(path.parent, files): files, **others})
