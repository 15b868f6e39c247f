"""``edgepress bench`` and ``sweep``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, UsageError
from ..files import check_writable
from . import scenario as scenarios
from .options import Columns, Data, Json, MetricOption, Out, Seed, TargetsOption, Verbose
from .screen import Screen, print_json, table

if TYPE_CHECKING:
    from ..benchmarks.judge import Judge
    from ..benchmarks.measurement import Measurement
    from ..benchmarks.targets import Target
    from ..export.artifact import Artifact
    from ..models.metrics import Quality


def bench(
    subjects: Annotated[
        list[str],
        typer.Argument(help="Artifact folders, and models, which PyTorch runs as they are; all measured interleaved."),
    ],
    target: TargetsOption = None,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes: 1,8.")] = "1",
    seq: Annotated[str, typer.Option("--seq", help="Sequence lengths: 32,128.")] = "128",
    past: Annotated[
        int, typer.Option("--past", help="Tokens before, whose keys and values are given (export --cache).", min=0)
    ] = 0,
    queries: Annotated[int, typer.Option("--queries", help="Runs of each artifact.", min=30)] = 1000,
    seconds: Annotated[float, typer.Option("--seconds", help="Or this long for each, whichever ends first.")] = 10.0,
    scenario: scenarios.Scenario = "single-stream",
    rate: scenarios.Rate = None,
    deadline: scenarios.Deadline = None,
    confidence_width: scenarios.Width = None,
    data: Data = None,
    columns: Columns = None,
    metric: MetricOption = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also which operators the time goes to; -o FOLDER gets a picture.")
    ] = False,
    out: Out = None,
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Measure artifacts and models against each other; the first is the one the others are compared with.

    With --data also what each answers to the rows kept for evaluation, and what is lost beside the first.
    """
    from ..benchmarks import compare as comparing
    from ..benchmarks.imitation import DoesNotFitError
    from . import findings

    if out and not profile:
        raise UsageError("-o is the folder for the picture of a profile: give --profile too.")
    if out:
        check_writable(out)
    options: dict[str, Any] = {"past": past, "min_queries": queries, "min_seconds": seconds}
    options |= scenarios.options(scenario, rate, deadline, confidence_width)
    options |= {"energy": True, "profile": profile}
    environments: dict[str, Any] = {}
    unfit: list[str] = []
    where, source = target or ["cpu"], (data, columns, metric)
    runs = [taken for taken in measured(subjects, where, (batch, seq), source, seed, unfit, **options) if taken]
    tables = [comparing.rows(taken) for taken in runs]
    for taken in runs:
        environments.setdefault(taken[0].target, dict(taken[0].environment))
    if json_ and runs:
        document = {
            "rows": [row for rows in tables for row in rows],
            "environment": next(iter(environments.values())),
            "environments": environments,
            "runs": [findings.run(taken) for taken in runs],
            "warnings": [
                {"target": taken[0].target, "says": said} for taken in runs for said in findings.doubts(taken)
            ],
            "refused": unfit,
        }
        print_json(document)
    for taken, (first, *others) in zip(runs, tables, strict=True) if not json_ else ():
        print(_heading(first))
        table(first, others, None)
        scenarios.show([first, *others], dict(taken[0].environment))
        findings.show(taken, [first, *others])
    if out and runs:
        page = findings.write_profiles(runs, out)
        if page and not json_:
            print(f"profile    {page}")
    if unfit:
        raise DoesNotFitError(" ".join(dict.fromkeys(unfit)))


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
        sweep_table(found)
        print(f"results  {out / sweeps.RESULTS}")
    if failed := [cell for cell in found if cell["state"] == "failed"]:
        raise InputError(f"{len(failed)} of {len(found)} cells failed; {failed[0]['name']}: {failed[0]['said']}")


def _heading(row: dict[str, Any]) -> str:
    tokens = f" x sequence {row['sequence']}" if row["sequence"] else ""
    tokens += f" after {row['past']}" if row["past"] else ""
    return f"{row['target']}, batch {row['batch']}{tokens}"


