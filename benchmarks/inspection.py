"""Inspection: what ``inspect`` found, as a page with pictures and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..files import write_text
from . import charts, tables
from .page import note, page, table

Row = dict[str, Any]

INFLUENCE = "1 - cosine between a block's input and output, mean over tokens: what changes little is missed little."
SIMILARITY = "Linear CKA between what the first block is given and what each block gives; near 1 is nearly the same."
HEADS = (
    ("entropy", "Entropy", "0: all of the mass on one key; 1: the same on all keys that a query sees."),
    ("peak", "Sink share", "Share of a head's mass on the most attended token of each row."),
    ("distance", "Distance", "Tokens from query to key, mean by mass; the darkest looks farthest of all."),
    ("likeness", "Most alike head", "Correlation of a head's map with the map of its layer that is most like it."),
)
"""What is shown of each head: the field, its title and what it means."""


def write_inspection(found: Row, folder: Path) -> Path:
    """Write ``inspect.json`` and ``inspect.html`` of an inspected model into ``folder``; returns the second."""
    write_text(folder / "inspect.json", json.dumps(found, indent=2) + "\n")
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in found["example"].items())
    size = f"{found['params']:,} parameters, {found['macs']:,} multiply-accumulates for {shapes}"
    sections = [("Model", f"<p>{escape(found['family'])}: {escape(size)}.</p>")]
    notes = list(found["notes"])
    if found["statistics"]:
        sections += _statistics(found["statistics"])
        notes += found["statistics"]["notes"]
    if notes:
        sections.append(("Notes", f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in notes)}</ul>"))
    write_text(folder / "inspect.html", page(found["name"], headline(found), sections))
    return folder / "inspect.html"


def headline(found: Row) -> str:
    """The model in one sentence."""
    known = found["statistics"]
    if not known:
        return "Gradients, representation and attention are known only with rows: give --data."
    changes = known["representation"]["layers"]
    heads = [head for entry in known["attention"]["layers"] for head in entry["heads"]]
    dead = sum(len({*e["zero"], *e["constant"], *e["no_gradient"]}) for e in known["gradient_flow"]["dead"])
    flagged = sum(entry["flag"] is not None for entry in known["gradient_flow"]["layers"])
    texts = []
    if changes:
        least = min(changes, key=lambda entry: float(entry["influence"]))
        texts.append(f"Block {least['layer']} changes its input least (influence {least['influence']:.3f})")
    if heads:
        texts.append(f"{sum(head['sink'] for head in heads)} of {len(heads)} heads are sinks")
    texts.append(f"{dead or 'no'} dead {'unit' if dead == 1 else 'units'}")
    texts.append(f"{flagged or 'no'} {'gradient' if flagged == 1 else 'gradients'} out of line")
    whole = ", ".join(texts)
    return f"{whole[0].upper()}{whole[1:]}."


def _statistics(known: Row) -> list[tuple[str, str]]:
    flow, attention = known["gradient_flow"], known["attention"]["layers"]
    changes, cka = known["representation"]["layers"], known["representation"]["cka"]
    stacks = tables.stack_names([entry["stack"] for entry in changes])
    names = {entry["layer"]: f"{stacks[entry['stack']]} {entry['layer']}" for entry in changes}
    over = note(f"Over {known['rows']:,} calibration rows, whose mean loss is {known['loss']:.4g}.")
    sections = [
        ("Layer by layer", table(*tables.statistics(known), name="layers") + over),
        ("Gradient flow", charts.gradient_flow(flow["layers"], _labels(flow["layers"], names)) + _flow_note(flow)),
    ]
    if changes:
        labels = [_run(names[entry["layer"]], entry, changes) for entry in changes]
        tips = [f"cosine {e['cosine']:.4f}, norm of the update {e['update_norm']:.3f} of the input's" for e in changes]
        bars = charts.influence(labels, [entry["influence"] for entry in changes], tips)
        sections.append(("Block influence", bars + note(INFLUENCE)))
    if cka:
        sections.append(("Similarity of depths", "".join(_cka(entry, stacks) for entry in cka) + note(SIMILARITY)))
    if attention:
        pictures = "".join(_heads(attention, names, *shown) for shown in HEADS)
        sections.append(("Attention", pictures + note("Rows are layers, columns are their heads.")))
    return sections


def _labels(layers: Sequence[Row], names: dict[int, str]) -> list[str]:
    """Blocks by their number, matrices by the last two words of their path, which tell them apart in a block."""
    labels = []
    for entry in layers:
        if entry["kind"] == "block":
            labels.append(names.get(entry["block"], f"block {entry['block']}"))
        else:
            alone = entry["kind"] == "matrix" and entry["block"] is None  # a model without blocks
            labels.append(entry["name"] if alone else ".".join(entry["name"].split(".")[-2:]))
    return labels


def _flow_note(flow: Row) -> str:
    limits = flow["limits"]
    texts = [
        "Large dots are whole blocks, or matrices outside of them; small dots are the matrices of a block. "
        f"A gradient vanishes below {limits['vanishing']:g} times the median of the same layer in all blocks, and "
        f"explodes above {limits['exploding']:g} times, by the root mean square of its entries."
    ]
    for entry in flow["dead"]:
        for word in ("zero", "constant", "no_gradient"):
            if entry[word]:
                listed = ", ".join(map(str, entry[word][:20])) + (", …" if len(entry[word]) > 20 else "")
                texts.append(f"Layer {entry['layer']}, {entry['kind']} units, {word.replace('_', ' ')}: {listed}")
    return "".join(map(note, texts))


def _run(name: str, entry: Row, entries: Sequence[Row]) -> str:
    shared = sum(other["layer"] == entry["layer"] for other in entries) > 1
    return f"{name}, run {entry['run']}" if shared else name


def _cka(entry: Row, stacks: dict[str, str]) -> str:
    name = stacks[entry["stack"]]
    title = f"<h3>{escape(name)}</h3>" if len(stacks) > 1 else ""
    columns = ["in" if depth == "input" else depth.split(", run ")[-1] for depth in entry["names"]]
    picture = charts.cells(entry["names"], entry["values"], f"Linear CKA between the depths of {name}", columns)
    return title + picture


def _heads(entries: Sequence[Row], names: dict[int, str], field: str, title: str, meaning: str) -> str:
    parts = [f"<h3>{title}</h3>"]
    for kind, word in (("head", ""), ("cross_head", "Cross-attention")):
        listed = [entry for entry in entries if entry["kind"] == kind]
        rows = [_of_heads(entry, field) for entry in listed]
        known = [value for row in rows for value in row if value is not None]
        if not known:  # there is no distance from one sequence to another
            continue
        if word:
            parts.append(note(word))
        labels = [_run(names[entry["layer"]], entry, listed) for entry in listed]
        columns = [str(number) for number in range(max(map(len, rows)))]
        parts.append(charts.cells(labels, rows, f"{title} of each head", columns, scale=max(1.0, *known)))
    return "".join(parts) + note(meaning)


def _of_heads(entry: Row, field: str) -> list[float | None]:
    """One of ``HEADS`` for each head of a layer, None where it is not known."""
    if field == "likeness":
        return [max((*row[:head], *row[head + 1 :]), default=None) for head, row in enumerate(entry["similarity"])]
    return [head[field] for head in entry["heads"]]
