"""``edgepress bench``, ``compare`` and ``sweep``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, UnavailableError, UsageError
from .options import Data, Json, Out, Seed, TargetsOption, Verbose
from .screen import Screen, print_json, table

if TYPE_CHECKING:
    from ..benchmarks.measurement import Measurement
    from ..export.artifact import Artifact


def bench(
    artifacts: Annotated[list[Path], typer.Argument(help="Artifact folders; all are measured interleaved.")],
    target: TargetsOption = None,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes: 1,8.")] = "1",
    seq: Annotated[str, typer.Option("--seq", help="Sequence lengths: 32,128.")] = "128",
    past: Annotated[
        int, typer.Option("--past", help="Tokens before, whose keys and values are given (export --cache).", min=0)
    ] = 0,
    queries: Annotated[int, typer.Option("--queries", help="Runs of each artifact.", min=30)] = 1000,
    seconds: Annotated[float, typer.Option("--seconds", help="Or this long for each, whichever ends first.")] = 10.0,
    data: Data = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also which operators the time goes to; -o FOLDER gets a picture.")
    ] = False,
    out: Out = None,
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Measure artifacts against each other; the first is the one the others are compared with."""
    from ..benchmarks import compare as comparing
    from ..benchmarks.imitation import DoesNotFitError
    from ..export.artifact import open_artifact
    from . import findings

    if out and not profile:
        raise UsageError("-o is the folder for the picture of a profile: give --profile too.")
    if data:
        raise UnavailableError("bench --data (quality beside latency) is not available yet in this version.")
    opened = [open_artifact(folder) for folder in artifacts]
    shapes = [(size, length) for size in _numbers(batch, "--batch") for length in _numbers(seq, "--seq")]
    options: dict[str, Any] = {"past": past, "min_queries": queries, "min_seconds": seconds}
    options |= {"energy": True, "profile": profile}
    environments: dict[str, Any] = {}
    unfit: list[str] = []
    measured = [taken for taken in _measured(opened, target or ["cpu"], shapes, unfit, **options) if taken]
    tables = [comparing.rows(taken) for taken in measured]
    for taken in measured:
        environments[taken[0].target] = dict(taken[0].environment)
    if json_ and measured:
        document = {
            "rows": [row for rows in tables for row in rows],
            "environment": next(iter(environments.values())),
            "environments": environments,
            "warnings": [
                {"target": taken[0].target, "says": said} for taken in measured for said in findings.doubts(taken)
            ],
            "refused": unfit,
        }
        print_json(document)
    for taken, (first, *others) in zip(measured, tables, strict=True) if not json_ else ():
        tokens = f" x sequence {first['sequence']}" if first["sequence"] else ""
        tokens += f" after {first['past']}" if first["past"] else ""
        print(f"{first['target']}, batch {first['batch']}{tokens}")
        table(first, others, None)
        findings.show(taken, [first, *others])
    if out and measured:
        page = findings.write_profiles(measured, out)
        if not json_:
            print(f"profile    {page}")
    if unfit:
        raise DoesNotFitError(" ".join(dict.fromkeys(unfit)))


def compare(
    runs: Annotated[list[Path], typer.Argument(help="A run folder, results.sqlite, or artifact folders to measure.")],
    target: TargetsOption = None,
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """The table of a run against its original, of a sweep, or of artifacts measured now against the first."""
    from ..stages import read_summary

    if len(runs) == 1 and runs[0].suffix == ".sqlite":
        from .. import sweep as sweeps

        found = sweeps.results(runs[0])
        if json_:
            print_json({"cells": found})
        else:
            _sweep_table(found)
        return
    if len(runs) == 1:
        summary = read_summary(runs[0])
        document = {name: summary[name] for name in ("original", "results", "chosen", "refused")}
        tables = [[document["original"], *document["results"]]]
    else:
        from ..benchmarks import compare as comparing
        from ..export.artifact import open_artifact

        opened = [open_artifact(folder) for folder in runs]
        tables = [comparing.rows(taken) for taken in _measured(opened, target or ["cpu"], [(1, 128)])]
        original, *results = [row for table in tables for row in table]
        document = {"original": original, "results": results, "chosen": None, "refused": []}
    if json_:
        print_json(document)
        return
    for first, *others in tables:
        if len(tables) > 1:
            print(first["target"])
        table(first, others, document["chosen"])


def sweep(
    grid: Annotated[Path, typer.Argument(help="YAML: a recipe, and values to try for some of its fields.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the sweep.")] = Path("runs/sweep"),
    ray: Annotated[
        str | None, typer.Option("--ray", help="A Ray cluster's address, or auto, with one cell a machine at a time.")
    ] = None,
    json_: Json = False,
    verbose: Verbose = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Over the recipe's seed.", min=0)] = None,
) -> None:
    """Compress by every recipe of a grid; what is finished in the folder is not done again."""
    from .. import sweep as sweeps
    from ..benchmarks.board import board
    from ..cluster import on_ray

    cells = sweeps.read(grid, seed)
    finisher = partial(on_ray, address=ray) if ray else sweeps.local
    with board({cell.key: cell.name for cell in cells}) as tell:
        found = sweeps.sweep(cells, out, finisher, tell)
    if json_:
        print_json({"cells": found})
    else:
        _sweep_table(found)
        print(f"results  {out / sweeps.RESULTS}")
    if failed := [cell for cell in found if cell["state"] == "failed"]:
        raise InputError(f"{len(failed)} of {len(found)} cells failed; {failed[0]['name']}: {failed[0]['said']}")


def _measured(
    artifacts: Sequence[Artifact],
    names: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    unfit: list[str] | None = None,
    **options: Any,
) -> list[list[Measurement]]:
    """``artifacts`` interleaved in each shape, batch and sequence, on each target; hosts work at the same time.

    Where there is a list ``unfit``, it gets a sentence about those that do not fit in an imitated device, and the
    others are measured without them.
    """
    from ..benchmarks import load, targets

    parsed = [targets.parse(name) for name in names]
    with ExitStack() as stack:
        screen = Screen(stack)
        for target in parsed:  # all, before anything is measured; and what was sent for one shape is there for the next
            stack.enter_context(targets.connect(target, *(artifact.manifest.runtime for artifact in artifacts)))

        def work(target: targets.Target) -> list[list[Measurement]]:
            return [
                load.fitting(
                    artifacts,
                    unfit,
                    target=str(target),
                    batch=size,
                    sequence=length,
                    progress=screen.progress(f"{target} {size}x{length}", target.where),
                    **options,
                )
                for size, length in shapes
            ]

        found = targets.at_once(parsed, work)
    return [taken for of_one in found for taken in of_one]


def _sweep_table(found: Sequence[dict[str, Any]]) -> None:
    """A line for each cell: what was chosen, beside its original."""
    from ..benchmarks.tables import COLUMNS, plain_table
    from ..benchmarks.tables import cells as texts

    shown = [COLUMNS.index(name) for name in ("variant", "speedup", "quality", "drop", "p50 ms", "MB")]
    lines = []
    for cell in found:
        rows = [row for row in (cell["original"], *cell["results"]) if row and row["name"] == cell["chosen"]]
        figures = texts(rows[0], cell["original"]) if rows else []
        lines.append([cell["name"], cell["state"], *([figures[at] for at in shown] if figures else [cell["said"]])])
    width = max(map(len, lines), default=0)
    header = ["cell", "state", *(COLUMNS[at] for at in shown)]
    plain_table(header[:width], [line + [""] * (width - len(line)) for line in lines])


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UsageError(f"{option} '{text}' is not a list of positive numbers like 1,8.")
    return numbers
