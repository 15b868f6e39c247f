"""Scores: what ``score`` found, as a page with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import pandas as pd

from . import charts, score_table
from .maps import KINDS
from .page import note, page, table

Row = dict[str, Any]

TITLES = {**KINDS, "block": "Blocks"}
CELLS = 48
"""At most in a row of a heat map."""

TRIALS = (
    "Units were masked in trials, and the change of the loss is what each score is held against. Spearman and Kendall "
    "are rank correlations with it; regret is what the quarter that scores lowest costs beyond the cheapest quarter, 0 "
    "for the best choice and 1 for chance; area is the mean growth of the loss as units go in the order of the score. "
    "Intervals hold 95 % of the bootstrap; * is the best of its column, and where intervals overlap it may be so by "
    "chance. The ceiling is what Spearman could be at most, since the rows are a sample."
)
AGREEMENT = "Spearman correlation of every two methods over all units of a kind: 1 is the same order, 0 another one."
SHADES = (
    "Darker is more important, by rank among the cells of a picture: 0 the least, 1 the most. Scores are compared "
    "within one kind of unit only."
)


def score_page(document: Row) -> str:
    """The HTML of a page of the document of scores."""
    units = score_table.table(document)
    methods = score_table.methods(units)
    kinds = {str(kind): TITLES.get(kind, kind) for kind in dict.fromkeys(units["kind"])}
    sections = []
    if document["validation"]:
        sections.append(("Which score to believe", _validation(document, kinds)))
    maps = "".join(_maps(units, kind, title, methods) for kind, title in kinds.items())
    sections.append(("What matters", note(SHADES) + maps))
    if len(methods) > 1:
        pictures = "".join(_agreement(units, kind, title) for kind, title in kinds.items())
        sections.append(("Where methods agree", pictures + note(AGREEMENT)))
    least = table(*score_table.least_important(units, methods[0]), name="least")
    sections.append(("Least important units", note(f"By {methods[0]}.") + least))
    return page(document["name"], headline(document), sections)


def headline(document: Row) -> str:
    """The scores in one sentence."""
    count, rows = len(document["units"]), document["rows"]
    methods = list(document["units"][0]["scores"])
    by = methods[0] if len(methods) == 1 else f"{len(methods)} methods"
    found = f"{count:,} units scored by {by} on {rows:,} rows"
    if not document["validation"]:
        return f"{found}; --validate says which score to believe."
    closest, unknown = [], []
    for kind in dict.fromkeys(unit["kind"] for unit in document["units"]):
        entries = [(method, of_kind[kind]) for method, of_kind in document["validation"].items()]
        beyond = [(entry["spearman"], method) for method, entry in entries if (entry["low"] or 0) > 0]
        if beyond:
            value, method = max(beyond)
            closest.append(f"{kind} {method} ({value:.2f})")
        else:
            unknown.append(kind)
    texts = [f"closest to trials: {', '.join(closest)}"] if closest else []
    texts += [f"no method is closer to trials than chance for {', '.join(unknown)}"] if unknown else []
    return f"{found}; {'; '.join(texts)}."


def _validation(document: Row, kinds: dict[str, str]) -> str:
    validation = document["validation"]
    parts = [note(f"{TRIALS} The trials ran on {document['trial_rows']:,} rows.")]
    for kind, title in kinds.items():
        parts.append(f"<h3>{escape(title)}</h3>")
        entries = {method: of_kind[kind] for method, of_kind in validation.items()}
        for sets in (False, True):
            caption, header, lines = score_table.validated(validation, kind, sets=sets)
            if not lines:
                continue
            shown = [entry["sets"] if sets else entry for entry in entries.values()]
            values = [(entry["spearman"], entry["low"], entry["high"]) for entry in shown]
            what = f"Spearman correlation with trials of {'sets of units' if sets else 'units'}"
            if any(entry["spearman"] is not None for entry in shown):
                parts.append(charts.intervals(list(entries), values, what, limit=shown[0]["ceiling"]))
            parts.append(table(header, lines, name=f"{'sets' if sets else 'trials'}-{kind}", caption=caption))
        curves = [entry["curve"] for entry in entries.values()]
        names = [f"{method} {curve['area']:.3g}" for method, curve in zip(entries, curves, strict=True)]
        shares = [0.0, *(100 * share for share in curves[0]["shares"])]
        losses = [[0.0, *curve["losses"]] for curve in curves]
        parts.append(charts.curves(names, shares, losses, (f"{kind} units removed, %", "growth of the loss")))
        parts.append(note("The figure beside a method's name is its area."))
    return "".join(parts)


def _maps(units: pd.DataFrame, kind: str, title: str, methods: Sequence[str]) -> str:
    grids = [score_table.grid(units, kind, method, most=CELLS) for method in methods]
    of = f"; a cell is {grids[0].size} units" if grids[0].size > 1 else ""
    parts = [f"<h3>{escape(title)}{of}</h3>"]
    if len(grids[0].labels) == 1:  # a row for each method
        rows = [one.shades[0] for one in grids]
        tips = [[f"{method}, {tip}" for tip in one.tips[0]] for method, one in zip(methods, grids, strict=True)]
        parts.append(charts.cells(methods, rows, f"Rank of {kind} units by method", grids[0].columns, tips=tips))
        return "".join(parts)
    for number, (method, one) in enumerate(zip(methods, grids, strict=True)):
        name = f"Rank of {kind} units by {method}, a row a layer"
        picture = charts.cells(one.labels, one.shades, name, one.columns, tips=one.tips)
        opened = "" if number else " open"
        parts.append(f"<details{opened}><summary>{escape(method)}</summary>{picture}</details>")
    return "".join(parts)


def _agreement(units: pd.DataFrame, kind: str, title: str) -> str:
    names = score_table.methods(units)
    labels = [f"{number} {name}" for number, name in enumerate(names, 1)]
    columns = [str(number) for number, _ in enumerate(names, 1)]
    rows = score_table.agreement(units, kind)
    return f"<h3>{escape(title)}</h3>" + charts.cells(labels, rows, f"Rank correlation of methods on {kind}", columns)
