"""``edgepress score``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ..files import check_writable
from .options import Columns, Data, Json, Model, Seed, Trust, Verbose, check_of
from .screen import load, print_json


def score(
    model: Model,
    data: Data = None,
    columns: Columns = None,
    trust_remote_code: Trust = False,
    method: Annotated[
        str,
        typer.Option("--method", help="One, several with commas, or all that are cheap; see 'edgepress methods'."),
    ] = "masked-taylor",
    rows: Annotated[int, typer.Option("--rows", help="Calibration rows.", min=1)] = 256,
    validate: Annotated[
        int | None, typer.Option("--validate", help="Units of each kind to mask in trials of the scores.", min=2)
    ] = None,
    trial_rows: Annotated[
        int | None, typer.Option("--trial-rows", help="Rows of the trials, others than scored: 128.", min=2)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="A .json, .csv or .parquet file, or a folder for a page and those."),
    ] = None,
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """How much each head, feed-forward channel and block matters, and with --validate which score to believe."""
    from ..benchmarks import score_table
    from ..compress import score as scores

    if not validate:
        check_of("--validate", trial_rows=trial_rows)
    methods = _methods(method)
    if out:
        score_table.check_out(out)
        check_writable(out if out.is_dir() or not out.suffix else out.parent)
    with ExitStack() as stack:
        workload, screen = load(stack, model, data, columns, seed, trust_remote_code)
        found = scores.score_all(workload, methods, rows=rows, seed=seed, progress=screen.progress("score"))
        validation, judged = None, 0
        if validate:
            from ..compress.score import validate as trials

            unseen = trials.unseen(workload, scored=rows, count=trial_rows or 128, seed=seed)
            judged, step = len(unseen), screen.progress("validate")
            if set(unseen.keys) & set(workload.data.calibration.take(rows, seed).keys):
                screen.say("note: there are too few other rows, so the trials are on rows that the scores have seen")
            validation = trials.validate(workload, found, units=validate, rows=unseen, seed=seed, progress=step)
    facts = {"name": workload.name, "rows": min(rows, len(workload.data.calibration)), "trial_rows": judged}
    document = facts | scores.to_json(*found, validation=validation)
    written = score_table.write_scores(document, out) if out else None
    if json_:
        print_json(document)
        return
    from ..benchmarks.score_screen import show

    show(document)
    if written:
        print(f"written  {written}")


def _methods(text: str) -> list[str]:
    """``fisher,masked-taylor``, or ``all``, which leaves out what takes many passes over the rows."""
    from ..compress import score as scores

    cheap = {*scores.cheap(), "masked_taylor"}
    every = [name for name in scores.METHODS if name in cheap]
    names = [name.strip() for name in text.split(",")]
    return [one for name in names for one in (every if name == "all" else [scores.canonical(name)])]
