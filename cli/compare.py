"""``edgepress compare`` and ``report``."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, UsageError
from ..files import check_writable, write_text
from .measure import measured, sweep_table
from .options import Columns, Data, Json, MetricOption, Seed, TargetsOption, Verbose
from .screen import print_json

if TYPE_CHECKING:
    from ..benchmarks.comparison import Comparison, Group

FORMATS = ("table", "markdown", "html", "csv", "json")
ENDINGS = {".txt": "table", ".md": "markdown", ".html": "html", ".htm": "html", ".csv": "csv", ".json": "json"}


def compare(
    sources: Annotated[
        list[str],
        typer.Argument(help="Run folders, results.sqlite of sweeps; artifact folders and models to measure now."),
    ],
    target: TargetsOption = None,
    form: Annotated[
        str | None, typer.Option("--format", help="table, markdown, html, csv or json; by -o's ending, else table.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File to write instead of stdout.")] = None,
    batch: Annotated[str, typer.Option("--batch", help="Of what is measured: batch sizes, 1,8.")] = "1",
    seq: Annotated[str, typer.Option("--seq", help="Of what is measured: sequence lengths, 32,128.")] = "128",
    data: Data = None,
    columns: Columns = None,
    metric: MetricOption = None,
    queries: Annotated[int | None, typer.Option("--queries", help="Runs of each artifact, 1000.", min=30)] = None,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="Or this long for each, 10, whichever ends first.")
    ] = None,
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Any number of runs, sweeps, and artifacts measured now, side by side; what may not be compared is kept apart."""
    from ..benchmarks import comparison as comparing
    from ..benchmarks.subjects import is_model

    chosen = _form(form, out, json_)
    sweeps = [source for source in sources if source.endswith(".sqlite")]
    runs = [source for source in sources if (Path(source) / "summary.json").is_file()]
    now = [source for source in sources if source not in {*sweeps, *runs}]
    for source in now:
        if not (is_model(source) or (Path(source) / "manifest.json").is_file()):
            what = "a finished run, an artifact, a model or results of a sweep"
            raise InputError(f"{source} is not {what}: it has no summary.json, manifest.json or config.json.")
    if not now and (queries or seconds):
        raise UsageError("--queries and --seconds are of artifacts and models, which are measured now; give one.")
    if not now and (target or data or columns or metric or (batch, seq) != ("1", "128")):
        what = "--target, --batch, --seq, --data, --columns and --metric are of artifacts and models"
        raise UsageError(f"What was measured before is shown as it is; {what}.")
    if len(sources) == len(sweeps) == 1 and chosen in {"table", "json"}:
        _sweep(Path(sources[0]), chosen, out, json_)
        return
    groups: list[Group] = []
    notes: list[str] = []
    for source in sources:
        if source in sweeps:
            cells, failed = _cells(Path(source))
            groups, notes = [*groups, *cells], [*notes, *failed]
        elif source in runs:
            groups.append(_run(Path(source)))
    if now:
        options: dict[str, Any] = {"min_queries": queries or 1000, "min_seconds": 10.0 if seconds is None else seconds}
        taken = measured(now, target or ["cpu"], (batch, seq), (data, columns, metric), seed, **options)
        groups += map(comparing.of_measured, taken)
    if not groups:
        raise InputError(f"There is nothing to compare: {'; '.join(notes) or 'no cell has finished'}.")
    comparison = comparing.together(groups, notes)
    if out or not json_:
        _give(comparison, chosen, out, said=not json_)
    if json_:
        print_json(comparing.document(comparison))


def _form(form: str | None, out: Path | None, as_json: bool) -> str:
    """The one of ``FORMATS`` that is asked for, in the file or on stdout."""
    if form is not None and form not in FORMATS:
        raise UsageError(f"There is no format '{form}' (there are: {', '.join(FORMATS)}).")
    if as_json and out is None and form not in {None, "json"}:
        raise UsageError(f"Give --json or --format {form}, or -o a file for the second.")
    if out is not None and out.is_dir():
        raise UsageError(f"-o {out} is a folder; give a file that ends in {', '.join(ENDINGS)}.")
    if out is not None:
        check_writable(out.parent)
    if form or out is None:
        return form or ("json" if as_json else "table")
    if out.suffix.lower() not in ENDINGS:
        raise UsageError(f"-o {out} does not end in {', '.join(ENDINGS)}; say with --format what it is to be.")
    return ENDINGS[out.suffix.lower()]


def _run(path: Path, title: str = "") -> Group:
    """A finished run, with its samples where they are."""
    from ..benchmarks.comparison import of_run
    from ..benchmarks.report import read_run
    from ..stages import read_summary

    summary = read_summary(path)
    samples = read_run(path)[1] if (path / "measurements.jsonl").is_file() else []
    return of_run(path, summary, samples, title)


def _cells(path: Path) -> tuple[list[Group], list[str]]:
    """The finished cells of a sweep, and what is to be said of the others."""
    from .. import sweep as sweeps
    from ..benchmarks.comparison import of_rows

    groups, notes = [], []
    for cell in sweeps.results(path):
        title = f"{path.resolve().parent.name}: {cell['name']}"
        if cell["original"] is None:
            notes.append(f"{title} {cell['state']}: {cell['said']}")
        elif (Path(cell["run"]) / "summary.json").is_file():
            groups.append(_run(Path(cell["run"]), title))
        else:
            groups.append(of_rows(title, str(path), [cell["original"], *cell["results"]], cell["chosen"]))
    return groups, notes


def _sweep(path: Path, form: str, out: Path | None, as_json: bool) -> None:
    """A sweep alone: a line for each cell."""
    from .. import sweep as sweeps

    document = {"cells": sweeps.results(path)}
    if form == "table":
        _print(partial(sweep_table, document["cells"]), out, said=not as_json)
    elif out or not as_json:
        _write(json.dumps(document, indent=2), out, said=not as_json)
    if as_json:
        print_json(document)


def _give(comparison: Comparison, form: str, out: Path | None, *, said: bool) -> None:
    from ..benchmarks import comparison as comparing
    from ..benchmarks import comparison_page as pages

    if form == "table":
        _print(partial(pages.print_tables, comparison), out, said=said)
        return
    makers: dict[str, Callable[[], str]] = {
        "json": lambda: json.dumps(comparing.document(comparison), indent=2),
        "markdown": lambda: pages.markdown(comparison),
        "html": lambda: pages.html(comparison),
        "csv": lambda: comparing.table(comparison),
    }
    _write(makers[form](), out, said=said)


def _print(show: Callable[[], None], out: Path | None, *, said: bool) -> None:
    """Tables as they are printed, on stdout or in a file."""
    if out is None:
        show()
        return
    text = io.StringIO()
    with redirect_stdout(text):
        show()
    _write(text.getvalue(), out, said=said)


def _write(text: str, out: Path | None, *, said: bool) -> None:
    """To the file that was asked for, whose name is then ``said``, or to stdout."""
    text = text if text.endswith("\n") else f"{text}\n"
    if out is None:
        print(text, end="")
        return
    write_text(out, text)
    if said:
        print(out)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Finished run folders.")],
    changed: Annotated[
        int, typer.Option("--changed", help="Changed predictions to list; all are in examples/changed.csv.", min=0)
    ] = 20,
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Write report.html and report.md of finished runs anew; several side by side: compare -o FILE.html."""
    from ..benchmarks.report import write_report

    pages = [str(write_report(run, changed=changed)) for run in runs]
    if json_:
        print_json({"report": pages[0]} if len(pages) == 1 else {"report": pages[0], "reports": pages})
    else:
        print("\n".join(pages))
