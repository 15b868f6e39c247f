"""Frontier: which variants no other beats in both quality and latency, or in both quality and size.

A variant is dominated by another that is at least as good in both and better in one (Pareto 1906). Figures have
intervals, so of a dominated one it is also said whether these leave a doubt.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..models.measures import KNOWN
from .charts import HEIGHT, LEFT, TOP, WIDTH, Plane
from .page import note

Row = dict[str, Any]

LEGEND = (
    "The dashed line joins the variants that no other beats in both; hollow ones are beaten. Lines through a point are "
    "95 % bootstrap intervals. In the picture of latency the area of a circle is the size on disk."
)
COSTS = {"latency": "median latency, ms", "size": "size, MB"}
"""What quality is held against, and the title of its axis."""


@dataclass(frozen=True)
class Place:
    """Where a variant stands: the costs, of ``COSTS``, at which it is on the frontier, and what dominates it."""

    on: tuple[str, ...]
    dominated_by: str | None = None
    """The best of the variants that are at least as fast, as small and as good, and better in something."""
    doubtful: bool = False
    """Whether the intervals leave it open."""

    @property
    def text(self) -> str:
        """Of a cell in a table: ``latency, size``, ``latency``, ``size``, ``dominated``, or ``off`` where it takes one
        variant to beat it in latency and another to beat it in size."""
        return ", ".join(self.on) or ("dominated" if self.dominated_by is not None else "off")


def comparable(rows: Sequence[Row]) -> bool:
    """Whether there are two rows at least, all judged by one metric."""
    metrics = {row["quality"]["metric"] if row["quality"] else None for row in rows}
    return len(rows) > 1 and len(metrics) == 1 and None not in metrics


def places(rows: Sequence[Row]) -> list[Place]:
    """The place of each row among all of them, which are :func:`comparable`."""
    found = []
    for row in rows:
        on = tuple(cost for cost in COSTS if not any(_beats(other, row, (cost,)) for other in rows))
        better = [other for other in rows if not on and _beats(other, row, tuple(COSTS))]
        best = max(better, key=_good, default=None)
        found.append(Place(on, best["name"], _doubtful(best, row)) if best else Place(on))
    return found


def told(rows: Sequence[Row], found: Sequence[Place]) -> list[str]:
    """A sentence for each dominated variant."""
    by_name = {row["name"]: row for row in rows}
    texts = []
    for row, place in zip(rows, found, strict=True):
        if place.dominated_by is not None:
            other = by_name[place.dominated_by]
            figures = (
                f"{other['latency_ms']['p50']:.2f} against {row['latency_ms']['p50']:.2f} ms, "
                f"{other['size_bytes'] / 1e6:.1f} against {row['size_bytes'] / 1e6:.1f} MB, "
                f"{other['quality']['metric']} {other['quality']['value']:.2f} against {row['quality']['value']:.2f}"
            )
            doubt = ", though their intervals overlap" if place.doubtful else ""
            texts.append(f"{row['name']} is dominated by {other['name']}{doubt}: {figures}.")
    return texts


def cost(row: Row, name: str) -> float:
    """Median milliseconds or megabytes."""
    return float(row["latency_ms"]["p50"] if name == "latency" else row["size_bytes"] / 1e6)


def spread(row: Row, name: str) -> tuple[float, float]:
    """The interval of a cost."""
    if name == "latency" and row.get("latency_interval_ms"):
        low, high = row["latency_interval_ms"]
        return float(low), float(high)
    return cost(row, name), cost(row, name)


def _good(row: Row) -> float:
    """The quality, more being better."""
    quality = row["quality"]
    return float(quality["value"] * (KNOWN[quality["metric"]].better if quality["metric"] in KNOWN else 1))


def _beats(a: Row, b: Row, costs: Sequence[str]) -> bool:
    pairs = [(_good(a), _good(b)), *((-cost(a, name), -cost(b, name)) for name in costs)]
    return all(ours >= theirs for ours, theirs in pairs) and any(ours > theirs for ours, theirs in pairs)


def _doubtful(a: Row, b: Row) -> bool:
    """Whether the intervals of ``a`` and ``b`` overlap both in quality and in latency."""
    of_quality = [(row["quality"]["low"], row["quality"]["high"]) for row in (a, b)]
    return all(_overlap(*pair) for pair in (of_quality, [spread(row, "latency") for row in (a, b)]))


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] <= b[1] and b[0] <= a[1]


# ---- the picture


def picture(rows: Sequence[Row], chosen: Collection[str] = (), against: str = "latency") -> str:
    """Quality ``against`` one of ``COSTS``, both with their intervals; a line joins the variants on the frontier.

    Where that is the latency the area of a circle is the size on disk. Variants that are dominated at this cost are
    hollow.
    """
    judged = [row for row in rows if row["quality"]]
    if not judged:
        return "<p>No quality was measured.</p>"
    metric = judged[0]["quality"]["metric"]
    spreads = [spread(row, against) for row in judged]
    xs = [0.0, *(bound for both in spreads for bound in both)]
    ys = [bound for row in judged for bound in (row["quality"]["low"], row["quality"]["high"])]
    plane = Plane(xs, ys, COSTS[against], metric)
    best = [row for row in judged if not any(_beats(other, row, (against,)) for other in judged)]
    best.sort(key=lambda row: cost(row, against))
    line = [(cost(row, against), row["quality"]["value"]) for row in best]
    plane.line(line, "frontier")
    biggest = max(row["size_bytes"] for row in judged)
    order = sorted(judged, key=lambda row: (cost(row, against), -_good(row)))
    radii = [20 * math.sqrt(row["size_bytes"] / biggest) if against == "latency" else 7 for row in order]
    for row, radius in zip(order, radii, strict=True):
        style = " chosen" if row["name"] in chosen else ""
        style += "" if row in best else " hollow"
        _point(plane, row, against, style, radius)
    _labels(plane, order, radii, against)
    return plane.svg(_said(best, against, metric))


def section(rows: Sequence[Row], chosen: Collection[str] = (), found: Sequence[Place] | None = None) -> str:
    """HTML: quality against both costs, and what is dominated; ``found`` are the places of the rows, if known."""
    pictures = "".join(picture(rows, chosen, against) for against in COSTS)
    if not comparable(rows):
        return pictures if len(rows) > 1 else picture(rows, chosen)
    texts = told(rows, places(rows) if found is None else found)
    listed = "".join(f"<li>{escape(text)}</li>" for text in texts)
    said = f"<ul>{listed}</ul>" if listed else note("No variant is dominated by another.")
    return pictures + said + note(LEGEND)


def _said(best: Sequence[Row], against: str, metric: str) -> str:
    """The picture in words."""
    points = "; ".join(
        f"{row['name']} {cost(row, against):.3g} {'ms' if against == 'latency' else 'MB'}, "
        f"{metric} {row['quality']['value']:.4g}"
        for row in best
    )
    return f"Quality against {against}. On the frontier: {points}"


def _point(plane: Plane, row: Row, against: str, style: str, radius: float) -> None:
    quality, at = row["quality"], cost(row, against)
    low, high = spread(row, against)
    for a, b in (((at, quality["low"]), (at, quality["high"])), ((low, quality["value"]), (high, quality["value"]))):
        plane.line([a, b], "whisker")
    tip = f"{row['name']}: {at:.3g} [{low:.3g}, {high:.3g}], quality {quality['value']:.4g}"
    tip += f" [{quality['low']:.4g}, {quality['high']:.4g}]"
    plane.circle(at, quality["value"], radius, f"point{style}", tip)


def _labels(plane: Plane, order: Sequence[Row], radii: Sequence[float], against: str) -> None:
    """Names above the points, each in the first place where it covers no other name and no point."""
    spots = [(plane.x(cost(row, against)), plane.y(row["quality"]["value"])) for row in order]
    taken = [(x - r, y - r, x + r, y + r) for (x, y), r in zip(spots, radii, strict=True)]
    for row, (x, y), radius in zip(order, spots, radii, strict=True):
        text = f"{row['name']}, {row['size_bytes'] / 1e6:.1f} MB"
        wide = 6.4 * len(text)
        places = [
            place
            for step in range(12)
            for place in (
                (x + radius + 6, y + 4 - 15 * step, "start"),
                (x - radius - 6, y + 4 - 15 * step, "end"),
                (x + radius + 6, y + 4 + 15 * step, "start"),
                (x - radius - 6, y + 4 + 15 * step, "end"),
            )
        ]
        fitting = []
        for at, height, anchor in places:
            start = at - wide if anchor == "end" else at
            box = (start, height - 11, start + wide, height + 3)
            inside = start >= LEFT and box[2] <= WIDTH and box[1] >= TOP - 12 and box[3] <= HEIGHT - 50
            if inside and not any(_crosses(box, other) for other in taken):
                fitting.append((at, height, anchor, box))
        if not fitting:  # too many for the picture; the tips and the table name them
            continue
        at, height, anchor, box = fitting[0]
        taken.append(box)
        plane.text(at, height, text, anchor, "label")


def _crosses(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
