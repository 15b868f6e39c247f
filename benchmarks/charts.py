"""Charts as SVG text: no library, no script, colours from the page's own style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

WIDTH, HEIGHT = 720, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 20, 48
FILE_STYLE = (
    "svg{background:#fff}.grid{stroke:#e2e4e7}.tick,.title{fill:#60646c;font-size:12px}"
    ".label{fill:#1c2024;font-size:12px}.frontier{fill:none;stroke:#60646c;stroke-dasharray:4 4}"
    ".point{fill:#5b6b8c;fill-opacity:.45;stroke:#5b6b8c}.curve{fill:none;stroke:#5b6b8c}"
    ".point.chosen{fill:#b45309;stroke:#b45309}"
)
"""What the pages' style sheet says of the charts that are also files."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high], two at least."""
    span = high - low or abs(low) or 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.floor(low / step)
    return [step * i for i in range(first, max(math.ceil(high / step), first + 1) + 1)]


class Plane:
    """Axes: data to picture, with grid and labels."""

    def __init__(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        x_title: str,
        y_title: str,
        *,
        right: int = RIGHT,
        legend: int = 0,
    ) -> None:
        self.right, self.height = WIDTH - right, HEIGHT + 18 * -(-legend // 2)
        self.x_ticks, self.y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
        self.parts: list[str] = []
        for value in self.x_ticks:
            x = self.x(value)
            self.parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            self.text(x, HEIGHT - BOTTOM + 18, f"{value:g}", "middle")
        for value in self.y_ticks:
            y = self.y(value)
            self.parts.append(f'<line class="grid" x1="{LEFT}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self.text(LEFT - 8, y + 4, f"{value:g}", "end")
        self.text((LEFT + self.right) / 2, HEIGHT - 8, x_title, "middle", "title")
        self.parts.append(
            f'<text class="title" text-anchor="middle" transform="translate(16 {HEIGHT / 2}) rotate(-90)">'
            f"{escape(y_title)}</text>"
        )

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return LEFT + (value - low) / (high - low) * (self.right - LEFT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def text(self, x: float, y: float, text: str, anchor: str, style: str = "tick") -> None:
        self.parts.append(f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, points: Sequence[tuple[float, float]], style: str) -> None:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        self.parts.append(f'<polyline class="{style}" points="{path}"/>')

    def circle(self, x: float, y: float, radius: float, style: str, tip: str) -> None:
        place = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius:.1f}"'
        self.parts.append(f'<circle class="{style}" {place}><title>{escape(tip)}</title></circle>')

    def curve(self, points: Sequence[tuple[float, float]], style: str, tip: str) -> None:
        """A line in one of the style sheet's hues."""
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        self.parts.append(f'<g class="series {style}"><title>{escape(tip)}</title><polyline points="{path}"/></g>')

    def key(self, number: int, name: str, style: str) -> None:
        """The name of a curve, below the picture, in two columns; room is made for as many as ``legend`` says."""
        x, y = LEFT + number % 2 * (self.right - LEFT) / 2, HEIGHT + 10 + 18 * (number // 2)
        self.parts.append(f'<g class="series {style}"><polyline points="{x:.1f},{y - 4} {x + 24:.1f},{y - 4}"/></g>')
        self.text(x + 30, y, _short(name, 44), "start", "label")

    def svg(self, title: str) -> str:
        return svg_of(WIDTH, self.height, title, "".join(self.parts))


def svg_of(width: float, height: float, title: str, body: str) -> str:
    """A picture in a box that scrolls where the page is narrower than one can read; ``title`` says it in words."""
    return (
        f'<div class="wide chart"><svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{body}</svg></div>"
    )


def standalone(chart: str) -> str:
    """A picture as a file of its own, in the light colours of the pages."""
    head, rest = chart[chart.index("<svg") : chart.rindex("</div>")].split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg" font-family="sans-serif"><style>{FILE_STYLE}</style>{rest}\n'


def growth(xs: Sequence[float], ys: Sequence[float], x_title: str, y_title: str, title: str) -> str:
    """Points, and the straight line that fits them best."""
    plane = Plane([0.0, *xs], [0.0, *ys], x_title, y_title)
    slope, rest = np.polyfit(xs, ys, 1)
    plane.line([(x, slope * x + rest) for x in (min(xs), max(xs))], "frontier")
    for x, y in zip(xs, ys, strict=True):
        plane.parts.append(f'<circle class="point" cx="{plane.x(x):.1f}" cy="{plane.y(y):.1f}" r="5"/>')
    return plane.svg(title)


def agreement(series: Mapping[str, Sequence[tuple[float, float]]], axes: tuple[str, str], title: str) -> str:
    """Pairs that should be equal, and the line where they are; each series has its name by its last point."""
    every = [0.0, *(value for pairs in series.values() for pair in pairs for value in pair)]
    plane = Plane(every, every, *axes)
    plane.line([(0.0, 0.0), (max(every), max(every))], "frontier")
    for number, (name, pairs) in enumerate(series.items()):
        for x, y in ((plane.x(a), plane.y(b)) for a, b in pairs):
            plane.parts.append(
                f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
                if number % 2 == 0
                else f'<rect class="point" x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
            )
        a, b = max(pairs)
        plane.text(plane.x(a) - 10, plane.y(b) - 8, name, "end", "label")
    return plane.svg(title)


def training(trace: Sequence[dict[str, Any]]) -> str:
    """Loss against step; a circle where something was wrong, which says what."""
    points = [(entry["step"], entry["loss"]) for entry in trace if entry["loss"] is not None]
    plane = Plane([x for x, _ in points], [0.0, *(y for _, y in points)], "step", "distillation loss")
    plane.line(points, "curve chosen")
    for entry in trace:
        told = "; ".join(f"{event['kind']}, {event['where']}: {event['done']}" for event in entry["events"])
        if told:
            x, y = plane.x(entry["step"]), plane.y(plane.y_ticks[-1] if entry["loss"] is None else entry["loss"])
            tip = escape(f"step {entry['step']}: {told}")
            plane.parts.append(f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{tip}</title></circle>')
    return plane.svg("Loss during recovery")


def norms(layers: Sequence[str], trace: Sequence[dict[str, Any]]) -> str:
    """The gradient's norm in each of ``layers``, a row, as training went on: darker is larger, on a logarithmic scale
    that all rows share. A cell is a step, or the median of several; an empty one was not finite."""
    parts = np.array_split(np.arange(len(trace)), min(48, len(trace)))
    found = [[_middle([trace[i]["norms"][row] for i in part]) for part in parts] for row in range(len(layers))]
    known = [math.log10(value) for line in found for value in line if value] or [0.0]
    low, span = min(known), (max(known) - min(known)) or 1.0
    plane = Rows(list(layers))
    width = (plane.right - plane.left) / len(parts)
    for row, (layer, line) in enumerate(zip(layers, found, strict=True)):
        for place, (value, part) in enumerate(zip(line, parts, strict=True)):
            shade = 0.06 + 0.9 * (math.log10(value) - low) / span if value else 0.0
            said = "none" if value is None else f"{value:.3g}"
            tip = f"{layer}, steps {trace[part[0]]['step']} to {trace[part[-1]]['step']}: {said}"
            plane.box(plane.left + place * width, row, width - 1, shade, tip)
    return plane.svg("Norm of the gradient, layer by layer, step by step")


def _middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


HUES = 7
"""Colours of the style sheet, ``hue0`` and on; what comes after them has them again, dashed."""


def curves(names: Sequence[str], xs: Sequence[float], lines: Sequence[Sequence[float]], axes: tuple[str, str]) -> str:
    """A curve for each name through the values at ``xs``, labelled on the right at its end."""
    plane = Plane(xs, [0.0, *(y for line in lines for y in line)], *axes, right=24 + 8 * max(map(len, names)))
    ends = _spread([plane.y(line[-1]) for line in lines], TOP, HEIGHT - BOTTOM)
    for number, (name, line, end) in enumerate(zip(names, lines, ends, strict=True)):
        style = f"series hue{number % HUES}{' dashed' if number // HUES % 2 else ''}"
        points = [(plane.x(a), plane.y(b)) for a, b in zip(xs, line, strict=True)]
        label = (points[-1][0] + 14, end)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (*points, label))
        said = ", ".join(f"{b:.3g} at {a:g}" for a, b in zip(xs, line, strict=True))
        plane.parts.append(f'<g class="{style}"><title>{escape(f"{name}: {said}")}</title><polyline points="{path}"/>')
        plane.parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points]
        plane.parts.append("</g>")
        plane.text(label[0] + 4, end + 4, name, "start", "label")
    return plane.svg(f"{axes[1]} against {axes[0]}")


def _spread(places: Sequence[float], low: float, high: float, apart: float = 14) -> list[float]:
    """``places``, moved as far as it takes for them to be so far apart, in [low, high]."""
    apart = min(apart, (high - low) / max(1, len(places) - 1))
    order = np.argsort(places, kind="stable")
    steps = np.arange(len(places)) * apart
    free = np.asarray(places, dtype=np.float64)[order] - steps
    down, up = np.maximum.accumulate(free), np.minimum.accumulate(free[::-1])[::-1]
    found = np.empty(len(places))
    found[order] = np.clip((down + up) / 2, low, high - steps[-1]) + steps
    return [float(place) for place in found]


# ---- statistics: one row a layer, from the first to the last

ROW = 24
DECADES = 1e-8
"""The least share of the largest gradient that is drawn in its place."""


class Rows:
    """A picture with one row a layer, labelled on the left; what lies from ``left`` to ``right`` is the caller's."""

    def __init__(self, labels: Sequence[str], *, right: int = RIGHT, below: int = 0) -> None:
        self.left = 16 + 7.4 * max((len(_short(label)) for label in labels), default=0)
        self.right, self.height = float(WIDTH - right), len(labels) * ROW + below
        self.parts: list[str] = []
        for row, label in enumerate(labels):
            self.text(self.left - 12, row, _short(label), "end", tip=label)

    def text(
        self, x: float, row: float, text: str, anchor: str = "start", style: str = "tick", *, tip: str = ""
    ) -> None:
        title = f"<title>{escape(tip)}</title>" if tip else ""
        y = row * ROW + ROW / 2 + 4
        self.parts.append(
            f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{title}{escape(text)}</text>'
        )

    def box(self, x: float, row: int, width: float, opacity: float, tip: str) -> None:
        place = f'x="{x:.1f}" y="{row * ROW + 2}" width="{max(width, 0.5):.1f}" height="{ROW - 4}" rx="2"'
        self.parts.append(
            f'<rect class="heat" {place} fill-opacity="{opacity:.2f}"><title>{escape(tip)}</title></rect>'
        )

    def dot(self, x: float, row: int, style: str, radius: float, tip: str) -> None:
        place = f'cx="{x:.1f}" cy="{row * ROW + ROW / 2}" r="{radius}"'
        self.parts.append(f'<circle class="{style}" {place}><title>{escape(tip)}</title></circle>')

    def svg(self, title: str) -> str:
        return svg_of(WIDTH, self.height, title, "".join(self.parts))


def _short(text: str, most: int = 34) -> str:
    return text if len(text) <= most else f"…{text[1 - most :]}"


def gradient_flow(layers: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Gradient norms on a logarithmic scale: a row for each block and each matrix outside the blocks.

    ``layers`` are those of the statistics, ``names`` their labels, those of blocks ``STACK NUMBER``: a line joins the
    blocks of a stack. A large dot is the whole of the row, small dots are the matrices of a block. What is too small
    for the scale stands on its left edge.
    """
    rows: list[list[tuple[str, dict[str, Any]]]] = []
    for entry, name in zip(layers, names, strict=True):
        if rows and entry["kind"] == "matrix" and entry["block"] is not None:
            rows[-1].append((name, entry))
        else:
            rows.append([(name, entry)])
    flags = [_flags(row) for row in rows]
    plane = Rows([row[0][0] for row in rows], right=RIGHT + 7 * max(map(len, flags)), below=46)
    x = _logarithmic(plane, [entry["gradient_norm"] for entry in layers], len(rows), "norm of the gradient")
    stacks: dict[str, list[str]] = {}
    for number, row in enumerate(rows):
        name, whole = row[0]
        if whole["kind"] == "block":
            point = f"{x(whole['gradient_norm']):.1f},{number * ROW + ROW / 2}"
            stacks.setdefault(name.rpartition(" ")[0], []).append(point)
    plane.parts += [f'<polyline class="curve chosen" points="{" ".join(path)}"/>' for path in stacks.values()]
    for number, row in enumerate(rows):
        for name, entry in reversed(row):
            tip = f"{name}: gradient {entry['gradient_norm']:.3g}, weight {entry['weight_norm']:.3g}"
            style, radius = ("point chosen", 6) if entry is row[0][1] else ("point", 3.5)
            plane.dot(x(entry["gradient_norm"]), number, style, radius, tip)
        plane.text(plane.right + 10, number, flags[number], "start", "label")
    return plane.svg("Norm of the gradient, layer by layer")


def _flags(row: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """What is wrong in a row: ``vanishing: key, query``, or their number where they are many."""
    found: dict[str, list[str]] = {}
    for name, entry in row:
        if entry["flag"]:
            held = found.setdefault(entry["flag"], [])
            held += [] if entry is row[0][1] else [name]
    texts = []
    for flag, held in found.items():
        few = len(held) <= 2 and len(found) == 1
        texts.append(f"{flag}: {', '.join(held) if few else f'{len(held)} matrices'}" if held else flag)
    return _short("; ".join(texts), 42)


def _logarithmic(plane: Rows, values: Sequence[float], rows: int, title: str) -> Callable[[float], float]:
    """Draw a logarithmic axis for ``values`` below so many rows, and return where on it a value stands."""
    positive = [value for value in values if value > 0] or [1.0]
    scale = _decades(max(min(positive), DECADES * max(positive)), max(positive))
    low, high = math.log10(scale[0]), math.log10(scale[-1])
    span = plane.right - plane.left

    def x(value: float) -> float:
        return plane.left + (max(math.log10(value) - low, 0) / (high - low) * span if value > 0 else 0)

    for tick in scale[:: math.ceil(60 * len(scale) / span)]:
        line = f'x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="0" y2="{rows * ROW}"'
        plane.parts.append(f'<line class="grid" {line}/>')
        plane.text(x(tick), rows, f"{tick:g}", "middle")
    plane.text(plane.left + span / 2, rows + 0.85, title, "middle", "title")
    return x


def _decades(low: float, high: float) -> list[float]:
    """Numbers that cover [low, high] on a logarithmic axis: 1, 2 and 5 times powers of ten, or powers alone if many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high < 200 * low else (1,)
    marks = [float(f"{step}e{power}") for power in powers for step in steps]
    first = max((place for place, mark in enumerate(marks) if mark <= low), default=0)
    last = next((place for place, mark in enumerate(marks) if mark >= high and place > first), len(marks) - 1)
    return marks[first : last + 1]


def influence(labels: Sequence[str], values: Sequence[float], tips: Sequence[str]) -> str:
    """A bar for each block: how much it changes its input."""
    plane = Rows(labels, right=60)
    longest = max(*values, 1e-9)
    for row, (value, tip) in enumerate(zip(values, tips, strict=True)):
        width = max(value, 0) / longest * (plane.right - plane.left)
        plane.box(plane.left, row, width, 0.85, tip)
        plane.text(plane.left + width + 8, row, f"{value:.3f}", "start", "label")
    return plane.svg("Block influence")


def sensitivity(names: Sequence[str], alone: Sequence[float], without: Sequence[float], whole: float) -> str:
    """What quantizing costs, a row for each operator: a large dot where it alone is quantized, a small one where all
    but it are, and a dashed line at all of them. The further the small dot is left of the line, the more is won by
    leaving the operator in float."""
    plane = Rows(["", *names], below=46)
    rows = len(names) + 1
    x = _logarithmic(plane, [*alone, *without, whole], rows, "distance from the answers in float")
    plane.parts.append(f'<path class="frontier" d="M{x(whole):.1f} {ROW}V{rows * ROW}"/>')
    near = x(whole) > (plane.left + plane.right) / 2
    plane.text(x(whole), 0, f"all quantized: {whole:.3g}", "end" if near else "start", "label")
    for row, (name, one, others) in enumerate(zip(names, alone, without, strict=True), 1):
        plane.dot(x(others), row, "point", 3.5, f"all but {name}: {others:.3g}")
        plane.dot(x(one), row, "point chosen", 6, f"{name} alone: {one:.3g}")
    return plane.svg("What quantizing each operator costs")


def intervals(
    labels: Sequence[str],
    entries: Sequence[tuple[float | None, float | None, float | None]],
    title: str,
    *,
    limit: float | None = None,
) -> str:
    """A dot for each value, with its interval (value, low, high) as a line; those that are None are left out. ``limit``
    is what a value could be at most."""
    plane = Rows(["", *labels], below=46)
    known = [bound for entry in entries for bound in entry if bound is not None]
    scale = ticks(min([0.0, *known]), max([1.0, *known]))
    span = plane.right - plane.left

    def x(value: float) -> float:
        return plane.left + (value - scale[0]) / (scale[-1] - scale[0]) * span

    rows = len(labels) + 1
    for tick in scale:
        plane.parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{ROW}" y2="{rows * ROW}"/>')
        plane.text(x(tick), rows, f"{tick:.2g}", "middle")
    plane.text(plane.left + span / 2, rows + 0.85, title, "middle", "title")
    if limit is not None:
        plane.parts.append(f'<path class="frontier" d="M{x(limit):.1f} {ROW}V{rows * ROW}"/>')
        plane.text(x(limit), 0, f"ceiling {limit:.2f}", "end")
    best = max((entry[0] for entry in entries if entry[0] is not None), default=None)
    for row, (label, (value, low, high)) in enumerate(zip(labels, entries, strict=True), 1):
        if value is None:
            plane.text(plane.left + 4, row, "not known")
            continue
        tip = f"{label}: {value:.3f}"
        if low is not None and high is not None:
            tip += f" [{low:.3f}, {high:.3f}]"
            plane.parts.append(f'<path class="whisker" d="M{x(low):.1f} {row * ROW + ROW / 2}H{x(high):.1f}"/>')
        plane.dot(x(value), row, "point chosen" if value == best else "point", 5, tip)
    return plane.svg(title)


def cells(
    labels: Sequence[str],
    rows: Sequence[Sequence[float | None]],
    title: str,
    columns: Sequence[str],
    *,
    scale: float = 1.0,
    tips: Sequence[Sequence[str]] | None = None,
) -> str:
    """Values from 0 to ``scale`` as shades, a row for each label; ``columns`` stand above the cells, and each of
    ``tips`` says what a cell is."""
    plane = Rows(["", *labels], right=4)
    width = min(54.0, (plane.right - plane.left) / max(1, len(columns)))
    every = math.ceil(8 * max((len(name) for name in columns), default=1) / width)
    for place, name in enumerate(columns):
        if place % every == 0:
            plane.text(plane.left + (place + 0.5) * width, 0, name, "middle")
    for row, (label, values) in enumerate(zip(labels, rows, strict=True), 1):
        for place, value in enumerate(values):
            shade = 0.0 if value is None else min(max(value / scale, 0.0), 1.0)
            shown = "none" if value is None else f"{value:.3f}"
            tip = tips[row - 1][place] if tips else f"{label}, {columns[place]}: {shown}"
            plane.box(plane.left + place * width, row, width - 2, 0.04 + 0.86 * shade, tip)
            if width >= 34 and value is not None:
                middle = plane.left + (place + 0.5) * width - 1
                plane.text(middle, row, f"{round(value, 2) + 0.0:.2f}", "middle", "cell on" if shade > 0.78 else "cell")
    return plane.svg(title)
