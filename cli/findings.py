"""What ``bench`` tells beside the table of latencies: what else each artifact takes, what to doubt, and profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..benchmarks.measurement import Measurement

TYPES, NODES = 12, 8
PAGE = "profile.html"


def doubts(taken: Sequence[Measurement]) -> list[str]:
    """Why the figures of one interleaved run may be doubted: signs in the machine, and in each artifact's samples."""
    from ..benchmarks import environment

    found = environment.warnings(taken[0].environment)
    timed = [item for item in taken if item.scenario != "server"]  # there waiting is part of a latency, and varies
    return found + [f"{item.name}: {sign}" for item in timed for sign in environment.unsteady(item.samples)]


def run(taken: Sequence[Measurement]) -> dict[str, Any]:
    """One interleaved run and what was seen in it alone, for JSON."""
    first = taken[0]
    seen = {name: first.environment.get(name) for name in ("openings", "clock_overhead_ns", "watch")}
    return {"target": first.target, "batch": first.batch, "sequence": first.sequence, "past": first.past, **seen}


def show(taken: Sequence[Measurement], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print all of it for one interleaved run and its ``rows``."""
    from ..benchmarks import profile, tables

    tables.plain_table(tables.COSTS, [tables.costs(dict(row)) for row in rows])
    if rows[0]["energy_mj"] is None:
        print(f"energy: {rows[0]['energy_note']}")
    else:
        idle = taken[0].environment["energy"]["idle_watts"]
        print(f"energy: {rows[0]['energy_note']}, all that it measures; {idle:.2f} W of it idle")
    for doubt in doubts(taken):
        print(f"warning: {doubt}")
    for item in taken:
        if item.profile:
            found = profile.read(item)
            tables.plain_table(
                profile.TYPES_HEADER, profile.type_lines(found, TYPES), title=f"{item.name}: where its time goes"
            )
            tables.plain_table(profile.LAYERS_HEADER, profile.layer_lines(found))
            tables.plain_table(profile.NODES_HEADER, profile.node_lines(found, NODES))
            print(profile.headline(found, item.p50))


def write_profiles(measured: Sequence[Sequence[Measurement]], folder: Path) -> Path | None:
    """The page with every profile in ``folder``; None where there is none."""
    from ..benchmarks import profile
    from ..files import write_text

    items = [item for taken in measured for item in taken if item.profile]
    if not items:
        return None
    headings = [f"{item.artifact}, {_shape(item)}" for item in items]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / PAGE, profile.write_page(items, headings))
    return folder / PAGE


def _shape(item: Measurement) -> str:
    tokens = f" x sequence {item.sequence}" if item.sequence else ""
    return f"{item.target}, batch {item.batch}{tokens}" + (f" after {item.past}" if item.past else "")
