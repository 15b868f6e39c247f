"""Sweep: a grid of recipes, each cell compressed in a process of its own, all results in one SQLite file.

A grid is a recipe and, for some of its fields, the values to try in every combination:

    recipe:
      model: zoo:minilm-reviews
      measure: {min_seconds: 5}
    grid:
      target: [cpu:1, cpu:2]
      limits.min_speedup: [2, 4]

In the folder of a sweep are ``results.sqlite`` and the cells' run folders. A cell is known by its whole recipe: what is
done is not done again, whatever else has changed in the grid, and a cell that was killed goes on behind its last stage.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from . import __version__, recipe
from .errors import InputError, UsageError
from .files import write_text
from .recipe import Recipe
from .stages import at_work, read_summary

RESULTS = "results.sqlite"
FINISHED = ("done", "unmet")
"""States of cells that are not run again: within the constraint, and the best that there is short of it."""

Tell = Callable[[str, str], None]
"""What is told of a cell, by its key, while it runs."""


@dataclass(frozen=True)
class Cell:
    key: str
    """The first digits of the sha256 of all that it depends on."""
    values: Mapping[str, Any]
    """Of the fields that the grid varies."""
    recipe: Recipe

    @property
    def name(self) -> str:
        """What the grid varies, each by its last part: ``speedup=2``, and of a path the file's name."""
        ends = [(field.rpartition(".")[2], str(value).rpartition("/")[2]) for field, value in self.values.items()]
        return " ".join(f"{field}={value}" for field, value in ends) or "recipe"


@dataclass(frozen=True)
class Ending:
    """How a cell ended: ``state`` is done, unmet or failed, and ``said`` what it had to say."""

    state: str
    said: str
    seconds: float
    node: str = ""
    """Where it ran."""


Endings = Generator[tuple[Cell, Ending], None, None]
Finisher = Callable[[Sequence[Cell], Path, Tell], Endings]
"""Runs cells in a folder of runs, and gives each back when it has ended."""


def sweep(cells: Sequence[Cell], out: Path, finisher: Finisher, tell: Tell) -> list[dict[str, Any]]:
    """Run those of ``cells`` that ``out`` does not know as finished; the results of all of them, as :func:`results`
    gives them."""
    with at_work(out), closing(_opened(out / RESULTS, new=True)) as store:
        with _telling(out / RESULTS):
            known = dict(store.execute("SELECT key, state FROM cells"))
        left = [cell for cell in cells if known.get(cell.key) not in FINISHED]
        with closing(finisher(left, out / "runs", tell)) as ended:
            for cell, ending in ended:
                with _telling(out / RESULTS):
                    _record(store, cell, ending, out / "runs" / cell.key)
                tell(cell.key, ending.state)
    keys = [cell.key for cell in cells]
    return sorted((one for one in results(out / RESULTS) if one["key"] in keys), key=lambda one: keys.index(one["key"]))


# ---- the grid


def read(path: Path, seed: int | None = None) -> list[Cell]:
    """The cells of a grid file, with ``seed`` over the recipe's; all that is wrong with any of them is one
    UsageError."""
    values = recipe.read(path)
    if unknown := sorted(map(str, set(values) - {"recipe", "grid"})):
        raise UsageError(f"{path} has '{unknown[0]}'; a grid has 'recipe' and 'grid' alone.")
    base, grid = values.get("recipe") or {}, values.get("grid") or {}
    if not isinstance(base, dict) or not isinstance(grid, dict):
        raise UsageError(f"'recipe' and 'grid' of {path} are to be mappings of fields.")
    base |= {} if seed is None else {"seed": seed}
    for field, choices in grid.items():
        if not isinstance(field, str):
            raise UsageError(f"'{field}' in the grid of {path} is no name of a field, such as limits.max_drop.")
        if not isinstance(choices, list) or not choices:
            raise UsageError(f"'{field}' in the grid of {path} is to be a list of values, such as [1, 2].")
    cells, faults = {}, []
    for chosen in product(*grid.values()):
        varied = dict(zip(grid, chosen, strict=True))
        try:
            cell = _cell(base, varied, f"{path} with {_said(varied)}")
            cells[cell.key] = cell
        except UsageError as error:
            faults.append(str(error))
    if faults:
        raise UsageError(" ".join(dict.fromkeys(faults)))
    return list(cells.values())


def _cell(base: Mapping[str, Any], varied: Mapping[str, Any], origin: str) -> Cell:
    values = dict(base)
    for field, value in varied.items():
        place, (*path, last) = values, field.split(".")
        for part in path:
            held = place.get(part) or {}
            if not isinstance(held, dict):
                raise UsageError(f"'{field}' in {origin} cannot be: '{part}' is {held!r}, which has no fields.")
            place[part] = dict(held)  # what other cells and other fields hold too stays as it is
            place = place[part]
        place[last] = value
    made = recipe.from_mapping(values, origin)
    facts = json.dumps({"edgepress": __version__, **made.model_dump(mode="json")}, sort_keys=True)
    return Cell(hashlib.sha256(facts.encode()).hexdigest()[:12], varied, made)


def _said(varied: Mapping[str, Any]) -> str:
    return ", ".join(f"{field} {value}" for field, value in varied.items()) or "nothing varied"


# ---- running


def local(cells: Sequence[Cell], runs: Path, tell: Tell) -> Endings:
    """On this machine, one after another, so that no cell's work falls into another's measurements."""
    for cell in cells:
        yield cell, run(cell.recipe, runs / cell.key, partial(tell, cell.key))


