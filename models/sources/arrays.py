"""Arrays: an ``.npz`` file, one array a column, the first axis being rows."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...errors import InputError
from . import Table


def takes(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".npz"


def read(path: Path, columns: Mapping[str, str], *, seed: int) -> Table:
    """The arrays of a file; InputError where they are not of one length, or hold objects, which are never unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as arrays: {' '.join(str(error).split())}.") from error
    lengths = {name: len(array) if array.ndim else 0 for name, array in found.items()}
    if len(set(lengths.values())) != 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(f"{path}: the arrays must have one row each for every row, and have {told or 'none'}.")
    return Table(str(path), found)
