"""Cells: those of a table's column as texts, as numbers, as the classes that a model tells apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from . import sources
from .data import Ints
from .sources import Table


def filled(values: Sequence[Any], table: Table, name: str) -> list[Any]:
    """The values of the column ``name``; InputError where one of them is nothing."""
    listed = [values[i] for i in range(len(values))]
    empty = [i for i, value in enumerate(listed) if value is None or (isinstance(value, str) and not value)]
    if empty:
        raise InputError(
            f"{table.origin}: {len(empty)} rows have nothing in '{name}', the first is row {empty[0] + 1}."
        )
    return listed


def texts(table: Table, field: str, columns: Mapping[str, str]) -> list[str]:
    """The values of a field, which are texts; InputError where one is empty."""
    values = sources.column(table, field, columns)
    return [str(value) for value in filled(values, table, columns.get(field, field))]


def numbers(values: Sequence[Any], table: Table, name: str) -> NDArray[np.float32]:
    """The values of the column ``name`` as numbers [n]; InputError where one is not a finite number."""
    try:
        found = np.array([float(value) for value in values], dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{table.origin}: '{name}' must hold numbers for this model ({error}).") from error
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found))[0]) + 1
        raise InputError(f"{table.origin}: the number in '{name}' of row {row} is not finite.")
    return found


def words(values: Sequence[Any], table: Table) -> list[str]:
    """Labels as words: whole numbers by the names that the source gives them, if it does."""
    found = [str(int(v)) if isinstance(v, (float, np.floating)) and v == int(v) else str(v) for v in values]
    by_number = {str(i): name for i, name in enumerate(table.label_names)}
    return [by_number.get(word, word) for word in found]


def classes(labels: Sequence[str], names: Sequence[str], table: Table) -> Ints:
    """Label words as places [n] in the model's ``names``: by name, or as 0 … k-1, or as 1 … k where all k occur.

    Where the model's names say nothing (LABEL_0 …), the source's own names stand in their order. Raises InputError
    where a word fits neither, or where all rows have one label.
    """
    counts = Counter(labels)
    if len(counts) < 2:
        raise InputError(
            f"{table.origin}: all {len(labels)} rows have the label '{labels[0]}'; at least two labels are needed."
        )
    by_name = {name.lower(): index for index, name in enumerate(names)}
    by_number = {str(index): index for index in range(len(names))}
    from_one = {str(index + 1): index for index in range(len(names))}
    ways = [by_name, by_number, from_one]
    if all(name == f"LABEL_{index}" for index, name in enumerate(names)) and len(table.label_names) == len(names):
        ways.append({name.lower(): index for index, name in enumerate(table.label_names)})
    for known in ways:
        if set(map(str.lower, counts)) <= set(known) and (known is not from_one or len(counts) == len(names)):
            return np.array([known[word.lower()] for word in labels], dtype=np.int64)
    strange = next((word for word in counts if word.lower() not in by_name and word not in by_number), "")
    raise InputError(
        f"{table.origin}: the label '{strange}' ({counts[strange]} rows) is not one of the model's {len(names)} "
        f"labels: {', '.join(names)}, or 0 to {len(names) - 1}."
    )
