"""Spread: latencies as they were measured, run by run, and not only their percentiles.

For each variant a violin, which shows modes and tails, and the share of runs that took at most so long.

Source  Hintze & Nelson 1998, The American Statistician 52:2 (violin plots).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from .charts import HUES, WIDTH, Plane, svg_of, ticks

Floats = NDArray[np.float64]

POINTS = 160
"""At which a density is drawn."""
BEYOND = 99.5
"""The percentile up to which is drawn; what lies beyond is told in words."""
VIOLIN = 46


def violins(names: Sequence[str], samples: Sequence[Floats], chosen: str | None) -> str:
    """The density of each variant's latencies, mirrored, on one logarithmic axis, with marks at p50, p90 and p99.

    A density is Gaussian, of the logarithms, by Silverman's rule but with the interquartile range, so that a long tail
    does not blur the middle.
    """
    longest = max(float(np.percentile(values, BEYOND)) for values in samples)
    low, high = math.log(min(float(values.min()) for values in samples)), math.log(longest)
    low, high = (low - 0.05, high + 0.05) if high - low < 0.1 else (low, high)
    left, right, height = 16.0, WIDTH - 24.0, len(names) * (VIOLIN + 22) + 44
    marks = _marks(math.exp(low), math.exp(high))
    low, high = min(low, math.log(marks[0])), max(high, math.log(marks[-1]))

    def x(value: float) -> float:
        return left + (math.log(value) - low) / (high - low) * (right - left)

    bottom = height - 44
    parts = []
    for mark in marks:
        parts.append(f'<line class="grid" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="0" y2="{bottom}"/>')
        parts.append(_text(x(mark), bottom + 16, f"{mark:g}", "tick", "middle"))
    parts.append(_text((left + right) / 2, bottom + 36, "latency, ms (logarithmic)", "title", "middle"))
    grid = np.linspace(low, high, POINTS)
    for number, (name, values) in enumerate(zip(names, samples, strict=True)):
        top = number * (VIOLIN + 22)
        middle = top + 20 + VIOLIN / 2
        density = _density(np.log(values), grid)
        half = density / density.max() * VIOLIN / 2
        over = [f"{x(math.exp(at)):.1f},{middle - h:.1f}" for at, h in zip(grid, half, strict=True)]
        under = [f"{x(math.exp(at)):.1f},{middle + h:.1f}" for at, h in zip(grid, half, strict=True)]
        style = "violin chosen" if name == chosen else "violin"
        p50, p90, p99 = np.percentile(values, [50, 90, 99])
        outside = int((values > longest).sum())
        beyond = f"; {outside} beyond {longest:.3g} ms, the longest {values.max():.3g}" if outside else ""
        said = f"{name}: p50 {p50:.3g}, p90 {p90:.3g}, {len(values):,} runs{beyond}"
        parts.append(f'<g class="{style}"><title>{escape(said)}</title>')
        parts.append(f'<polygon points="{" ".join([*over, *reversed(under)])}"/>')
        shown = [(p50, VIOLIN / 2), (p90, VIOLIN / 3)] + ([(p99, VIOLIN / 4)] if len(values) >= 1000 else [])
        for value, reach in shown:
            place = x(min(float(value), math.exp(high)))
            parts.append(f'<path class="mark" d="M{place:.1f} {middle - reach:.1f}V{middle + reach:.1f}"/>')
        parts.append("</g>")
        parts.append(_text(left, top + 13, said, "label", "start"))
    return svg_of(WIDTH, height, f"Distribution of the latency of {', '.join(names)}", "".join(parts))


def shares(names: Sequence[str], samples: Sequence[Floats], chosen: str | None) -> str:
    """The share of runs that took at most so long: the empirical distribution, a curve for each variant."""
    p50, p90 = (max(float(np.percentile(values, percent)) for values in samples) for percent in (50, 90))
    longest = min(1.15 * p90, 4 * p50)  # the violins show the tails
    lowest = min(float(values.min()) for values in samples)
    plane = Plane([lowest, longest], [0.0, 100.0], "latency, ms", "share of runs, %", legend=len(names))
    last = plane.x_ticks[-1]
    for number, (name, values) in enumerate(zip(names, samples, strict=True)):
        ordered = np.sort(values)
        kept = ordered[ordered <= last]
        steps = sorted({round(step) for step in np.linspace(0, len(kept) - 1, 300)}) if len(kept) else []
        points = [(float(ordered[step]), 100 * (step + 1) / len(ordered)) for step in steps]
        points.append((last, 100 * len(kept) / len(ordered)))
        style = f"hue{number % HUES}{' dashed' if number // HUES % 2 else ''}{' chosen' if name == chosen else ''}"
        said = f"{name}: {100 * len(kept) / len(ordered):.1f} % of {len(ordered):,} runs within {last:g} ms"
        plane.curve(points, style, said)
        plane.key(number, name, style)
    return plane.svg("Share of runs that took at most so long")


def _density(values: Floats, grid: Floats) -> Floats:
    quarter, three = np.percentile(values, [25, 75])
    width = min(float(values.std()), float(three - quarter) / 1.34) or float(values.std()) or 0.01
    width = max(0.9 * width * len(values) ** -0.2, (grid[-1] - grid[0]) / POINTS)
    counts, edges = np.histogram(values, bins=4 * POINTS, range=(grid[0] - 3 * width, grid[-1] + 3 * width))
    centres = (edges[:-1] + edges[1:]) / 2
    result: Floats = np.exp(-0.5 * ((grid[:, None] - centres) / width) ** 2) @ counts
    return np.maximum(result, 1e-12)


def _marks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis."""
    if high < 3 * low:
        return [mark for mark in ticks(low, high) if mark > 0]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [float(f"{step}e{power}") for power in powers for step in ((1, 2, 5) if high < 1000 * low else (1,))]
    first = max((at for at, mark in enumerate(every) if mark <= low), default=0)
    last = next((at for at, mark in enumerate(every) if mark >= high), len(every) - 1)
    return every[first : last + 1]


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
