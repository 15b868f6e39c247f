"""Comparison: any number of runs, of a sweep's cells and of artifacts that were measured together, side by side.

What was measured together is a group, and figures of two groups are held against each other only where their machines,
targets and shapes are the same; their qualities only where they were judged on the same rows. Everything else is shown
apart, with the reason.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from . import frontier, tables
from .compare import rows as compared
from .environment import differences
from .frontier import Place
from .measurement import Measurement

Row = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Rows that were measured interleaved, the first of which is the original that the others are compared with."""

    title: str
    source: str
    rows: tuple[Row, ...]
    chosen: str | None
    refused: tuple[Row, ...] = ()
    environment: Mapping[str, Any] | None = None
    """None where it is not known."""
    judged_on: str = ""
    """The rows that quality is about."""
    measured: tuple[Measurement, ...] = ()
    """The raw samples, where they are at hand."""


@dataclass(frozen=True)
class Comparison:
    """``clusters`` are the groups whose figures may be held against each other; ``apart`` says why others may not."""

    clusters: tuple[tuple[Group, ...], ...]
    apart: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What could not be shown, such as cells that failed."""

    @property
    def groups(self) -> list[Group]:
        return [group for cluster in self.clusters for group in cluster]


def of_run(run: Path, summary: Row, measured: Sequence[Measurement] = (), title: str = "") -> Group:
    """The group of a finished run, its rows as they were written; InputError where its summary lacks something."""
    try:
        recipe = summary.get("recipe", {})
        about = f"{recipe.get('data') or recipe.get('model')}, seed {recipe.get('seed', 0)}"
        rows, environment = [summary["original"], *summary["results"]], dict(summary["environment"])
        picked, refused = summary["chosen"], tuple(summary["refused"])
        if not isinstance(picked, str | None):
            raise TypeError(f"chosen is {picked!r}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{run / 'summary.json'} is not the summary of a run: {error!r}.") from error
    found = of_rows(title or run.resolve().name, str(run), rows, picked)
    return replace(found, refused=refused, environment=environment, judged_on=about, measured=tuple(measured))


def of_rows(title: str, source: str, rows: Sequence[Row], chosen: str | None) -> Group:
    """A group of which no more than the rows is known; InputError where they are no rows."""
    try:
        for row in rows:
            tables.cells(row, rows[0])
            _line(row, None)
            wanted = [row[name] for name in ("name", "target", "batch", "sequence", "artifact")]
            if row["quality"]:
                wanted += [row["quality"][name] for name in ("metric", "value", "low", "high", "n")]
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(f"{source} holds a row that is none of a comparison: {error!r}.") from error
    return Group(title, source, tuple(rows), chosen)


def of_measured(measured: Sequence[Measurement]) -> Group:
    """The group of artifacts that were measured now, on one target."""
    first = measured[0]
    names = [item.name for item in measured]
    doubled = {name for name in names if names.count(name) > 1}  # the folder tells those of one name apart
    told = [replace(m, name=f"{m.name} ({m.artifact})") if m.name in doubled else m for m in measured]
    tokens = f" x sequence {first.sequence}" if first.sequence else ""
    title = f"measured now on {first.target}, batch {first.batch}{tokens}"
    rows = tuple(compared(told))
    return Group(title, "artifacts", rows, None, environment=first.environment, measured=tuple(told))


def together(groups: Sequence[Group], notes: Sequence[str] = ()) -> Comparison:
    """Put the groups that may be held against each other into one cluster, in the order given."""
    groups = _named_apart(groups)
    clusters: list[list[Group]] = []
    apart = []
    for group in groups:
        reasons = [differing(cluster[0], group) for cluster in clusters]
        if [] in reasons:
            clusters[reasons.index([])].append(group)
            continue
        if clusters:
            said = "; ".join(reasons[0])
            apart.append(f"'{group.title}' is not held against '{clusters[0][0].title}': {said}.")
        clusters.append([group])
    return Comparison(tuple(map(tuple, clusters)), tuple(apart), tuple(notes))


def _named_apart(groups: Sequence[Group]) -> list[Group]:
    """Groups of one title are called by their source, and numbered where that is the same too."""
    titles = [group.title for group in groups]
    made = [replace(one, title=one.source) if titles.count(one.title) > 1 else one for one in groups]
    seen: dict[str, int] = {}
    for at, group in enumerate(made):
        seen[group.title] = seen.get(group.title, 0) + 1
        if seen[group.title] > 1:
            made[at] = replace(group, title=f"{group.title} ({seen[group.title]})")
    return made


def differing(a: Group, b: Group) -> list[str]:
    """Why the figures of two groups must not be held against each other; empty where they may be."""
    if a.environment is None or b.environment is None:
        return ["the machine is not known"]
    ran = {row.get("runtime", "") for group in (a, b) for row in group.rows}
    reasons = differences(a.environment, b.environment, sorted(ran))
    first, second = a.rows[0], b.rows[0]
    for field in ("target", "batch", "sequence", "past"):
        ours, theirs = first.get(field, 0), second.get(field, 0)
        if ours != theirs:
            reasons.append(f"{field} is {ours} and {theirs}")
    if first["quality"] and second["quality"]:
        if a.judged_on != b.judged_on or first["quality"]["n"] != second["quality"]["n"]:
            reasons.append(f"quality is of other rows ({a.judged_on} and {b.judged_on})")
        elif first["quality"]["metric"] != second["quality"]["metric"]:
            reasons.append(f"quality is {first['quality']['metric']} and {second['quality']['metric']}")
    return reasons


def named(cluster: Sequence[Group]) -> list[Row]:
    """All rows of a cluster; with several groups each name begins with its group's title."""
    if len(cluster) == 1:
        return list(cluster[0].rows)
    return [{**row, "name": f"{group.title}: {row['name']}"} for group in cluster for row in group.rows]


