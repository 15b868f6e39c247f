"""Tables: the one place where a figure becomes text, for the terminal, for markdown and for the report."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from .frontier import Place

Row = dict[str, Any]

COLUMNS = (
    *("variant", "speedup", "quality", "drop", "p50 ms", "p90 ms", "p95 ms", "p99 ms", "MB", "params", "precision"),
    "runtime",
)


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
        f"{latency['p95']:.2f}" if latency.get("p95") is not None else "—",
        f"{latency['p99']:.2f}" if latency["p99"] is not None else f"— (n={latency['n']})",
        f"{row['size_bytes'] / 1e6:.1f} ({share:.0%})",
        f"{row['params'] / 1e6:.1f} M",
        row["precision"],
        row.get("runtime", ""),
    ]


COSTS = ("variant", "rows/s", "load ms", "peak MB", "MB on disk", "GMAC a row", "energy mJ")
"""What an artifact takes and gives besides its latency; the products are those of the example row of its model."""


def costs(row: Row) -> list[str]:
    """The text of one row, a cell for each of ``COSTS``."""
    load, peak, energy = row["load_ms"], row["peak_rss_bytes"], row["energy_mj"]
    return [
        row["name"],
        f"{row['throughput']['rows_per_s']:,.1f}",
        f"{load:.0f}" if load is not None else "—",
        f"{peak / 1e6:.0f}" if peak is not None else "—",
        f"{row['size_bytes'] / 1e6:.1f}",
        f"{row['macs'] / 1e9:.3f}",
        f"{energy:.2f}" if energy is not None else "not available",
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


def stack_names(paths: Sequence[str]) -> dict[str, str]:
    """What tells lists of blocks apart in their paths: ``encoder`` and ``decoder``; for one alone nothing is needed."""
    parts = {path: path.split(".") for path in dict.fromkeys(paths)}
    while len(parts) > 1 and all(parts.values()) and len({part[0] for part in parts.values()}) == 1:
        parts = {path: part[1:] for path, part in parts.items()}
    while len(parts) > 1 and all(parts.values()) and len({part[-1] for part in parts.values()}) == 1:
        parts = {path: part[:-1] for path, part in parts.items()}
    return {path: ".".join(part) if len(parts) > 1 else "block" for path, part in parts.items()}


def statistics(found: Row) -> tuple[list[str], list[list[str]]]:
    """The header and the lines of a table of an inspected model's statistics: a line for each block, or for each weight
    matrix in a model without blocks."""
    flow = found["gradient_flow"]["layers"]
    blocks = [entry for entry in flow if entry["kind"] == "block"]
    if not blocks:
        header = ["layer", "gradient norm", "weight norm", "update ratio", "remarks"]
        return header, [[e["name"], *_numbers(e, "weight_norm"), e["flag"] or ""] for e in flow]
    header = ["layer", "gradient norm", "update ratio", "influence", "entropy", "cross entropy", "remarks"]
    lines = []
    for entry in blocks:
        number = entry["block"]
        influences = [one["influence"] for one in found["representation"]["layers"] if one["layer"] == number]
        entropies = [_entropy(found, number, kind) for kind in ("head", "cross_head")]
        means = [sum(values) / len(values) if values else None for values in (influences, *entropies)]
        texts = ["" if mean is None else f"{mean:.3f}" for mean in means]
        lines.append([str(number), *_numbers(entry), *texts, "; ".join(remarks(found, number))])
    if not any(line[5] for line in lines):
        header, lines = [*header[:5], header[6]], [[*line[:5], line[6]] for line in lines]
    return header, lines


def _numbers(entry: Row, *more: str) -> list[str]:
    values = [entry[name] for name in ("gradient_norm", *more, "update_ratio")]
    return ["" if value is None else f"{value:#.3g}" for value in values]


def _entropy(found: Row, layer: int, kind: str) -> list[float]:
    entries = [one for one in found["attention"]["layers"] if one["layer"] == layer and one["kind"] == kind]
    return [head["entropy"] for one in entries for head in one["heads"]]


def remarks(found: Row, layer: int) -> list[str]:
    """What is unusual in one block: gradients that vanish or explode, dead units, and what kinds of heads it has."""
    texts = []
    for entry in found["gradient_flow"]["layers"]:
        if entry["block"] == layer and entry["flag"]:
            texts.append(
                entry["flag"] if entry["kind"] == "block" else f"{entry['name'].split('.')[-1]} {entry['flag']}"
            )
    for entry in found["gradient_flow"]["dead"]:
        if entry["layer"] == layer:
            gone = set(entry["zero"]) | set(entry["constant"]) | set(entry["no_gradient"])
            texts.append(f"{len(gone)} of {entry['count']} {entry['kind']} dead")
    for entry in found["attention"]["layers"]:
        if entry["layer"] != layer:
            continue
        kind = "cross " if entry["kind"] == "cross_head" else ""
        for name in ("sink", "local", "causal"):
            count = sum(head[name] for head in entry["heads"])
            if count and not (name == "causal" and count == len(entry["heads"])):  # a decoder's mask is no news
                texts.append(f"{count} {kind}{name} {'head' if count == 1 else 'heads'}")
        pairs = len(entry["alike"])
        if pairs:
            texts.append(f"{pairs} {'pair' if pairs == 1 else 'pairs'} of {kind}heads alike")
    return texts


PARETO = "Pareto"
"""The column of a variant's place among the others, where that is known."""


