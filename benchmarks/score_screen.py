"""Scores on a terminal: heat maps, and tables of how methods agree with each other and with trials."""

from __future__ import annotations

from typing import Any

import pandas as pd
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from . import score_table
from .tables import plain_table, terminal

Row = dict[str, Any]

SHADES = " ░▒▓█"
COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""From the least to the most important: the colour map viridis."""
WIDEST = 4
ROOM = 100
"""Columns that a table with intervals needs; on fewer, an interval goes under its value."""


def show(document: Row) -> None:
    """Print the document of scores: heat maps of its first method, then tables."""
    units = score_table.table(document)
    first, *others = score_table.methods(units)
    console = terminal()
    kinds = list(dict.fromkeys(units["kind"]))
    console.print(f"{first}: from the least to the most important by rank, ", end="", highlight=False)
    console.print(*(_cell(console, step / 4, 2) for step in range(5)), sep="")
    for kind in kinds:
        heat_map(console, units, kind, first)
    plain_table(*score_table.least_important(units, first))
    if others:
        for kind in kinds:
            _agreement(console, units, kind)
    if document["validation"]:
        for kind in kinds:
            _validation(console, document["validation"], kind)
        console.print(NOTE, highlight=False)


NOTE = (
    "* best of its column. regret: what the quarter that scores lowest costs beyond the cheapest quarter; 0 is best, 1 "
    "is chance. area: mean growth of the loss as units go in the order of the score."
)


def heat_map(console: Console, units: pd.DataFrame, kind: str, method: str) -> None:
    """Draw the scores of one kind no wider than the console: a row a layer, a cell a unit or a few."""
    left = 4 + len(str(units["layer"].max())) + len("layer")
    grid = score_table.grid(units, kind, method, most=max(1, console.width - left))
    width = max(1, min(WIDEST, (console.width - left) // len(grid.columns)))
    of = f", {grid.size} units a cell" if grid.size > 1 else ""
    console.print(Text(f"\n{kind}{of}", style="bold"))
    for label, shades in zip(grid.labels, grid.shades, strict=True):
        line = Text(f"  {label}".ljust(left))
        line.append_text(Text.assemble(*(_cell(console, shade, width) for shade in shades)))
        console.print(line, no_wrap=True)


def _cell(console: Console, shade: float, width: int) -> Text:
    if console.color_system in {"256", "truecolor"} and not console.no_color:
        return Text(" " * width, style=Style(bgcolor=_colour(shade)))
    return Text(SHADES[min(int(shade * len(SHADES)), len(SHADES) - 1)] * width)


def _colour(shade: float) -> str:
    place = min(int(shade * (len(COLOURS) - 1)), len(COLOURS) - 2)
    part = shade * (len(COLOURS) - 1) - place
    mixed = (round(a + (b - a) * part) for a, b in zip(COLOURS[place], COLOURS[place + 1], strict=True))
    return f"rgb({','.join(map(str, mixed))})"


def _agreement(console: Console, units: pd.DataFrame, kind: str) -> None:
    """The lower half of the table of rank correlations, its columns numbered as its lines are."""
    names = score_table.methods(units)
    lines = score_table.agreement(units, kind)
    shown = Table("", *map(str, range(1, len(names))), box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in shown.columns[1:]:
        column.justify = "right"
    for number, (name, line) in enumerate(zip(names, lines, strict=True)):
        shown.add_row(f"{number + 1} {name}", *(_correlation(value) for value in line[:number]))
    console.print(Text(f"\n{kind}: rank correlation of methods", style="bold"))
    console.print(shown)


def _correlation(value: float | None) -> str:
    return "none" if value is None else f"{round(value, 2) + 0.0:.2f}".replace("0.", ".")  # + 0.0: not -0


def _validation(console: Console, validation: Row, kind: str) -> None:
    for sets in (False, True):
        title, header, lines = score_table.validated(validation, kind, sets=sets)
        if console.width < ROOM:
            lines = [[text.replace(" [", "\n[") for text in line] for line in lines]
        if lines:
            plain_table(header, lines, title=title)
