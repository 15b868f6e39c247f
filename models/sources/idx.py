"""idx files, as MNIST comes: a folder with images and labels of a training and a test part.

Source  The format is described on yann.lecun.com/exdb/mnist: a magic number with type and rank, the sizes, the values.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError
from . import Table

TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
TRAIN, TEST = "train", "t10k"
MOST_BYTES = 1 << 31


def takes(path: Path) -> bool:
    return path.is_dir() and any(path.glob("*idx?-ubyte*"))


def read(path: Path, columns: Mapping[str, str], *, seed: int) -> Table:
    """Images and labels; the test part, where there is one, is what the data holds out for evaluation."""
    parts: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    for part in (TRAIN, TEST):
        files = [_file(path, f"{part}*{kind}*") for kind in ("images", "labels")]
        if files[0] is not None and files[1] is not None:
            parts[part] = decode(files[0]), decode(files[1])
            if len(parts[part][0]) != len(parts[part][1]):
                raise InputError(f"{path}: {len(parts[part][0])} images and {len(parts[part][1])} labels in '{part}'.")
    if not parts:
        raise InputError(f"{path} holds no pair of '{TRAIN}-images' and '{TRAIN}-labels' idx files.")
    images, labels = (np.concatenate([parts[part][i] for part in parts]) for i in (0, 1))
    held_out = np.concatenate([np.full(len(parts[part][1]), part == TEST) for part in parts])
    return Table(str(path), {"image": images, "label": labels}, held_out if len(parts) > 1 else None)


def _file(path: Path, pattern: str) -> Path | None:
    return next(iter(sorted(path.glob(pattern))), None)


def decode(path: Path) -> NDArray[Any]:
    """The array in an idx file, compressed with gzip or not; InputError where the file is not one."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            content = stream.read(MOST_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in TYPES or len(content) < 4 + 4 * content[3]:
        raise InputError(f"{path} is not an idx file: it does not begin with a type and sizes.")
    start = 4 + 4 * content[3]
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], dtype=">u4"))
    kind = np.dtype(TYPES[content[2]])
    if len(content) - start != int(np.prod([*map(int, shape)], dtype=object)) * kind.itemsize:
        raise InputError(f"{path} is cut short: {len(content) - start} bytes for an array of shape {list(shape)}.")
    return np.frombuffer(content[start:], dtype=kind).reshape(shape)
