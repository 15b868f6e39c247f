"""Maps: layer by layer what was removed, and in which precision what is left is kept."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .charts import WIDTH, Rows, svg_of
from .page import note, scrolled

Row = dict[str, Any]

KINDS = {
    "head": "Attention heads",
    "kv": "Key/value groups",
    "cross_head": "Heads of cross-attention",
    "ffn": "Feed-forward channels",
    "channel": "Channels",
    "hidden": "Channels of the hidden width",
}
CELLS = 48
"""At most in a row."""
BITS = {"fp32": 1.0, "bf16": 0.6, "fp16": 0.6, "fp8": 0.36, "int8": 0.36, "int4": 0.14}
"""How dark a precision is drawn: more bits, darker."""


# ---- what was removed


def removed(summary: Row) -> str:
    """The share that is kept of every kind in every layer, and which units went; nothing where none did."""
    plan = summary["removed"]
    if not plan:
        return "<p>No units were removed.</p>"
    blocks = {int(layer) for layer in plan.get("block", {})}
    scores = summary["scores"] or {"method": "no", "values": {}}
    parts = [_overview(summary, blocks)]
    if blocks:
        parts.append(f"<p>Whole blocks removed: {', '.join(str(layer) for layer in sorted(blocks))}.</p>")
    for kind, title in KINDS.items():
        counts = {site["layer"]: site["count"] for site in summary["structure"] if site["kind"] == kind}
        gone = {int(layer): set(indices) for layer, indices in plan.get(kind, {}).items()}
        if gone or (counts and blocks and kind != "hidden"):
            parts.append(f"<h3>{title}</h3>{heat_map(kind, counts, gone, blocks, scores['values'].get(kind))}")
    legend = f"Darker is more important (rank of the {scores['method']} score); crossed out or cut away is removed."
    return "".join(parts) + note(legend)


def kept(summary: Row) -> tuple[list[int], dict[str, list[float | None]]]:
    """The layers, and for every kind of unit in them the share that each layer keeps, None where it has none."""
    plan = summary["removed"]
    blocks = {int(layer) for layer in plan.get("block", {})}
    sites = {(site["kind"], site["layer"]): site["count"] for site in summary["structure"]}
    layers = sorted({layer for kind, layer in sites if kind != "hidden"})
    shares: dict[str, list[float | None]] = {}
    for kind in [kind for kind in KINDS if kind != "hidden" and any(of == kind for of, _ in sites)]:
        gone = plan.get(kind, {})
        shares[kind] = [
            None
            if (kind, layer) not in sites
            else 0.0
            if layer in blocks
            else 1 - len(gone.get(str(layer), ())) / sites[kind, layer]
            for layer in layers
        ]
    return layers, shares


def _overview(summary: Row, blocks: set[int]) -> str:
    layers, shares = kept(summary)
    titles = [KINDS[kind] for kind in shares]
    plane = Rows(["", *(f"layer {layer}" for layer in layers)], right=4)
    width = (plane.right - plane.left) / max(1, len(titles))
    for place, (title, values) in enumerate(zip(titles, shares.values(), strict=True)):
        x = plane.left + place * width
        plane.text(x + width / 2, 0, title, "middle")
        for row, (layer, share) in enumerate(zip(layers, values, strict=True), 1):
            if share is None:
                continue
            said = "block removed" if layer in blocks else f"{share:.0%}"
            plane.box(x, row, width - 2, 0.04 + 0.86 * share, f"layer {layer}, {title}: {said} kept")
            plane.text(x + width / 2, row, said, "middle", "cell on" if share > 0.6 else "cell")
    return "<h3>Share that is kept</h3>" + plane.svg("Share of units that each layer keeps")


def heat_map(kind: str, counts: dict[int, int], gone: dict[int, set[int]], blocks: set[int], values: Any) -> str:
    """One row a layer, one cell a unit (or a bin of units): shade is importance, a cross or a white share is removal.

    ``counts`` maps a layer to its units, ``gone`` to its removed indices. Importance is ranked over all layers, since
    scores span decades.
    """
    cells_a_row = min(CELLS, max(counts.values()))
    left, right = 84, 66
    cell, row_height = (WIDTH - left - right) / cells_a_row, 22 if len(counts) > 1 else 40
    ranks = _ranks(values) if values else None
    parts = []
    whole = kind == "hidden"  # of all layers at once, and in no block
    for place, (layer, count) in enumerate(counts.items()):
        y = place * (row_height + 4)
        out = layer in blocks and not whole
        lost = set(range(count)) if out else gone.get(layer, set())
        name = "stream" if whole else f"layer {layer}"
        bins = np.array_split(np.arange(count), min(cells_a_row, count))
        left_of = "block removed" if out else f"{count - len(lost)} of {count} kept"
        parts.append(f'<text class="tick" x="0" y="{y + 15}">{name}</text>')
        parts.append(f'<text class="tick" x="{WIDTH - right + 6}" y="{y + 15}">{count - len(lost)} / {count}</text>')
        for position, members in enumerate(bins):
            share = sum(int(index) in lost for index in members) / len(members)
            shade = float(np.mean([ranks[place][index] for index in members])) if ranks else 0.5
            x = left + position * cell
            tip = f"{name}, {kind} {members[0]} to {members[-1]}: {share:.0%} removed ({left_of})"
            box = f'x="{x:.1f}" width="{cell - 1.5:.1f}"'
            parts.append(
                f'<g><title>{tip}</title><rect class="heat" {box} y="{y}" height="{row_height}" '
                f'fill-opacity="{0.12 + 0.88 * shade:.2f}"/>'
            )
            if share:
                parts.append(f'<rect class="gone" {box} y="{y}" height="{row_height * share:.1f}"/>')
            if share == 1:
                ends = f'x1="{x:.1f}" y1="{y + row_height}" x2="{x + cell - 1.5:.1f}" y2="{y}"'
                parts.append(f'<line class="cross" {ends}/>')
            parts.append("</g>")
    title = f"Which {kind} units were removed, layer by layer"
    return svg_of(WIDTH, len(counts) * (row_height + 4), title, "".join(parts))


def _ranks(values: Sequence[Sequence[float]]) -> list[NDArray[np.float64]]:
    flat = np.concatenate([np.asarray(layer, dtype=np.float64) for layer in values])
    order = flat.argsort().argsort() / max(1, len(flat) - 1)
    return np.split(order, np.cumsum([len(layer) for layer in values])[:-1])


# ---- precision


def precision(found: Mapping[str, str], layers: int = 0, blocks: Collection[int] = ()) -> str:
    """In how many bits the weight of each operator is kept: a row for each block, a column for each of its operators,
    and a list of those outside of the blocks.

    ``found`` is as :func:`edgepress.export.precision.of` gives it. Where the original has so many ``layers``, of which
    ``blocks`` are gone, rows have the original's numbers.
    """
    inside: dict[tuple[str, int], dict[str, str]] = {}
    outside: dict[str, str] = {}
    for path, kind in found.items():
        match = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", path)
        if match:
            inside.setdefault((match[1], int(match[2])), {})[match[3]] = kind
        else:
            outside[path] = kind
    if not found:
        return "<p>The file does not say in which precision its operators are kept.</p>"
    stacks = list(dict.fromkeys(stack for stack, _ in inside))
    order = sorted(inside, key=lambda place: (stacks.index(place[0]), place[1]))
    left = [layer for layer in range(layers) if layer not in blocks]
    numbers = left if len(left) == len(order) else [number for _, number in order]
    lines = [(number, inside[place]) for number, place in zip(numbers, order, strict=True)]
    if len(left) == len(order):
        lines = sorted([*lines, *((layer, {}) for layer in blocks)], key=lambda line: line[0])
    parts = []
    for columns in dict.fromkeys(tuple(line) for _, line in lines if line):  # blocks of a kind share their operators
        of_kind = [(layer, line) for layer, line in lines if tuple(line) == columns or not line]
        parts.append(_table(of_kind, columns))
    if outside:
        listed = ", ".join(f"{path} {kind}" for path, kind in outside.items())
        parts.append(note(f"Outside of the blocks: {listed}."))
    return "".join(parts) + note(_legend(found.values()))


def _table(lines: Sequence[tuple[int, Mapping[str, str]]], columns: Sequence[str]) -> str:
    """An HTML table, so that its columns' long names can stand upright."""
    head = "".join(f'<th scope="col"><span>{escape(name).replace(".", ".<wbr>")}</span></th>' for name in columns)
    body = []
    for layer, line in lines:
        if line:
            cells = "".join(
                f'<td style="--shade:{BITS.get(line[name].split()[0], 0.5):g}"><span>{escape(line[name])}</span></td>'
                for name in columns
            )
        else:
            cells = f'<td class="out" colspan="{len(columns)}">block removed</td>'
        body.append(f'<tr><th scope="row">layer {layer}</th>{cells}</tr>')
    whole = (
        f'<table class="bits"><thead><tr><th scope="col">block</th>{head}</tr></thead><tbody>{"".join(body)}</tbody>'
    )
    return scrolled(f"{whole}</table>", "Precision of each operator, layer by layer")


def _legend(kinds: Collection[str]) -> str:
    said = "Operators that have a weight; darker is more bits."
    if any(kind.endswith("weights") for kind in kinds):
        said += " 'weights': kept in so many bits, and multiplied in float."
    return said
