"""docs/benchmarks.md, from the results of the comparisons and from nothing else.

    python benchmarks/peers/page.py [--check]       write it, or say whether it is what the results give (exit code 1)

``benchmarks/results/peers.json`` lists the results with what people have to say about them: a title, the commands, the
goals, and why a cell is lost, by tool or method. A lost cell without a reason is an error, so that none can be hidden.

A peer's cell of a quantization table is *lost* where its file is faster than every file of ours for the same runtime
(for torchao: for any) whose cosine is at least as high, to three places, and the two speedups' intervals lie apart.
A cell of a pruning table is lost where a peer loses fewer points than ours there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
OURS = "edgepress"
FLOAT = {"float", "OpenVINO float"}
TOOLS = {
    "onnxruntime": "ONNX Runtime's tools",
    "olive": "Olive",
    "optimum_onnx": "optimum-onnx",
    "nncf": "NNCF",
    "optimum_intel": "optimum-intel",
    "torchao": "torchao",
}

Row = Mapping[str, Any]
Cell = tuple[int, int, int]
"""Threads, batch, tokens; 0 tokens of images."""


def page() -> str:
    """The Markdown; ValueError where a lost cell has no reason."""
    kept = json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))
    parts = [kept["introduction"]]
    for section in kept["sections"]:
        path = RESULTS / section["file"]
        lines = [f"## {section['title']}", *section.get("text", [])]
        lines.append("\n".join(["```sh", *section["commands"], "```"]))
        lines += {"quantization": quantization, "pruning": pruning}[section["kind"]](path, section)
        lines.append(f"Everything is in [{path.name}](../benchmarks/results/{path.name}).")
        parts.append("\n\n".join(lines))
    return "\n\n".join(parts) + "\n"


# ---- quantization


class Result:
    """A result of ``run.py quantization``, by name and cell."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.contenders: Sequence[Row] = document["contenders"]
        self.cells: list[Cell] = list(dict.fromkeys(_cell(row) for row in document["rows"]))
        self.rows = {(row["name"], _cell(row)): row for row in document["rows"]}

    def of(self, tools: Iterable[str], runtime: str = "") -> list[Row]:
        """The quantized contenders of ``tools``, for ``runtime`` or for any."""
        chosen = [one for one in self.contenders if one["tool"] in set(tools) and one["name"] not in FLOAT]
        return [one for one in chosen if not runtime or one["runtime"] == runtime]

    def fastest(self, contenders: Sequence[Row], cell: Cell) -> Row:
        return min(contenders, key=lambda one: float(self.rows[one["name"], cell]["p50"]))

    def ratio(self, ours: Row, peer: Row, cell: Cell) -> tuple[float, str]:
        """How many times as fast ours is, and the verdict."""
        mine, other = self.rows[ours["name"], cell], self.rows[peer["name"], cell]
        value = other["p50"] / mine["p50"]
        apart = mine["speedup"]["low"] > other["speedup"]["high"] or mine["speedup"]["high"] < other["speedup"]["low"]
        return value, "even" if not apart else "won" if value > 1 else "lost"

    def worst(self, tool: str, cell: Cell) -> tuple[float, str]:
        """The tool's file that stands best against our fastest of at least its cosine."""
        found = []
        for peer in self.of([tool]):
            like = self.of([OURS], "" if tool == "torchao" else peer["runtime"])
            as_good = [one for one in like if round(one["cosine"], 3) >= round(peer["cosine"], 3)]
            if not as_good:
                return 0.0, "lost"
            found.append(self.ratio(self.fastest(as_good, cell), peer, cell))
        return min(found)


def quantization(path: Path, section: Mapping[str, Any]) -> list[str]:
    document = json.loads(path.read_text(encoding="utf-8"))
    result, parts = Result(document), []
    for threads in dict.fromkeys(cell[0] for cell in result.cells):
        parts.append(_speeds(result, [cell for cell in result.cells if cell[0] == threads]))
    tools = [tool for tool in TOOLS if result.of([tool])]
    parts.append(
        "How many times as fast our fastest file is that keeps at least the peer's cosine, on the same runtime (beside "
        "torchao: on any); of a tool's files, the one that does best against it:"
    )
    standing = {tool: [result.worst(tool, cell) for cell in result.cells] for tool in tools}
    heads = [_head(cell, threads=True) for cell in result.cells]
    rows = [[TOOLS[tool], *(_verdict(*one) for one in standing[tool])] for tool in tools]
    for goal in section.get("goals", ()):
        rows.append([goal["title"], *(_goal(result, goal, cell) for cell in result.cells)])
    parts.append(_table(["against", *heads], rows))
    lost = [tool for tool in tools if any(verdict == "lost" for _, verdict in standing[tool])]
    short = [goal["title"] for goal in section.get("goals", ()) if any("short" in cell for cell in _row(rows, goal))]
    parts += _reasons(section, [*lost, *short], path.name)
    parts += _failures(document)
    parts.append(_machine(document))
    return parts