def run(asked: Recipe, folder: Path, say: Callable[[str], None]) -> Ending:
    """Compress in a process of its own, so that a cell that is killed, or runs out of memory, takes no other along; it
    ends with this one, however this one ends."""
    begin = time.monotonic()
    write_text(folder.with_suffix(".yaml"), yaml.safe_dump(asked.model_dump(mode="json"), sort_keys=False))
    argv = ["compress", "--recipe", str(folder.with_suffix(".yaml")), "-o", str(folder), "--json"]
    process = subprocess.Popen(  # noqa: S603 - this very package, with a recipe that was checked
        [sys.executable, "-m", __package__ or "edgepress", *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "COLUMNS": "1000"},  # a sentence a line
        preexec_fn=_ends_with_us,  # noqa: PLW1509 - it calls what is loaded already
    )
    said = ""
    try:
        for line in process.stderr or ():
            said = line.strip() or said
            say(said)
        code = process.wait()
    finally:
        process.kill()  # the sweep is interrupted: what the cell has finished is in its folder
        process.wait()
    state = {0: "done", 3: "unmet"}.get(code, "failed")
    if code < 0:
        said = f"It was ended by {signal.Signals(-code).name} after '{said}'."
    return Ending(state, said.removeprefix("edgepress: ") if code else "", round(time.monotonic() - begin, 1))


_LIBC = ctypes.CDLL(None)


def _ends_with_us() -> None:
    """In a child before it is another program; loading a library there could wait for a thread that it has not."""
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


# ---- the results

SCHEMA = """
CREATE TABLE IF NOT EXISTS cells (
    key TEXT PRIMARY KEY, name TEXT, state TEXT, said TEXT, seconds REAL, node TEXT, run TEXT, grid TEXT, recipe TEXT);
CREATE TABLE IF NOT EXISTS variants (
    key TEXT, name TEXT, chosen INTEGER, target TEXT, precision TEXT, params INTEGER, macs INTEGER, size_bytes INTEGER,
    latency_p50_ms REAL, speedup REAL, speedup_low REAL, speedup_high REAL, quality REAL, quality_drop REAL,
    row TEXT, PRIMARY KEY (key, name));
"""
"""``grid`` and ``recipe`` are JSON; ``row`` is a variant as the command line's ``--json`` has it, of which the other
columns are what one asks for by SQL. The first variant of a cell is the original, whose speedup is none."""


PATIENCE = 60.0
"""Seconds to wait for another process that reads or writes the file."""


def _opened(path: Path, *, new: bool = False) -> sqlite3.Connection:
    """Raises InputError where ``path`` is not a file of results or, to begin with, cannot be written."""
    if not new and not path.is_file():
        raise InputError(f"There is no file of results {path}.")
    with _telling(path), ExitStack() as opened:
        path.parent.mkdir(parents=True, exist_ok=True)
        store = opened.enter_context(closing(sqlite3.connect(path, timeout=PATIENCE)))
        if new:
            store.executescript(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT;")  # which asks for the right to write
        store.execute("SELECT key, name, state, said, seconds, node, run, grid FROM cells LIMIT 1")
        store.execute("SELECT key, chosen, row FROM variants LIMIT 1")
        opened.pop_all()
    return store


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Errors of the file, which may be locked, read-only or on a full disk, in one sentence."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise InputError(f"{path} cannot be used as results of a sweep: {error}.") from error


def _record(store: sqlite3.Connection, cell: Cell, ending: Ending, folder: Path) -> None:
    """Write how a cell ended, and its variants, in one transaction."""
    summary = read_summary(folder) if ending.state in FINISHED else None
    with store:
        for table in ("cells", "variants"):
            store.execute(f"DELETE FROM {table} WHERE key = ?", (cell.key,))  # noqa: S608 - of the two tables above
        told = (ending.state, ending.said, ending.seconds, ending.node, str(folder))
        what = (json.dumps(dict(cell.values), default=str), cell.recipe.model_dump_json())
        store.execute("INSERT INTO cells VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (cell.key, cell.name, *told, *what))
        for row in [summary["original"], *summary["results"]] if summary else ():
            store.execute(f"INSERT INTO variants VALUES ({', '.join('?' * 15)})", _columns(cell.key, row, summary))  # noqa: S608


def _columns(key: str, row: Mapping[str, Any], summary: Any) -> tuple[Any, ...]:
    faster, quality = row["speedup"] or {}, row["quality"] or {}
    plain = [row[name] for name in ("target", "precision", "params", "macs", "size_bytes")]
    figures = [row["latency_ms"]["p50"], *(faster.get(name) for name in ("value", "low", "high"))]
    chosen = row["name"] == (summary["chosen"] or summary["original"]["name"])
    return (key, row["name"], chosen, *plain, *figures, quality.get("value"), quality.get("drop"), json.dumps(row))


def results(path: Path) -> list[dict[str, Any]]:
    """Every cell of a file of results: what is known of it, its ``values`` of the grid, the rows of its ``original``
    and ``results``, and the name that was ``chosen``. Raises InputError where the file holds something else."""
    found = []
    with closing(_opened(path)) as store:
        store.row_factory = sqlite3.Row
        try:
            for line in store.execute("SELECT key, name, state, said, seconds, node, run, grid FROM cells").fetchall():
                asked = "SELECT chosen, row FROM variants WHERE key = ? ORDER BY rowid"
                rows = [(chosen, json.loads(row)) for chosen, row in store.execute(asked, (line["key"],))]
                chosen = next((row["name"] for chosen, row in rows if chosen), None)
                about = {**dict(line), "values": json.loads(line["grid"])}
                del about["grid"]
                original, *others = [row for _, row in rows] or [None]
                found.append({**about, "original": original, "results": others, "chosen": chosen})
        except (sqlite3.Error, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path} cannot be read as results of a sweep: {error}.") from error
    return found
