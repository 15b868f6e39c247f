"""Tables: the one place where a figure becomes text, for the terminal, for markdown and for the report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

COLUMNS = ("variant", "speedup", "quality", "drop", "p50 ms", "p90 ms", "p99 ms", "MB", "params", "precision")


def cells(row: Row, original: Row) -> list[str]:
    """The text of one row of a comparison, a cell for each of ``COLUMNS``."""
    latency, low_high = row["latency_ms"], row.get("latency_interval_ms")
    around = f" [{low_high[0]:.2f}, {low_high[1]:.2f}]" if low_high else ""
    share = row["size_bytes"] / original["size_bytes"]
    return [
        row["name"],
        speedup_text(row["speedup"]),
        quality_text(row["quality"]),
        drop_text(row["quality"]),
        f"{latency['p50']:.2f}{around}",
        f"{latency['p90']:.2f}",
        f"{latency['p99']:.2f}" if latency["p99"] is not None else f"— (n={latency['n']})",
        f"{row['size_bytes'] / 1e6:.1f} ({share:.0%})",
        f"{row['params'] / 1e6:.1f} M",
        row["precision"],
    ]


def speedup_text(speedup: Row | None) -> str:
    if speedup is None:
        return "1.00x"
    return f"{speedup['value']:.2f}x [{speedup['low']:.2f}, {speedup['high']:.2f}] {speedup['verdict']}"


def quality_text(quality: Row | None) -> str:
    return f"{quality['value']:.2f} [{quality['low']:.2f}, {quality['high']:.2f}]" if quality else "not measured"


def drop_text(quality: Row | None) -> str:
    if quality is None or quality["drop"] is None:
        return "—"
    return f"{quality['drop']:+.2f} [{quality['drop_low']:+.2f}, {quality['drop_high']:+.2f}]"


def markdown(original: Row, results: Sequence[Row], chosen: str | None) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    for row in (original, *results):
        texts = [text.replace("|", "\\|").replace("\n", " ") for text in cells(row, original)]
        if row["name"] == chosen:
            texts[0] = f"**{texts[0]}**"
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def rich_table(original: Row, results: Sequence[Row], chosen: str | None) -> Any:
    """The comparison for a terminal, the chosen variant in bold."""
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold")
    for number, name in enumerate(COLUMNS):
        table.add_column(
            name, no_wrap=name == "variant", justify="left" if number in {0, len(COLUMNS) - 1} else "right"
        )
    for row in (original, *results):
        style = "bold green" if row["name"] == chosen else ""
        table.add_row(*(Text(text, style=style) for text in cells(row, original)))
    return table


def plain_table(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    """Print a table of anything."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, header_style="bold")
    for line in lines:
        table.add_row(*(Text(str(cell)) for cell in line))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
