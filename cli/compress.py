"""``edgepress compress``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConstraintError, UsageError
from .options import WHERE, Columns, Data, Json, MetricOption, Trust, Verbose
from .screen import Screen, print_json, table

if TYPE_CHECKING:
    from ..pipeline import Outcome


def compress(
    model: Annotated[
        str | None, typer.Argument(help="zoo:NAME, a model folder, a checkpoint; taken from --recipe.")
    ] = None,
    data: Data = None,
    columns: Columns = None,
    trust_remote_code: Trust = False,
    target: Annotated[str | None, typer.Option("--target", help=WHERE)] = None,
    metric: MetricOption = None,
    max_drop: Annotated[str | None, typer.Option("--max-drop", help="Quality that may be lost: 1%.")] = None,
    max_latency: Annotated[str | None, typer.Option("--max-latency", help="Longest median latency: 5ms.")] = None,
    speedup: Annotated[str | None, typer.Option("--speedup", help="Least speedup against the original: 3x.")] = None,
    max_size: Annotated[str | None, typer.Option("--max-size", help="Largest model file: 10MB.")] = None,
    recipe: Annotated[Path | None, typer.Option("--recipe", help="YAML recipe; the options above go over it.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Run folder.")] = Path("runs/compress"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")] = False,
    json_: Json = False,
    verbose: Verbose = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of everything random.", min=0)] = None,
) -> None:
    """The whole chain: load, score, prune, recover, quantize, export, benchmark, report."""
    from .. import recipe as recipes
    from ..pipeline import compress as run
    from ..stages import resumed_recipe

    if max_latency and speedup:
        raise UsageError("Give --max-latency or --speedup, not both.")
    if resume and recipe:
        raise UsageError("--resume goes on with the recipe of the run; leave --recipe.")
    values = resumed_recipe(out) if resume else recipes.read(recipe) if recipe else {}
    given = {"model": model, "data": data, "metric": metric, "target": target, "seed": seed}
    values |= {name: value for name, value in given.items() if value is not None}
    if columns:
        values["columns"] = recipes.columns(columns)
        if not values.get("data"):
            raise UsageError("--columns is of --data; give both.")
    if trust_remote_code:
        values["trust_remote_code"] = True
    asked = {
        "max_drop": recipes.quantity("drop", max_drop) if max_drop else None,
        "max_latency_ms": recipes.quantity("latency", max_latency) if max_latency else None,
        "min_speedup": recipes.quantity("speedup", speedup) if speedup else None,
        "max_size_bytes": int(recipes.quantity("size", max_size)) if max_size else None,
    }
    limits = {**(values.get("limits") or {}), **{name: value for name, value in asked.items() if value is not None}}
    if "model" not in values:
        raise UsageError("Give a MODEL (zoo:NAME, a model folder or a checkpoint), or a recipe that names one.")
    validated = recipes.from_mapping({**values, "limits": limits}, str(recipe or "The command line"))
    with ExitStack() as stack:
        outcome = run(validated, out, resume=resume, display=Screen(stack))
    _outcome(outcome, json_)


def _outcome(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        print_json(outcome.to_json())
    else:
        table(outcome.original, outcome.results, outcome.chosen)
        print(f"artifact  {outcome.run / 'artifact'}\nreport    {outcome.run / 'report.html'}")
    if outcome.unmet:
        best = outcome.chosen or outcome.original["name"]
        raise ConstraintError(f"The constraint cannot be met. The best found is '{best}': {'; '.join(outcome.unmet)}.")
