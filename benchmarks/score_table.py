"""Scores as tables: a line for each unit, how the methods agree, and the cells of a heat map; and the files they go to.

Everything is made of the document that ``score --json`` prints, so that a page can be made of a file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ..errors import UnavailableError, UsageError
from ..files import write_bytes

Row = dict[str, Any]

UNIT = ("kind", "layer", "index", "params", "macs")
ENDINGS = (".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Grid:
    """The scores of one kind of unit as a picture: a row a layer, or one row where each layer has one unit."""

    labels: tuple[str, ...]
    columns: tuple[str, ...]
    """The first unit of each cell, or the layer where a row has all layers."""
    shades: tuple[tuple[float, ...], ...]
    """From 0, the least important of all cells, to 1, by rank."""
    tips: tuple[tuple[str, ...], ...]
    size: int
    """Units in a cell."""


def table(document: Row) -> pd.DataFrame:
    """A line for each unit: ``UNIT`` and a column for each method."""
    lines = [{name: unit[name] for name in UNIT} | unit["scores"] for unit in document["units"]]
    units: pd.DataFrame = pd.DataFrame(lines)
    return units


def methods(units: pd.DataFrame) -> list[str]:
    """The methods in a table of units."""
    return [str(name) for name in units.columns if name not in UNIT]


def long(units: pd.DataFrame) -> pd.DataFrame:
    """A line for each unit and method: kind, layer, index, method, value, params, macs."""
    columns = ["kind", "layer", "index", "method", "value", "params", "macs"]
    melted: pd.DataFrame = units.melt(id_vars=list(UNIT), var_name="method", value_name="value")[columns]
    return melted


def agreement(units: pd.DataFrame, kind: str) -> list[list[float | None]]:
    """The Spearman correlation of every two methods over the units of one kind; None where one gives all the same."""
    found = units.loc[units["kind"] == kind, methods(units)].corr(method="spearman")
    return [[float(value) if np.isfinite(value) else None for value in line] for line in found.to_numpy()]


def grid(units: pd.DataFrame, kind: str, method: str, *, most: int) -> Grid:
    """The scores of one kind under one method in at most ``most`` cells a row.

    A cell of several units is shaded by the mean of their ranks, since scores span decades.
    """
    chosen = units[units["kind"] == kind]
    values, ranks = chosen[method], chosen[method].rank()
    rows = [group.index for _, group in chosen.groupby("layer", sort=False)]
    labels = tuple(f"layer {chosen['layer'][row[0]]}" for row in rows)
    names = chosen["index"].map(str)
    if len(chosen) == len(rows) > 1:
        labels, names, rows = ("layers",), chosen["layer"].map(str), [chosen.index]
    longest = max(rows, key=len)
    size = -(-len(longest) // most)
    bins = [[row[start : start + size] for start in range(0, len(row), size)] for row in rows]
    placed = stats.rankdata([ranks[cell].mean() for row in bins for cell in row]) - 1
    placed = placed / max(1, len(placed) - 1)
    cuts = np.cumsum([len(row) for row in bins])[:-1]
    tips = tuple(tuple(_tip(chosen, values, cell) for cell in row) for row in bins)
    columns = tuple(names[longest[start]] for start in range(0, len(longest), size))
    return Grid(labels, columns, tuple(tuple(map(float, row)) for row in np.split(placed, cuts)), tips, size)


def _tip(chosen: pd.DataFrame, values: pd.Series[float], cell: pd.Index) -> str:
    first, last = chosen["index"][cell[0]], chosen["index"][cell[-1]]
    where = f"layer {chosen['layer'][cell[0]]}, {chosen['kind'][cell[0]]} {first}"
    if len(cell) == 1:
        return f"{where}: {values[cell[0]]:.3g}"
    return f"{where} to {last}: {values[cell].min():.3g} to {values[cell].max():.3g}"


def least_important(units: pd.DataFrame, method: str) -> tuple[list[str], list[list[str]]]:
    """The header and the lines of a table of each layer's least and mean score, and of the units that score lowest."""
    lines = []
    order = {kind: place for place, kind in enumerate(dict.fromkeys(units["kind"]))}
    groups = sorted(units.groupby(["kind", "layer"], sort=False), key=lambda group: order[group[0][0]])
    for (kind, layer), group in groups:
        values = group[method]
        lowest = " ".join(map(str, group["index"][values.sort_values(kind="stable").index[:6]]))
        lines.append([str(kind), str(layer), str(len(group)), f"{values.min():.3g}", f"{values.mean():.3g}", lowest])
    return ["kind", "layer", "units", "least", "mean", "least important"], lines


