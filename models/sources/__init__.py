"""Sources: what people keep labelled rows in, read into one form.

A source is one file with ``takes(path) -> bool`` and ``read(path, columns, *, seed) -> Table``; the first in
``SOURCES`` that takes a path reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError, UsageError

SOURCES = ("table", "arrays", "saved_dataset", "idx", "folder")
FIELDS = ("text", "text_pair", "tokens", "target", "label", "image", "audio")
"""What a column can be mapped to. ``label`` is a class, a number, or one class for each of ``tokens``; ``target`` is
the text to produce. A model's own inputs are columns under their names."""
NO_COLUMN = "-"
"""Mapped to ``label``, it says that the rows have none."""
HELD_OUT = ("test", "validation", "valid", "val", "eval", "dev")
"""What a part of the data is called that its makers keep for evaluation."""
MOST_ROWS = 100_000
"""Rows that are kept of a larger table or folder: those whose hashes are smallest, whatever their order."""


@dataclass(frozen=True)
class Table:
    """Rows as they were found: for each column one value a row, which may be read only when it is asked for.

    An image or a recording is a path, the bytes of a file, or an array.
    """

    origin: str
    columns: Mapping[str, Any]
    held_out: NDArray[np.bool_] | None = None
    """The rows that the source itself keeps for evaluation."""
    label_names: tuple[str, ...] = ()
    """What whole-number labels stand for, where the source says it."""

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))


def read(data: str, columns: Mapping[str, str], *, seed: int = 0) -> Table:
    """The rows in the file, folder, or function of the user's called ``data``.

    ``columns`` maps fields to the source's own column names. Raises InputError where nothing can be read.
    """
    from .. import functions

    if functions.named(data):
        return _called(data, functions.call(data))
    path = Path(data)
    if not path.exists():
        raise InputError(f"There is no data file '{path}'.")
    for name in SOURCES:
        source = import_module(f"{__name__}.{name}")
        if source.takes(path):
            table: Table = source.read(path, columns, seed=seed)
            if not len(table):
                raise InputError(f"{path} has no rows.")
            return table
    raise UsageError(
        f"{path} is not something that rows are read from: a .csv, .tsv, .jsonl, .parquet or .npz file, a folder of "
        f"images or recordings, of idx files, or a saved dataset."
    )


def column(table: Table, field: str, columns: Mapping[str, str]) -> Any:
    """The values of one field, one a row; InputError, naming the columns there are, where there is none."""
    name = columns.get(field, field)
    if name not in table.columns:
        hint = f"; map it with --columns {field}=…" if field in FIELDS else ""
        raise InputError(f"{table.origin} has no column '{name}' (it has: {', '.join(map(str, table.columns))}){hint}.")
    return table.columns[name]


def _called(name: str, made: Any) -> Table:
    """Rows from a function: a mapping of columns, or a list of mappings, one a row."""
    if isinstance(made, Sequence) and made and all(isinstance(row, Mapping) for row in made):
        made = {key: [row.get(key) for row in made] for key in made[0]}
    if not isinstance(made, Mapping) or not made or len({len(values) for values in made.values()}) != 1:
        raise InputError(f"{name}() must return columns of one length by name, or a list of rows, each a mapping.")
    return Table(f"{name}()", made)