def chosen(cluster: Sequence[Group]) -> set[str]:
    """The names in :func:`named` of what was chosen."""
    picked = [(group, group.chosen) for group in cluster if group.chosen is not None]
    return {name if len(cluster) == 1 else f"{group.title}: {name}" for group, name in picked}


def places(cluster: Sequence[Group]) -> list[tuple[Place, ...]]:
    """For each group the places of its rows among all rows of the cluster; empty where they are not known."""
    rows = judged(cluster)
    if not frontier.comparable(rows):
        return [()] * len(cluster)
    found = {row["name"]: place for row, place in zip(rows, frontier.places(rows), strict=True)}
    every = iter([found.get(row["name"]) for row in named(cluster)])
    of_groups = [[next(every) for _ in group.rows] for group in cluster]
    return [tuple(place for place in group if place) if all(group) else () for group in of_groups]


def judged(cluster: Sequence[Group]) -> list[Row]:
    """Those of :func:`named` whose quality is known."""
    return [row for row in named(cluster) if row["quality"]]


def dominated(cluster: Sequence[Group]) -> list[str]:
    """A sentence for each variant of a cluster that another dominates."""
    rows = judged(cluster)
    return frontier.told(rows, frontier.places(rows)) if frontier.comparable(rows) else []


# ---- as data


def document(comparison: Comparison) -> Row:
    """The comparison as plain data: the fields that one run has, of the first group, and where there is more than one
    ``groups`` with them all. Those of one measurement on several targets are in one list."""
    groups = comparison.groups
    first = groups[0]
    if all(group.source == first.source == "artifacts" for group in groups):
        original, *results = [row for group in groups for row in group.rows]
        return {"original": original, "results": results, "chosen": None, "refused": []}
    whole: Row = _fields(first)
    if len(groups) > 1 or comparison.notes:
        numbered = [(at, group) for at, cluster in enumerate(comparison.clusters) for group in cluster]
        whole["groups"] = [
            {"title": group.title, "source": group.source, "comparable": at, **_fields(group)} for at, group in numbered
        ]
        whole["apart"], whole["notes"] = list(comparison.apart), list(comparison.notes)
    return whole


def _fields(group: Group) -> Row:
    original, *results = group.rows
    return {"original": original, "results": results, "chosen": group.chosen, "refused": list(group.refused)}


PLAIN = (
    "target",
    "precision",
    "params",
    "macs",
    "size_bytes",
    "load_ms",
    "peak_rss_bytes",
    "batch",
    "sequence",
    "past",
)
SPEEDUP = ("value", "low", "high", "verdict")
QUALITY = ("metric", "value", "low", "high", "drop", "drop_low", "drop_high", "n")


def table(comparison: Comparison) -> str:
    """The comparison as CSV, a line for each variant. Groups with the same number in ``comparable`` may be held against
    each other."""
    file = io.StringIO(newline="")
    lines = csv.writer(file)
    latency = ("p50_ms", "p50_low_ms", "p50_high_ms", "p90_ms", "p99_ms", "n")
    lines.writerow(
        ["comparable", "group", "source", "name", "chosen", "artifact", *PLAIN]
        + [f"latency_{name}" for name in latency]
        + [f"speedup_{name}" for name in SPEEDUP]
        + [f"quality_{name}" for name in QUALITY]
        + ["frontier", "dominated_by"]
    )
    for at, cluster in enumerate(comparison.clusters):
        for group, found in zip(cluster, places(cluster), strict=True):
            about = [at, group.title, group.source]
            for row, place in zip(group.rows, found or [None] * len(group.rows), strict=True):
                lines.writerow([*about, row["name"], row["name"] == group.chosen, *_line(row, place)])
    return file.getvalue()


def _line(row: Row, place: Place | None) -> list[Any]:
    latency, interval = row["latency_ms"], row.get("latency_interval_ms") or (None, None)
    faster, quality = row["speedup"] or {}, row["quality"] or {}
    return [
        row["artifact"],
        *(row.get(name) for name in PLAIN),
        *(latency["p50"], *interval, latency["p90"], latency["p99"], latency["n"]),
        *(faster.get(name) for name in SPEEDUP),
        *(quality.get(name) for name in QUALITY),
        *((place.text, place.dominated_by) if place else (None, None)),
    ]
