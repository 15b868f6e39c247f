"""``edgepress bench`` and ``sweep``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, UnavailableError, UsageError
from .options import Data, Json, Seed, TargetsOption, Verbose
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
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Measure artifacts against each other; the first is the one the others are compared with."""
    from ..benchmarks import compare as comparing
    from ..export.artifact import open_artifact

    if data:
        raise UnavailableError("bench --data (quality beside latency) is not available yet in this version.")
    opened = [open_artifact(folder) for folder in artifacts]
    shapes = [(size, length) for size in _numbers(batch, "--batch") for length in _numbers(seq, "--seq")]
    options: dict[str, Any] = {"past": past, "min_queries": queries, "min_seconds": seconds}
    rows: list[dict[str, Any]] = []
    environments: dict[str, Any] = {}
    for taken in _measured(opened, target or ["cpu"], shapes, **options):
        rows += comparing.rows(taken)
        environments[taken[0].target] = dict(taken[0].environment)
    if json_:
        print_json({"rows": rows, "environment": next(iter(environments.values())), "environments": environments})
        return
    per_shape = len(opened)
    for start in range(0, len(rows), per_shape):
        first, *others = rows[start : start + per_shape]
        tokens = f" x sequence {first['sequence']}" if first["sequence"] else ""
        tokens += f" after {first['past']}" if first["past"] else ""
        print(f"{first['target']}, batch {first['batch']}{tokens}")
        table(first, others, None)


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
    artifacts: Sequence[Artifact], names: Sequence[str], shapes: Sequence[tuple[int, int]], **options: Any
) -> list[list[Measurement]]:
    """``artifacts`` interleaved in each shape, batch and sequence, on each target; hosts work at the same time."""
    from ..benchmarks import load, targets

    parsed = [targets.parse(name) for name in names]
    with ExitStack() as stack:
        screen = Screen(stack)
        for target in parsed:  # all, before anything is measured; and what was sent for one shape is there for the next
            stack.enter_context(targets.connect(target, *(artifact.manifest.runtime for artifact in artifacts)))

        def work(target: targets.Target) -> list[list[Measurement]]:
            return [
                load.benchmark(
                    artifacts,
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