def validated(validation: Row, kind: str, *, sets: bool = False) -> tuple[str, list[str], list[list[str]]]:
    """The title, the header and the lines of a table of what trials of one kind say, a line for each method.

    An asterisk is at the best of each column. Lines are empty where there are no trials of ``sets``.
    """
    entries = {method: kinds[kind]["sets"] if sets else kinds[kind] for method, kinds in validation.items()}
    first = next(iter(entries.values()))
    if not first:
        return "", [], []
    places = {"Spearman": "", "Kendall": "kendall_"}
    columns: dict[str, list[tuple[Any, Any, Any]]] = {
        title: [(entry[title.lower()], entry[f"{place}low"], entry[f"{place}high"]) for entry in entries.values()]
        for title, place in places.items()
    }
    columns["regret"] = [(entry["regret"], None, None) for entry in entries.values()]
    if not sets:
        curves = [entry["curve"] for entry in entries.values()]
        columns["area"] = [(curve["area"], curve["low"], curve["high"]) for curve in curves]
    texts = [
        _texts(values, rising=title in places, form=".3g" if title == "area" else ".2f")
        for title, values in columns.items()
    ]
    lines = [[method, *cells] for method, cells in zip(entries, zip(*texts, strict=True), strict=True)]
    of = f"sets of {first['size']} units" if sets else "units"
    ceiling = "" if first["ceiling"] is None else f"; on these rows Spearman can reach {first['ceiling']:.2f}"
    return f"{kind}: {first['n']} {of} in trials{ceiling}", ["method", *columns], lines


def _texts(values: Sequence[tuple[Any, Any, Any]], *, rising: bool, form: str) -> list[str]:
    """Each value with its interval, an asterisk at the highest, or at the lowest where not ``rising``."""
    known = [value for value, _, _ in values if value is not None]
    best = (max if rising else min)(known, default=None)
    texts = []
    for value, low, high in values:
        mark = "*" if value == best and len(values) > 1 else ""
        around = "" if low is None or high is None else f" [{low:{form}}, {high:{form}}]"
        texts.append("not known" if value is None else f"{value:{form}}{mark}{around}")
    return texts


def check_out(out: Path) -> None:
    """Raise UsageError where ``out`` is neither a folder nor a file of ``ENDINGS``, UnavailableError where what goes
    there cannot be written by this installation."""
    ending = out.suffix.lower()
    if not out.is_dir() and (out.exists() or ending) and ending not in ENDINGS:
        raise UsageError(f"-o {out} is neither a folder nor a file that ends in {', '.join(ENDINGS)}.")
    if (out.is_dir() or ending in {"", ".parquet"}) and find_spec("pyarrow") is None:
        raise UnavailableError(
            f"{out}: Parquet files need pyarrow: install edgepress[datasets], or give a .csv or .json file."
        )


def write_scores(document: Row, out: Path) -> Path:
    """Write the ``document`` of scores to ``out``: to a file in the form of its ending, or to a folder as
    ``scores.json``, ``scores.parquet`` and ``scores.html``.

    Returns the file to look at. Raises what :func:`check_out` does.
    """
    check_out(out)
    folder = out.is_dir() or not out.suffix
    targets = [out / f"scores{ending}" for ending in (".json", ".parquet", ".html")] if folder else [out]
    contents = [_content(document, target.suffix.lower()) for target in targets]
    for target, content in zip(targets, contents, strict=True):
        write_bytes(target, content)
    return targets[-1]


def _content(document: Row, ending: str) -> bytes:
    if ending == ".json":
        return f"{json.dumps(document)}\n".encode()
    if ending == ".html":
        from .score_page import score_page

        return score_page(document).encode()
    units = long(table(document))
    content: bytes = units.to_csv(index=False).encode() if ending == ".csv" else units.to_parquet(index=False)
    return content
