"""Charts as SVG text: no library, no script, colours from the page's own style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 48


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high]."""
    span = high - low or abs(low) or 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    return [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


class _Plane:
    """Axes: data to picture, with grid and labels."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], x_title: str, y_title: str) -> None:
        self.x_ticks, self.y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
        self.parts: list[str] = []
        for value in self.x_ticks:
            x = self.x(value)
            self.parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            self.text(x, HEIGHT - BOTTOM + 18, f"{value:g}", "middle")
        for value in self.y_ticks:
            y = self.y(value)
            self.parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self.text(LEFT - 8, y + 4, f"{value:g}", "end")
        self.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_title, "middle", "title")
        self.parts.append(
            f'<text class="title" text-anchor="middle" transform="translate(16 {HEIGHT / 2}) rotate(-90)">'
            f"{escape(y_title)}</text>"
        )

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def text(self, x: float, y: float, text: str, anchor: str, style: str = "tick") -> None:
        self.parts.append(f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, points: Sequence[tuple[float, float]], style: str) -> None:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        self.parts.append(f'<polyline class="{style}" points="{path}"/>')

    def svg(self, title: str) -> str:
        return _svg(WIDTH, HEIGHT, title, "".join(self.parts))


def _svg(width: float, height: float, title: str, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def pareto(rows: Sequence[dict[str, Any]], chosen: str | None) -> str:
    """Quality against median latency with both intervals; the area of a circle is the size on disk."""
    judged = [row for row in rows if row["quality"]]
    if not judged:
        return "<p>No quality was measured.</p>"
    xs = [0.0, *(row["latency_ms"]["p90"] for row in judged)]
    ys = [bound for row in judged for bound in (row["quality"]["low"], row["quality"]["high"])]
    plane = _Plane(xs, ys, "median latency, ms", judged[0]["quality"]["metric"])
    biggest = max(row["size_bytes"] for row in judged)
    order = sorted(judged, key=lambda row: (row["latency_ms"]["p50"], -row["quality"]["value"]))
    frontier: list[tuple[float, float]] = []
    for row in order:
        if not frontier or row["quality"]["value"] > frontier[-1][1]:
            frontier.append((row["latency_ms"]["p50"], row["quality"]["value"]))
    plane.line(frontier, "frontier")
    taken: list[float] = []
    for row in order:
        quality, p50 = row["quality"], row["latency_ms"]["p50"]
        low, high = row.get("latency_interval_ms") or (p50, p50)
        x, y = plane.x(p50), plane.y(quality["value"])
        style = "point chosen" if row["name"] == chosen else "point"
        radius = 22 * math.sqrt(row["size_bytes"] / biggest)
        for a, b in (
            ((p50, quality["low"]), (p50, quality["high"])),
            ((low, quality["value"]), (high, quality["value"])),
        ):
            plane.line([a, b], "whisker")
        plane.parts.append(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>')
        label_y = y - radius - 6
        while any(abs(label_y - other) < 14 for other in taken):
            label_y -= 14
        if label_y < TOP:
            label_y = y + radius + 14
            while any(abs(label_y - other) < 14 for other in taken):
                label_y += 14
        taken.append(label_y)
        anchor = "start" if x < WIDTH * 0.3 else "end" if x > WIDTH * 0.7 else "middle"
        plane.text(x, label_y, f"{row['name']}, {row['size_bytes'] / 1e6:.1f} MB", anchor, "label")
    return plane.svg("Quality against latency; the area of a circle is the size on disk")


def distributions(names: Sequence[str], samples: Sequence[NDArray[np.float64]], chosen: str | None) -> str:
    """The share of runs that took at most so long, a curve for each variant."""
    longest = max(float(np.percentile(values, 99)) for values in samples)
    plane = _Plane([0.0, longest], [0.0, 100.0], "latency, ms", "share of runs, %")
    for number, (name, values) in enumerate(zip(names, samples, strict=True)):
        shares = np.linspace(0, 99, 100)
        points = list(zip(np.percentile(values, shares).tolist(), shares.tolist(), strict=True))
        plane.line(points, "curve chosen" if name == chosen else "curve")
        share = 90 - 80 * number / max(1, len(names) - 1) if len(names) > 1 else 50
        x = plane.x(float(np.percentile(values, share)))
        anchor = "end" if x > WIDTH * 0.6 else "start"
        plane.text(x + (-6 if anchor == "end" else 6), plane.y(share), name, anchor, "label")
    return plane.svg("Distribution of latency")


def training(trace: Sequence[dict[str, float]]) -> str:
    """Loss against step."""
    points = [(entry["step"], entry["loss"]) for entry in trace]
    plane = _Plane([x for x, _ in points], [0.0, *(y for _, y in points)], "step", "distillation loss")
    plane.line(points, "curve chosen")
    return plane.svg("Loss during recovery")


def heat_map(kind: str, counts: Sequence[int], gone: dict[int, set[int]], blocks: set[int], values: Any) -> str:
    """One row a layer, one cell a unit (or a bin of units): shade is importance, a cross or a white share is removal.

    ``gone`` maps a layer to its removed indices. Importance is ranked over all layers, since scores span decades.
    """
    cells_a_row = min(48, max(counts))
    cell, row_height, left = (WIDTH - 90) / cells_a_row, 22, 84
    ranks = _ranks(values) if values else None
    parts = []
    for layer, count in enumerate(counts):
        y = layer * (row_height + 4)
        lost = set(range(count)) if layer in blocks else gone.get(layer, set())
        bins = np.array_split(np.arange(count), min(cells_a_row, count))
        note = "block removed" if layer in blocks else f"{count - len(lost)} of {count} kept"
        parts.append(f'<text class="tick" x="0" y="{y + 15}">layer {layer}</text>')
        for position, members in enumerate(bins):
            share = sum(int(index) in lost for index in members) / len(members)
            shade = float(np.mean([ranks[layer][index] for index in members])) if ranks else 0.5
            x = left + position * cell
            tip = f"layer {layer}, {kind} {members[0]} to {members[-1]}: {share:.0%} removed ({note})"
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
    return _svg(
        WIDTH, len(counts) * (row_height + 4), f"Which {kind} units were removed, layer by layer", "".join(parts)
    )


def _ranks(values: Sequence[Sequence[float]]) -> list[NDArray[np.float64]]:
    flat = np.concatenate([np.asarray(layer, dtype=np.float64) for layer in values])
    order = flat.argsort().argsort() / max(1, len(flat) - 1)
    return np.split(order, np.cumsum([len(layer) for layer in values])[:-1])
