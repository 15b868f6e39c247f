"""Scenarios of ``edgepress bench``: what its options say, and what is told under the table."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..errors import UsageError

Scenario = Annotated[
    str,
    typer.Option(
        help="single-stream: one query after the other; offline: all are there at once; server: they come at --rate."
    ),
]
Rate = Annotated[float | None, typer.Option(help="Queries a second of a server, at random times.")]
Deadline = Annotated[str | None, typer.Option(help="15ms: also the share of a server's queries answered by then.")]
Width = Annotated[
    str | None,
    typer.Option(
        help="1%: end as soon as the interval of each ratio to the first, or of one median alone, is narrower."
    ),
]


def options(scenario: str, rate: float | None, deadline: str | None, width: str | None) -> dict[str, Any]:
    """As ``load.benchmark`` takes them."""
    found: dict[str, Any] = {"scenario": scenario, "rate": rate}
    found["deadline_ms"] = _number(deadline, r"ms", "--deadline", "15ms") if deadline else None
    found["confidence_width"] = _number(width, r"%", "--confidence-width", "1%") / 100 if width else None
    return found


def _number(text: str, unit: str, option: str, example: str) -> float:
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*{unit}", text)
    value = float(match[1]) if match else 0.0
    if not 0 < value < math.inf:
        raise UsageError(f"{option} '{text}' is not such as {example}.")
    return value


def show(rows: Sequence[dict[str, Any]], environment: dict[str, Any]) -> None:
    """What the table of latencies has no column for."""
    first = rows[0]
    for row in rows:
        throughput, around = row["throughput"]["rows_per_s"], row["throughput"]["interval"]
        if around:
            print(f"{row['name']}: {throughput:,.1f} rows/s [{around[0]:,.1f}, {around[1]:,.1f}]")
        if server := row.get("server"):
            print(f"{row['name']}: {_served(server, row['latency_ms']['n'])}")
        if row["scenario"] != "offline":
            print(f"{row['name']}: {_percentiles(row)}")
    if first["intervals_by"] == "order statistics":
        print(f"ended early, after {first['latency_ms']['n']:,} rounds")
    opened = environment["openings"]
    times = f"; opened {opened} times" if opened > 1 else ""
    subtracted = "is part of it" if first["scenario"] == "offline" else "is subtracted from each"
    print(f"timing a query takes {environment['clock_overhead_ns']} ns itself, which {subtracted}{times}")


def _served(server: dict[str, Any], count: int) -> str:
    said = f"{server['rate']:g} queries a second, busy {sum(server['loads']) / len(server['loads']):.0%} of the time"
    if server["within"] is not None:
        said += f", {server['within']:.1%} of {count:,} answered within {server['deadline_ms']:g} ms"
    if not server["sustained"]:
        said += f"; the rate could not be sustained: in a quarter of the run the load was {max(server['loads']):.0%}"
        said += ", and the queue grows with the length of the run, its latencies too"
    return said


def _percentiles(row: dict[str, Any]) -> str:
    found = []
    for name, around in row["latency_intervals_ms"].items():
        if around:
            high = "more" if around[1] is None else f"{around[1]:.2f}"
            found.append(f"{name} {row['latency_ms'][name]:.2f} ms [{around[0]:.2f}, {high}]")
    return ", ".join(found)