def lines(original: Row, results: Sequence[Row], places: Sequence[Place] = ()) -> tuple[list[str], list[list[str]]]:
    """The header and the cells of a comparison; with the rows' ``places`` there is one column more."""
    rows = [original, *results]
    texts = [cells(row, original) for row in rows]
    if not places:
        return list(COLUMNS), texts
    return [*COLUMNS, PARETO], [[*line, place.text] for line, place in zip(texts, places, strict=True)]


def markdown(original: Row, results: Sequence[Row], chosen: str | None, places: Sequence[Place] = ()) -> str:
    header, every = lines(original, results, places)
    drawn = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    for row, line in zip((original, *results), every, strict=True):
        texts = [plain(text) for text in line]
        if row["name"] == chosen:
            texts[0] = f"**{texts[0]}**"
        drawn.append("| " + " | ".join(texts) + " |")
    return "\n".join(drawn) + "\n"


def plain(text: str) -> str:
    """``text`` as it stands in a line of markdown, whatever is in it: no code, no markup, no link, no cell."""
    return re.sub(r"([\\`*_<>|])", r"\\\1", " ".join(str(text).split())).replace("](", "]\\(")


def rich_table(original: Row, results: Sequence[Row], chosen: str | None, places: Sequence[Place] = ()) -> Any:
    """The comparison for a terminal, the chosen variant in bold."""
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold")
    header, every = lines(original, results, places)
    for name in header:
        left = name in {"variant", "precision", "runtime", PARETO}
        table.add_column(name, no_wrap=name == "variant", justify="left" if left else "right")
    for row, line in zip((original, *results), every, strict=True):
        style = "bold green" if row["name"] == chosen else ""
        table.add_row(*(Text(text, style=style) for text in line))
    return table


def plain_table(header: Sequence[str], lines: Sequence[Sequence[Any]], *, title: str = "") -> None:
    """Print a table of anything."""
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, header_style="bold")
    table.columns[0].no_wrap = True  # what a line is about stays whole
    for line in lines:
        table.add_row(*(Text(str(cell)) for cell in line))
    console = terminal()
    if title:
        console.print(Text(f"\n{title}", style="bold"))
    console.print(table)


def terminal() -> Console:
    """Standard output: as wide as the terminal is or ``COLUMNS`` says, and wide enough for a table in a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or os.environ.get("COLUMNS") else 160)