def measured(
    words: Sequence[str],
    names: Sequence[str],
    sizes: tuple[str, str],
    source: tuple[str | None, str | None, str | None],
    seed: int,
    unfit: list[str] | None = None,
    **options: Any,
) -> list[list[Measurement]]:
    """What ``words`` name, interleaved in each shape on each target; hosts work at the same time.

    ``sizes`` are the options --batch and --seq, ``source`` is data, columns and metric: with data everything is judged
    before it is measured. Where there is a list ``unfit``, it gets a sentence about those that do not fit in an
    imitated device, and the others are measured without them.
    """
    from .. import recipe
    from ..benchmarks import judge as judging
    from ..benchmarks import load, targets
    from ..benchmarks.subjects import is_model, original, shown_as
    from ..export.artifact import open_artifact
    from ..models import workload

    data, columns, metric = source
    mapping = recipe.columns(columns) if columns else None
    if (mapping or metric) and not data:
        raise UsageError(f"{'--columns' if mapping else '--metric'} is of --data; give both.")
    artifacts = {word: open_artifact(Path(word)) for word in words if not is_model(word)}
    batches, sequences = _numbers(sizes[0], "--batch"), _numbers(sizes[1], "--seq")
    shapes = [(batch, sequence) for batch in batches for sequence in sequences]
    parsed = [targets.parse(name) for name in names]
    if len(artifacts) == len(set(words)):  # else once the models are loaded
        for target in parsed:
            load.check([*artifacts.values()], target)

    def loaded(stack: ExitStack, screen: Screen, word: str) -> Artifact:
        step = screen.progress("load")
        model = workload.load(word, data, columns=mapping, seed=seed, progress=step)
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return original(model, place / "checkpoint", word)

    with ExitStack() as stack:
        screen = Screen(stack)
        subjects = [artifacts.get(word) or loaded(stack, screen, word) for word in words]
        for target in parsed:  # all, before anything is measured; and what was sent for one shape is there for the next
            load.check(subjects, target)
            stack.enter_context(targets.connect(target, *(one.manifest.runtime for one in subjects)))
        qualities: dict[str, list[Quality | None]] = {str(target): [None] * len(subjects) for target in parsed}
        if data:
            for one in subjects:  # before what takes long
                for size, length in shapes:
                    load.check_shape(one, size, length, options.get("past", 0))
            by = judging.judge(subjects, data, columns=mapping, metric=metric, seed=seed)
            qualities |= _qualities(subjects, by, parsed, seed, screen)

        def work(target: targets.Target) -> list[list[Measurement]]:
            found = []
            for size, length in shapes:
                taken = load.fitting(
                    subjects,
                    unfit,
                    target=str(target),
                    batch=size,
                    sequence=length,
                    seed=seed,
                    progress=screen.progress(f"{target} {size}x{length}", target.where),
                    **options,
                )
                judged = dict(zip(map(shown_as, subjects), qualities[str(target)], strict=True))
                found.append([replace(one, quality=judged[one.artifact]) for one in taken])
            return found

        found = targets.at_once(parsed, work)
    return [taken for of_one in found for taken in of_one]


def _qualities(
    subjects: Sequence[Artifact], by: Judge, parsed: Sequence[Target], seed: int, screen: Screen
) -> dict[str, list[Quality | None]]:
    """The qualities of ``subjects`` by target; those that answer alike are judged once."""
    from ..benchmarks import judge as judging

    made: dict[tuple[str, str], list[Quality | None]] = {}
    found = {}
    for target in parsed:
        key = "cpu" if target.address else target.device, target.precision
        if key not in made:
            step = screen.progress("evaluate")
            made[key] = [*judging.qualities(subjects, by, target, seed=seed, progress=step)]
        found[str(target)] = made[key]
    return found


def sweep_table(found: Sequence[dict[str, Any]]) -> None:
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
