"""Tables: CSV, TSV, JSON lines and Parquet, read in pieces, so that a file larger than memory can be sampled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ...errors import InputError, UnavailableError
from . import FIELDS, MOST_ROWS, Table

PIECE = 10_000
ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
FILES = ("image", "audio")


def takes(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in ENDINGS


def read(path: Path, columns: Mapping[str, str], *, seed: int) -> Table:
    """The columns of a file; of more than ``MOST_ROWS`` rows those whose hashes are smallest, in the file's order.

    Paths in columns of images and recordings are relative to the file. Raises InputError, naming the file and what is
    wrong in it, for anything that cannot be used.
    """
    kept: list[tuple[bytes, int, tuple[Any, ...]]] = []
    names: list[str] = []
    wanted: list[str] = []
    row = 0
    for piece in _pieces(path):
        piece.columns = [str(name) for name in piece.columns]
        if not names:
            names = list(piece.columns)
            asked = [columns.get(field, field) for field in (*FIELDS, *columns)]
            wanted = [name for name in names if name in asked] or names
        for values in zip(*(piece[name] for name in wanted), strict=True):
            cells = tuple(map(_plain, values))
            key = hashlib.sha256(f"{seed}\n{json.dumps(cells, default=str)}".encode()).digest()
            kept.append((key, row, cells))
            row += 1
        if len(kept) > 2 * MOST_ROWS:
            kept = sorted(kept)[:MOST_ROWS]
    if not names:
        raise InputError(f"{path} is empty.")
    if len(kept) > MOST_ROWS:
        kept = sorted(kept)[:MOST_ROWS]
    kept.sort(key=lambda entry: entry[1])
    place = {name: i for i, name in enumerate(wanted)}
    nothing = [None] * len(kept)  # of columns that are known, so that a message can name them, but not read
    found: dict[str, Any] = {
        name: [cells[place[name]] for _, _, cells in kept] if name in place else nothing for name in names
    }
    for field in FILES:
        name = columns.get(field, field)
        if name in found:
            found[name] = [_file(value, path.parent) for value in found[name]]
    return Table(str(path), found)


def _file(value: Any, folder: Path) -> Any:
    """An image or a recording: what a cell holds of it, bytes or numbers, or else the path that it names."""
    if isinstance(value, dict):  # as datasets keep them in Parquet files
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, (bytes, list)) else folder / str(value)


def _plain(value: Any) -> Any:
    """A cell without its surrounding blanks; None where there is nothing in it."""
    if isinstance(value, str):
        return value.strip() or None
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, dict)):
        return value
    return None if pd.isna(value) else value


def _pieces(path: Path) -> Iterator[pd.DataFrame]:
    ending = path.suffix.lower()
    if not path.stat().st_size:
        raise InputError(f"{path} is empty.")
    try:
        if ending == ".parquet":
            yield from _parquet(path)
        elif ending == ".jsonl":
            yield from pd.read_json(path, lines=True, dtype=False, chunksize=PIECE)
        else:
            yield from _separated(path, "\t" if ending == ".tsv" else ",")
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{path} is empty.") from error
    except UnicodeDecodeError as error:
        line = _first_undecodable(path)
        raise InputError(
            f"{path} is not UTF-8 text, from line {line} on; convert it first, as with iconv -f cp1252 -t utf-8."
        ) from error
    except (pd.errors.ParserError, ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error


def _separated(path: Path, separator: str) -> Iterator[pd.DataFrame]:
    for piece in pd.read_csv(path, dtype=str, keep_default_na=False, sep=separator, chunksize=PIECE):
        if not isinstance(piece.index, pd.RangeIndex):  # pandas takes surplus fields at a row's begin for its name
            raise InputError(f"{path}: its rows have more fields than its first line has names.")
        yield piece


def _first_undecodable(path: Path) -> int:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


def _parquet(path: Path) -> Iterator[pd.DataFrame]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UnavailableError("Parquet files need pyarrow: install edgepress[datasets].") from error
    with parquet.ParquetFile(path) as file:
        for piece in file.iter_batches(batch_size=PIECE):
            yield piece.to_pandas()