def _speeds(result: Result, cells: Sequence[Cell]) -> str:
    heads = ["", "MB", "cosine", "points lost", *(_head(cell, threads=False) for cell in cells)]
    rows = []
    for one in result.contenders:
        speeds = []
        for cell in cells:
            row = result.rows[one["name"], cell]
            faster = row["speedup"]
            shown = "1" if faster is None else f"{faster['value']:.2f} [{faster['low']:.2f}, {faster['high']:.2f}]"
            speeds.append(f"{shown}, {row['p50']:.2f} ms")
        name = f"**{one['name']}**" if one["tool"] == OURS and one["name"] not in FLOAT else one["name"]
        rows.append([name, f"{one['size_bytes'] / 1e6:.1f}", f"{one['cosine']:.4f}", f"{one['drop']:+.2f}", *speeds])
    threads = cells[0][0]
    return f"On {threads} thread{'s' * (threads > 1)}:\n\n{_table(heads, rows)}"


def _goal(result: Result, goal: Mapping[str, Any], cell: Cell) -> str:
    ours = [one for one in result.of([OURS], goal["runtime"]) if one["cosine"] >= goal["cosine"]]
    peers = [one for one in result.of(goal["tools"]) if one["name"] not in goal.get("without", ())]
    if not ours:
        return "short: no file keeps as much"
    if not peers:
        return "no such peer"
    value, _ = result.ratio(result.fastest(ours, cell), result.fastest(peers, cell), cell)
    return f"{value:.2f}" if value >= goal["ratio"] else f"*{value:.2f}*, short"


def _row(rows: Sequence[Sequence[str]], goal: Mapping[str, Any]) -> Sequence[str]:
    return next(row for row in rows if row[0] == goal["title"])


def _verdict(value: float, verdict: str) -> str:
    if not value:
        return "**lost**: none of ours keeps as much"
    return {"won": f"{value:.2f}", "even": f"{value:.2f}, even", "lost": f"**{value:.2f}, lost**"}[verdict]


def _failures(document: Mapping[str, Any]) -> list[str]:
    missing = {name: facts["missing"] for name, facts in document.get("environments", {}).items() if "missing" in facts}
    lines = [f"- {TOOLS.get(name, name)} did not install: {why}" for name, why in missing.items()]
    lines += [
        f"- {one.get('name') or TOOLS.get(one['tool'], one['tool'])} failed: {one['why']}"
        for one in document.get("failed", ())
    ]
    return ["Without a row:\n\n" + "\n".join(lines)] if lines else []


def _machine(document: Mapping[str, Any]) -> str:
    environment, tools = document["environment"], document.get("environments", {})
    versions = dict(environment["packages"])
    for facts in tools.values():
        versions |= facts if "missing" not in facts else {}
    return _measured(environment, versions)


# ---- pruning


def pruning(path: Path, section: Mapping[str, Any]) -> list[str]:
    head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    original, environment = head["original"], head["environment"]
    sets = list(original["quality"])
    before = ", ".join(f"{name} {found['value']:.2f} (n = {found['n']})" for name, found in original["quality"].items())
    metric = next(iter(original["quality"].values()))["metric"]
    said = "Drops are in points, with 95 % intervals and the range over seeds."
    parts = [f"Before: {metric} {before}, on {head['study']['target']}. {said}"]
    lost: list[str] = []
    for wanted in sorted({row["wanted"] for row in rows}):
        groups: dict[tuple[str, str, int], list[Row]] = {}
        for row in rows:
            if row["wanted"] == wanted and "failed" not in row:
                groups.setdefault((row["contender"], row["setting"], row["recover"]), []).append(row)
        chosen = _best_settings(groups)
        lines = []
        for group in chosen:
            cells = []
            for name in sets:
                drop, low, high = (_mean(groups[group], lambda row: row["quality"][name][end]) for end in DROPS)  # noqa: B023
                ours = [one for one in chosen if one[0] == OURS and one[2] == group[2]]
                best = min((_mean(groups[one], lambda row: row["quality"][name]["drop"]) for one in ours), default=drop)  # noqa: B023
                behind = group[0] != OURS and drop < best and not _too_slow(groups[group])
                lost += [group[0]] * behind
                drops = [row["quality"][name]["drop"] for row in groups[group]]
                shown = f"{drop:.2f} [{low:.2f}, {high:.2f}]"
                shown += f", {min(drops):.2f} to {max(drops):.2f}" if len(drops) > 1 else ""
                cells.append(f"**{shown}, lost**" if behind else shown)
            lines.append(_pruned(group, groups[group], cells))
        columns = ["method", "setting", "seeds", "speedup", *(f"drop, {name}" for name in sets), "M params", "seconds"]
        parts.append(f"{wanted:g} times faster:\n\n{_table(columns, lines)}")
    parts += _reasons(section, list(dict.fromkeys(lost)), path.name)
    return [*parts, _measured(environment, environment["packages"])]


