"""A comparison as text, in the terminal's tables or in markdown, and as a page with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..models.measures import told
from . import comparison as comparing
from . import frontier, tables
from .comparison import Comparison, Group
from .page import note, page
from .report import comparison_table, definitions, latencies

APART = "Variants were interleaved within a group only: between groups a machine may have changed its pace."


def print_tables(comparison: Comparison) -> None:
    """Print a table for each group, and what dominates what."""
    from rich.text import Text

    console = tables.terminal()
    several = len(comparison.groups) > 1
    for cluster in comparison.clusters:
        for group, places in zip(cluster, comparing.places(cluster), strict=True):
            if several:
                console.print(Text(_title(group), style="bold"))
            original, *results = group.rows
            console.print(tables.rich_table(original, results, group.chosen, places))
        for text in comparing.dominated(cluster):
            console.print(Text(text))
    for text in _said(comparison):
        console.print(Text(text))


def markdown(comparison: Comparison) -> str:
    """The comparison in markdown."""
    lines = ["# Comparison", ""]
    for cluster in comparison.clusters:
        for group, places in zip(cluster, comparing.places(cluster), strict=True):
            original, *results = group.rows
            lines += [f"## {tables.plain(_title(group))}", "", _shape(group), ""]
            lines += [tables.markdown(original, results, group.chosen, places)]
        texts = comparing.dominated(cluster)
        lines += [*(f"- {tables.plain(text)}" for text in texts), ""] if texts else []
    said = _said(comparison)
    lines += ["## Read with care", "", *(f"- {tables.plain(text)}" for text in said), ""] if said else []
    return "\n".join(lines)


def html(comparison: Comparison) -> str:
    """The comparison as a page: tables, the frontier of what may be held against each other, latencies run by run."""
    sections = []
    number = 0
    for cluster in comparison.clusters:
        for group, places in zip(cluster, comparing.places(cluster), strict=True):
            content = comparison_table(group.rows, group.chosen, name=f"group-{number}", places=places)
            sections.append((_title(group), content))
            number += 1
        title = "Quality against latency and size" + _of(comparison, cluster)
        rows = comparing.judged(cluster)
        if rows:
            apart = note(APART) if len(cluster) > 1 else ""
            sections.append((title, frontier.section(rows, comparing.chosen(cluster)) + apart))
    for group in comparison.groups:
        if group.measured:
            sections.append((f"Latency, run by run: {group.title}", latencies(group.measured, group.chosen)))
    said = _said(comparison)
    if said:
        listed = "".join(f"<li>{escape(text)}</li>" for text in said)
        sections.insert(0, ("Read with care", f"<ul>{listed}</ul>"))
    for group in comparison.groups:
        if group.environment:
            sections.append((f"Environment: {group.title}", definitions(dict(group.environment))))
    title = ", ".join(group.title for group in comparison.groups[:4])
    more = len(comparison.groups) - 4
    return page(f"{title} and {more} more" if more > 0 else title, headline(comparison), sections)


def headline(comparison: Comparison) -> str:
    """The fastest variant of each cluster in a clause."""
    texts = []
    for cluster in comparison.clusters:
        rows = comparing.named(cluster)
        best = min(rows, key=lambda row: float(row["latency_ms"]["p50"]))
        quality = best["quality"]
        drop = f", {told(quality['metric'], quality['drop'])}" if quality and quality["drop"] is not None else ""
        texts.append(f"{best['name']} is fastest at {best['latency_ms']['p50']:.2f} ms{drop}")
    more = len(texts) - 3
    return "; ".join(texts[:3]) + (f"; {more} more that are not comparable." if more > 0 else ".")


def _said(comparison: Comparison) -> list[str]:
    several = [APART] if any(len(cluster) > 1 for cluster in comparison.clusters) else []
    return [*comparison.apart, *comparison.notes, *several]


def _title(group: Group) -> str:
    return group.title if group.source == "artifacts" else f"{group.title} on {group.rows[0]['target']}"


def _shape(group: Group) -> str:
    first = group.rows[0]
    tokens = f" x sequence {first['sequence']}" if first["sequence"] else ""
    return f"Batch {first['batch']}{tokens}, n = {first['latency_ms']['n']} each, interleaved."


def _of(comparison: Comparison, cluster: Sequence[Group]) -> str:
    """What a section is about, where there is more than one cluster."""
    if len(comparison.clusters) == 1:
        return ""
    return f": {', '.join(group.title for group in cluster)}"