SLOWEST = 0.96
"""The share of the wanted speedup that a row must have: the search allows 2 %, and its figure is measured anew."""
DROPS = ("drop", "drop_low", "drop_high")


def _best_settings(groups: Mapping[tuple[str, str, int], Sequence[Row]]) -> list[tuple[str, str, int]]:
    """Of each method, with and without training, the setting of most seeds that loses least on the set where it loses
    most; those that lose least first."""

    def lost(group: tuple[str, str, int]) -> float:
        if _too_slow(groups[group]):
            return float("inf")
        return _mean(groups[group], lambda row: max(found["drop"] for found in row["quality"].values()))

    best: dict[tuple[str, int], tuple[str, str, int]] = {}
    for group in sorted(groups, key=lambda group: (-len(groups[group]), lost(group))):
        best.setdefault((group[0], group[2]), group)
    return sorted(best.values(), key=lambda group: (group[2], lost(group)))


def _pruned(group: tuple[str, str, int], rows: Sequence[Row], drops: Sequence[str]) -> list[str]:
    name, setting, steps = group
    shown = f"{name} + {steps} steps" if steps else name
    value, low, high = (_mean(rows, lambda row: row["speedup"][end]) for end in ("value", "low", "high"))  # noqa: B023
    speed = f"{value:.2f} [{low:.2f}, {high:.2f}]" + " (too slow)" * _too_slow(rows)
    params = f"{_mean(rows, lambda row: row['params']) / 1e6:.2f}"
    seconds = f"{_mean(rows, lambda row: sum(row['seconds'].values())):.0f}"
    return [f"**{shown}**" if name == OURS else shown, setting, str(len(rows)), speed, *drops, params, seconds]


def _too_slow(rows: Sequence[Row]) -> bool:
    """Too far below the wanted speedup to be compared."""
    return any(row["speedup"]["value"] < SLOWEST * row["wanted"] for row in rows)


def _mean(rows: Sequence[Row], of: Callable[[Row], float]) -> float:
    return mean(float(of(row)) for row in rows)


# ---- both


def _reasons(section: Mapping[str, Any], lost: Sequence[str], name: str) -> list[str]:
    why = section.get("why", {})
    if missing := [one for one in lost if one not in why]:
        raise ValueError(f"{name} loses to {', '.join(missing)}, and peers.json does not say why.")
    lines = [f"- {TOOLS.get(one, one)}: {why[one]}" for one in lost]
    return ["Why cells are lost or short:\n\n" + "\n".join(lines)] if lines else ["No cell is lost."]


def _measured(environment: Mapping[str, Any], packages: Mapping[str, str | None]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(packages.items()) if version)
    extensions = ", ".join(environment["flags"])
    cpus, load = environment["cpus"], environment["load_1min"]
    return f"Measured on an {environment['cpu']} ({extensions}), {cpus} CPU{'s' * (cpus > 1)}, load {load}; {versions}."


def _cell(row: Row) -> Cell:
    return row["threads"], row["batch"], row["sequence"]


def _head(cell: Cell, *, threads: bool) -> str:
    number, batch, length = cell
    shape = f"{batch} x {length}" if length else f"{batch}"
    return f"{number} thread{'s' * (number > 1)}, {shape}" if threads else shape


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where the page has to be made anew"
    )
    options = parser.parse_args()
    text = page()
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"{PAGE} is not what the results give: run python benchmarks/peers/page.py.", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
