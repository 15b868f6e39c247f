"""The command line: parse and print. Everything that computes is imported inside the command that needs it."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import ConstraintError, EdgepressError, InputError, UnavailableError, UsageError

if TYPE_CHECKING:
    from .benchmarks.measurement import Measurement
    from .benchmarks.speed import Fitted
    from .compress.score import Scores
    from .export.artifact import Artifact
    from .export.parity import Feeds
    from .models.metrics import Quality
    from .models.workload import Progress, Workload
    from .pipeline import Outcome

app = typer.Typer(
    name="edgepress",
    help="Take a trained transformer to an edge device: score, prune, recover, quantize, export, benchmark.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Argument(help="zoo:NAME, a Hugging Face folder or hub id, a checkpoint, package.module:function.")
]
Data = Annotated[
    str | None,
    typer.Option("--data", help="Rows: a CSV, TSV, JSONL, Parquet or .npz file, a folder, package.module:function."),
]
Columns = Annotated[
    str | None,
    typer.Option("--columns", help="Column names: text=review,label=stars; label=- for rows without labels."),
]
MetricOption = Annotated[
    str | None, typer.Option("--metric", help="What quality is: accuracy, f1, …, or package.module:function.")
]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Folder to write.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout and nothing else there.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show the traceback of an error.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.", min=0)]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that the model's folder brings; refused otherwise.")
]
WHERE = "cpu, cpu:N for N threads, cpu:openvino:N, or ssh://user@host/cpu:N for a device."
TargetsOption = Annotated[list[str] | None, typer.Option("--target", help=f"{WHERE} More than once for several.")]


class Screen:
    """Progress on stderr: one line for the stage at work, with its step, rate and time left."""

    def __init__(self, stack: ExitStack) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Left

        self.console = Console(stderr=True, quiet=not _first())
        spinner, stage = SpinnerColumn(), TextColumn("[bold]{task.description:<12}")
        figures = TextColumn("{task.fields[note]}")
        columns = (
            spinner,
            stage,
            BarColumn(24),
            TaskProgressColumn(show_speed=True),
            figures,
            TimeElapsedColumn(),
            Left(),
        )
        self._bars = stack.enter_context(Progress(*columns, console=self.console, transient=True))
        self._shown: dict[str, tuple[str, Any]] = {}

    def progress(self, stage: str, lane: str = "") -> Progress:
        """What shows the steps of ``stage``, in the place of the stage before it in the same ``lane``."""

        def step(done: int, total: int, note: str) -> None:
            shown, task = self._shown.get(lane, ("", None))
            if stage != shown:
                if task is not None:
                    self._bars.remove_task(task)
                task = self._bars.add_task(stage, total=None, note="")
                self._shown[lane] = stage, task
                if not self.console.is_terminal:
                    self.say(f"{stage} …")
            figures = f"{done:,}/{total:,} {note}" if total else note
            self._bars.update(task, completed=done, total=total or None, note=figures)

        return step

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)


def main() -> None:
    """Run the command line; ends the process with the exit codes of errors.py."""
    verbose = "-v" in sys.argv or "--verbose" in sys.argv
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and sys.argv[1:2] != ["prune"]:
            raise UsageError("Only 'edgepress prune --recover distill' shares its work out among processes.")
        app()
    except EdgepressError as error:
        if verbose:
            traceback.print_exc()
        if _first():  # all processes come to the same error
            print(f"edgepress: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("edgepress: interrupted; finished stages are kept, and --resume goes on from there.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"edgepress: this is a defect of edgepress, please report it with -v ({what})", file=sys.stderr)
        sys.exit(1)


def _first() -> bool:
    """Whether this is the process that writes and prints, of those that torchrun or accelerate launch started."""
    return os.environ.get("RANK", "0") == "0"


def _print(document: Any) -> None:
    print(json.dumps(document, indent=2))


def _load(
    stack: ExitStack,
    model: str,
    data: str | None,
    columns: str | None,
    seed: int,
    trusted: bool,
    metric: str | None = None,
) -> tuple[Workload, Screen]:
    from . import recipe
    from .models import workload

    screen = Screen(stack)
    mapping = recipe.columns(columns) if columns else None
    loaded = workload.load(
        model, data, columns=mapping, seed=seed, trust_remote_code=trusted, progress=screen.progress("load")
    )
    return loaded.judged_by(metric), screen


def _table(original: dict[str, Any], results: list[dict[str, Any]], chosen: str | None) -> None:
    from .benchmarks.tables import rich_table, terminal

    terminal().print(rich_table(original, results, chosen))


@app.command()
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
    from . import recipe as recipes
    from .pipeline import compress as run
    from .stages import resumed_recipe

    if max_latency and speedup:
        raise UsageError("Give --max-latency or --speedup, not both.")
    values = resumed_recipe(out) if resume else recipes.read(recipe) if recipe else {}
    given = {"model": model, "data": data, "metric": metric, "target": target, "seed": seed}
    values |= {name: value for name, value in given.items() if value is not None}
    if columns:
        values["columns"] = recipes.columns(columns)
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
        _print(outcome.to_json())
    else:
        _table(outcome.original, outcome.results, outcome.chosen)
        print(f"artifact  {outcome.run / 'artifact'}\nreport    {outcome.run / 'report.html'}")
    if outcome.unmet:
        best = outcome.chosen or outcome.original["name"]
        raise ConstraintError(f"The constraint cannot be met. The best found is '{best}': {'; '.join(outcome.unmet)}.")


@app.command()
def inspect(
    model: Model,
    data: Data = None,
    columns: Columns = None,
    trust_remote_code: Trust = False,
    rows: Annotated[int, typer.Option("--rows", help="Calibration rows for the statistics; 0 for none.", min=0)] = 128,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for inspect.html and inspect.json.")] = None,
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Structure and costs, layer by layer; with rows also gradient flow, representation and attention."""
    from .models.inspect import inspect as look

    with ExitStack() as stack:
        workload, screen = _load(stack, model, data, columns, seed, trust_remote_code)
        found = look(workload, rows=rows, seed=seed, progress=screen.progress("statistics"))
    if out:
        from .benchmarks.inspection import write_inspection

        write_inspection(found, out)
    if json_:
        _print(found)
        return
    from .benchmarks.tables import plain_table
    from .benchmarks.tables import statistics as table_of

    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in found["example"].items())
    print(f"{found['name']}: {found['family']}, {found['params']:,} parameters, {found['macs']:,} MACs for {shapes}")
    titles = {
        "layer": "layer",
        "stack": "stack",
        "heads": "heads",
        "kv_heads": "kv heads",
        "cross_heads": "cross heads",
        "head_dim": "head_dim",
        "ffn": "feed-forward",
        "hidden_size": "hidden",
        "params": "params",
        "macs": "MACs",
    }
    listed = found["blocks"]
    if not listed:  # a network without blocks: its groups of coupled layers
        titles = {"layer": "layer", "kind": "kind", "count": "units", "params_per_unit": "params a unit"}
        titles |= {"macs_per_unit": "MACs a unit", "reads": "read by"}
        listed = found["layers"]
    shown = {name: title for name, title in titles.items() if name == "layer" or any(row[name] for row in listed)}
    lines = [[f"{row[name]:,}" if isinstance(row[name], int) else row[name] or "" for name in shown] for row in listed]
    if lines:
        plain_table(list(shown.values()), lines)
    known = found["statistics"]
    if known:
        print(f"statistics of {known['rows']:,} calibration rows, mean loss {known['loss']:.4g}")
        plain_table(*table_of(known))
    elif rows:
        print("note: gradient flow, representation and attention need rows: give --data")
    for note in (*found["notes"], *(known["notes"] if known else ())):
        print(f"note: {note}")
    if out:
        print(f"page  {out / 'inspect.html'}")


@app.command()
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
        int, typer.Option("--trial-rows", help="Rows of the trials, others than scored.", min=2)
    ] = 128,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="A .json, .csv or .parquet file, or a folder for a page and those."),
    ] = None,
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """How much each head, feed-forward channel and block matters, and with --validate which score to believe."""
    from .benchmarks import score_table
    from .compress import score as scores

    methods = _methods(method)
    if out:
        score_table.check_out(out)
    with ExitStack() as stack:
        workload, screen = _load(stack, model, data, columns, seed, trust_remote_code)
        found = scores.score_all(workload, methods, rows=rows, seed=seed, progress=screen.progress("score"))
        validation, judged = None, 0
        if validate:
            from .compress.score import validate as trials

            unseen = trials.unseen(workload, scored=rows, count=trial_rows, seed=seed)
            judged, step = len(unseen), screen.progress("validate")
            if set(unseen.keys) & set(workload.data.calibration.take(rows, seed).keys):
                screen.say("note: there are too few other rows, so the trials are on rows that the scores have seen")
            validation = trials.validate(workload, found, units=validate, rows=unseen, seed=seed, progress=step)
    facts = {"name": workload.name, "rows": min(rows, len(workload.data.calibration)), "trial_rows": judged}
    document = facts | scores.to_json(*found, validation=validation)
    written = score_table.write_scores(document, out) if out else None
    if json_:
        _print(document)
        return
    from .benchmarks.score_screen import show

    show(document)
    if written:
        print(f"written  {written}")


def _methods(text: str) -> list[str]:
    """``fisher,masked-taylor``, or ``all``, which leaves out what takes many passes over the rows."""
    from .compress import score as scores

    cheap = {*scores.cheap(), "masked_taylor"}
    every = [name for name in scores.METHODS if name in cheap]
    names = [name.strip() for name in text.split(",")]
    return [one for name in names for one in (every if name == "all" else [scores.canonical(name)])]


@app.command()
def prune(
    model: Model,
    data: Data = None,
    columns: Columns = None,
    trust_remote_code: Trust = False,
    method: Annotated[str, typer.Option("--method", help="Score; see 'edgepress methods'.")] = "masked-taylor",
    ratio: Annotated[
        str | None,
        typer.Option("--ratio", help="Share of heads and channels that goes, 0.5 if not said: or ffn=0.5,block=0.25."),
    ] = None,
    speedup: Annotated[
        str | None, typer.Option("--speedup", help="Instead of a ratio: so much faster on --target, measured: 2x.")
    ] = None,
    target: Annotated[str | None, typer.Option("--target", help=f"Of --speedup: {WHERE}")] = None,
    batch: Annotated[int, typer.Option("--batch", help="Of --speedup: rows at a time.", min=1)] = 1,
    seq: Annotated[
        int | None, typer.Option("--seq", help="Of --speedup: tokens; 128 where the model takes as many.", min=1)
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", help="Of --speedup: what is deployed, fp32 or int8-dynamic.")
    ] = "fp32",
    low_rank: Annotated[
        float | None, typer.Option("--low-rank", help="Factor linear layers, down to this share of their weights: 0.7.")
    ] = None,
    merge_tokens: Annotated[
        int | None, typer.Option("--merge-tokens", help="Tokens that each block of an image encoder merges.", min=1)
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option("--sparsity", help="Zeros that keep all shapes: 2:4, or a share like 0.5.")
    ] = None,
    metric: MetricOption = None,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="The same widths in every layer: a folder that AutoModel loads.")
    ] = False,
    recover: Annotated[str, typer.Option("--recover", help="none, reconstruct or distill.")] = "reconstruct",
    steps: Annotated[int, typer.Option("--steps", help="Steps of distillation.", min=1)] = 160,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of distillation.", min=1e-9)] = 5e-4,
    out: Annotated[Path, typer.Option("-o", "--out", help="Checkpoint folder to write.")] = Path("pruned"),
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Remove the least important units for good, by a ratio or down to a measured speed, and write a checkpoint.

    With --low-rank, --merge-tokens or --sparsity units go only where --ratio or --speedup asks for it too.
    """
    from dataclasses import asdict

    from .compress import score as scores

    if speedup and (ratio or uniform):
        raise UsageError(f"Give --speedup or {'--ratio' if ratio else '--uniform'}, not both.")
    if target and not speedup:
        raise UsageError("--target says where --speedup is measured; give both.")
    wanted = _wanted(speedup, target or "cpu", precision) if speedup else None
    if recover not in {"none", "reconstruct", "distill"}:
        raise UsageError(f"There is no recovery '{recover}' (there is: none, reconstruct, distill).")
    scores.get(method)
    shares = _shares(ratio or "0.5")
    units = bool(ratio or speedup) or not (low_rank or merge_tokens or sparsity)
    _check_shapes(low_rank, merge_tokens, sparsity, uniform=uniform, trained=recover == "distill", units=units)
    fitted: Fitted | None = None
    with ExitStack() as stack:
        from .benchmarks.targets import connect, parse
        from .models import metrics

        if wanted is not None:
            where = parse(target or "cpu")
            stack.enter_context(connect(where, where.runtime))

        workload, screen = _load(stack, model, data, columns, seed, trust_remote_code, metric)
        judged = workload.data.evaluation if len(workload.data.evaluation) and _first() else None
        judge, name = screen.progress("evaluate"), workload.data.metric
        before = metrics.answers(workload, judged, metric=name, progress=judge) if judged else None
        params, macs = workload.params, workload.macs
        alone = recover == "none" or not (units or low_rank)  # nothing needs the original's module any more
        pruned = workload
        if units:
            found = scores.score(workload, method, seed=seed, progress=screen.progress("score"))
            if wanted is not None:
                fitted = _fit(workload, found, screen, (target or "cpu", batch, seq, precision), wanted, seed)
            pruned = _without_units(workload, found, fitted, shares, uniform=uniform, in_place=alone)
        pruned = _factored(pruned, low_rank, screen, seed)
        if not alone:
            options = {"steps": steps, "lr": lr, "checkpoint": _unfinished(out)} if recover == "distill" else None
            pruned = _recovered(workload, pruned, screen, seed, options)
        pruned = _same_shapes(pruned, merge_tokens, sparsity, screen, seed)
        _keep(pruned, out, plain=uniform)
        quality = None
        if judged:
            after = metrics.answers(pruned, judged, metric=name, progress=judge)
            quality = asdict(metrics.quality(name, after, metrics.wanted(judged, name), original=before, seed=seed))
    document = {
        "checkpoint": str(out),
        "plan": pruned.plan.to_json(),
        "params_before": params,
        "params_after": pruned.params,
        "macs_before": macs,
        "macs_after": pruned.macs,
        "quality": quality,
        **({"speed": fitted.to_json()} if fitted else {}),
        **_shapes(pruned, sparsity),
    }
    (_print if json_ else _pruned)(document)
    if fitted:
        fitted.check()


def _wanted(speedup: str, target: str, precision: str) -> float:
    """The speed asked for, of a target and in a precision that there are."""
    from . import recipe
    from .benchmarks.targets import parse
    from .compress import quantize as quantizers
    from .export import backends

    if "RANK" in os.environ:
        raise UsageError("--speedup is measured, so one process alone can prune to it; give several a --ratio.")
    if precision != "fp32":
        quantizers.get(precision)
    backends.writing(precision, parse(target).runtime)
    wanted = recipe.quantity("speedup", speedup)
    if wanted <= 1:
        raise UsageError(f"A speedup of {wanted:g}x asks for nothing; it must be above 1.")
    return wanted


def _fit(
    workload: Workload, found: Scores, screen: Screen, where: tuple[str, int, int | None, str], wanted: float, seed: int
) -> Fitted:
    """The plan that makes ``workload`` ``wanted`` times faster; ``where`` is target, batch, sequence and precision."""
    from .benchmarks import latency, speed
    from .compress.prune.predicted import predict

    target, batch, seq, precision = where
    table = latency.measure(
        workload,
        target=target,
        batch=batch,
        sequence=seq or min(128, workload.max_length or 128),
        precision=precision,
        progress=screen.progress("latency"),
    )
    told = predict(workload, found.values, seed=seed, progress=screen.progress("losses"))
    return speed.fit(workload, table, told, speedup=wanted, say=screen.say, progress=screen.progress("allocate"))


def _without_units(
    workload: Workload,
    found: Scores,
    fitted: Fitted | None,
    shares: float | dict[str, float],
    *,
    uniform: bool,
    in_place: bool,
) -> Workload:
    """``workload`` cut down to the plan that fits a speed, or by the shares."""
    from .compress.prune import prune as by_shares
    from .models import surgery
    from .models.plain import plain_skeleton

    if fitted:
        return surgery.prune(workload, fitted.plan, in_place=in_place)
    pruned = by_shares(workload, found, ratio=shares, uniform=uniform, in_place=in_place)
    if uniform:
        plain_skeleton(pruned)  # refused before anything is trained
    return pruned


def _check_shapes(
    low_rank: float | None, tokens: int | None, sparsity: str | None, *, uniform: bool, trained: bool, units: bool
) -> None:
    """Refuse what makes no sense before anything is loaded."""
    from .compress.prune.sparsity import Pattern

    if low_rank is not None and not 0 < low_rank < 1:
        raise UsageError(f"--low-rank {low_rank:g} is not a share of the weights; it must be above 0 and below 1.")
    if sparsity:
        Pattern.parse(sparsity)
    if uniform and (low_rank or tokens):
        raise UsageError(f"No configuration can say {'--low-rank' if low_rank else '--merge-tokens'}: leave --uniform.")
    if trained and not (units or low_rank):
        raise UsageError("--recover distill trains what --ratio, --speedup or --low-rank leave; give one of them.")


def _factored(pruned: Workload, share: float | None, screen: Screen, seed: int) -> Workload:
    """``pruned`` with linear layers factored, so that they keep ``share`` of their weights; as it is without one."""
    from .compress.prune.low_rank import allocate, errors, factorise

    if share is None:
        return pruned
    curves = errors(pruned, seed=seed, progress=screen.progress("low rank"))
    return factorise(pruned, allocate(curves, share), seed=seed, progress=screen.progress("low rank"))


def _same_shapes(pruned: Workload, tokens: int | None, sparsity: str | None, screen: Screen, seed: int) -> Workload:
    """What comes last: training would fill the zeros again."""
    from .compress.prune.sparsity import sparsify
    from .compress.prune.token_merging import merge_tokens

    if tokens:
        pruned = merge_tokens(pruned, tokens)
    return sparsify(pruned, sparsity, seed=seed, progress=screen.progress("sparsity")) if sparsity else pruned


def _shapes(pruned: Workload, sparsity: str | None) -> dict[str, Any]:
    """What was done beyond units: ranks by layer, tokens merged by block, the share of zeros by layer."""
    from .compress.prune.sparsity import zeros
    from .models import low_rank, token_merging

    found = {"ranks": low_rank.ranks(pruned.module), "merged_tokens": token_merging.merged(pruned.module)}
    return {name: value for name, value in found.items() if value} | ({"zeros": zeros(pruned)} if sparsity else {})


def _recovered(
    workload: Workload, pruned: Workload, screen: Screen, seed: int, options: dict[str, Any] | None
) -> Workload:
    """``pruned`` reconstructed, and distilled where there are ``options`` for that."""
    from .compress.prune.reconstruct import reconstruct
    from .compress.recover import recover as distill

    pruned = reconstruct(workload, pruned, seed=seed, progress=screen.progress("reconstruct"))
    if options is None:
        return pruned
    return distill(pruned, workload, **options, seed=seed, progress=screen.progress("distill")).workload


def _unfinished(out: Path) -> Path:
    """Where the state of a distillation is until its checkpoint is written."""
    return out.with_name(f"{out.name}.unfinished.safetensors")


def _keep(pruned: Workload, out: Path, *, plain: bool) -> None:
    """Write the checkpoint, in the first of several processes; the others end here."""
    from .models import checkpoint

    if not _first():
        raise typer.Exit
    checkpoint.save(pruned, out, plain=plain)
    _unfinished(out).unlink(missing_ok=True)


def _pruned(document: dict[str, Any]) -> None:
    """What a pruning came to, for people."""
    quality, speed = document["quality"], document.get("speed")
    for title, name in (("parameters", "params"), ("MACs      ", "macs")):
        print(f"{title} {document[f'{name}_before']:,} → {document[f'{name}_after']:,}")
    if speed:
        ratio = speed["speedup"]
        print(
            f"latency    {speed['original_ms']:.2f} → {speed['measured_ms']:.2f} ms "
            f"({speed['target']}, {speed['precision']}, batch {speed['batch']})\n"
            f"speedup    {ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}] measured, "
            f"{speed['predicted_speedup']:.2f}x predicted"
        )
    if document.get("ranks"):
        print(f"factored   {len(document['ranks'])} layers, at ranks {_span(document['ranks'].values())}")
    if document.get("merged_tokens"):
        print(f"merged     {_span(document['merged_tokens'])} tokens a block")
    if document.get("zeros"):
        shares = document["zeros"].values()
        print(f"zeros      {sum(shares) / len(shares):.1%} of a layer, on average")
    if quality:
        print(f"{quality['metric']}   {quality['value']:.2f} (drop {quality['drop']:.2f})")
    print(f"checkpoint {document['checkpoint']}")


def _span(numbers: Collection[int]) -> str:
    return f"{min(numbers)} to {max(numbers)}" if min(numbers) < max(numbers) else f"{min(numbers)}"


@app.command()
def sensitivity(
    model: Model,
    data: Data = None,
    columns: Columns = None,
    trust_remote_code: Trust = False,
    scheme: Annotated[str, typer.Option("--scheme", help="int8 or int8-dynamic.")] = "int8",
    rows: Annotated[int, typer.Option("--rows", help="Calibration rows to try them on.", min=1)] = 32,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="An .svg file for a chart.")] = None,
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """What quantizing each operator costs: it alone, and all but it. 'quantize --max-drop' keeps the worst in float."""
    from .compress.quantize import sensitivity as trials

    if out and (out.suffix != ".svg" or out.is_dir()):
        raise UsageError(f"{out} is not a file that ends in .svg; the chart is one.")
    with ExitStack() as stack:
        workload, screen = _load(stack, model, data, columns, seed, trust_remote_code)
        if not len(workload.data.calibration):
            raise UsageError(f"Without rows nothing can be tried on {workload.name}: give them with --data.")
        plan = trials.uncorrected(workload, scheme, seed=seed, progress=screen.progress("quantize"))
        found = trials.measure(workload, plan, rows=rows, seed=seed, progress=screen.progress("sensitivity"))
    order = found.order()
    alone, without = [found.alone[name] for name in order], [found.without[name] for name in order]
    if out:
        from .benchmarks import charts
        from .files import write_text

        write_text(out, charts.standalone(charts.sensitivity(order, alone, without, found.whole)))
    operators = [
        {"name": name, "alone": one, "all_but_it": others}
        for name, one, others in zip(order, alone, without, strict=True)
    ]
    if json_:
        _print(
            {
                "scheme": scheme,
                "rows": min(rows, len(workload.data.calibration)),
                "whole": found.whole,
                "operators": operators,
            }
        )
        return
    from .benchmarks.tables import plain_table

    lines = [[entry["name"], *(f"{entry[kind]:.3g}" for kind in ("alone", "all_but_it"))] for entry in operators]
    plain_table(["operator", "it alone", "all but it"], lines)
    print(f"all quantized: {found.whole:.3g} from the answers in float (nats, or a share of their mean square)")
    if out:
        print(f"chart  {out}")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="As for compress, or an .onnx file from anywhere.")],
    data: Data = None,
    columns: Columns = None,
    trust_remote_code: Trust = False,
    scheme: Annotated[
        str, typer.Option("--scheme", help="int8, int8-dynamic, int8-weight, int4, fp16 or bf16.")
    ] = "int8-dynamic",
    max_drop: Annotated[
        str | None, typer.Option("--max-drop", help="Quality that may be lost, 1%: the worst operators stay in float.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="Of --max-drop: cpu:N, or ssh://user@host/cpu:N.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Of --max-drop: rows at a time.", min=1)] = 1,
    seq: Annotated[
        int | None, typer.Option("--seq", help="Of --max-drop: tokens; 128 where the model takes as many.", min=1)
    ] = None,
    metric: MetricOption = None,
    steps: Annotated[
        int, typer.Option("--steps", help="Steps of distillation with rounding in the loop, of int8 schemes.", min=0)
    ] = 0,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Mix channels first, by Hadamard matrices that the weights hold.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Artifact folder to write; of an .onnx file another one.")
    ] = None,
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Write an ONNX artifact with weights in fewer bits, or of an .onnx file from anywhere another one."""
    if model.endswith(".onnx"):
        if max_drop or target or metric or columns or steps or rotate:
            raise UsageError("An .onnx file takes --data with an .npz file of its inputs, --scheme and -o alone.")
        _write_file(Path(model), data, scheme, out or Path(f"{Path(model).stem}-{scheme}.onnx"), as_json=json_)
        return
    out = out or Path("quantized")
    if steps and (max_drop is not None or scheme not in {"int8", "int8-dynamic"}):
        raise UsageError("--steps trains for int8 or int8-dynamic, all of it in 8 bits: leave --max-drop.")
    if max_drop is not None:
        _write_mixed(
            (model, data, columns, metric),
            scheme,
            out,
            max_drop,
            (target or "cpu", batch, seq),
            rotate=rotate,
            as_json=json_,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        return
    if target or metric:
        option = "--target says where the speed of" if target else "--metric says what is lost under"
        raise UsageError(f"{option} --max-drop is measured; give both.")
    _write_artifact(
        model,
        data,
        columns,
        "onnx",
        scheme,
        out,
        steps=steps,
        rotate=rotate,
        as_json=json_,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )


def _write_file(source: Path, data: str | None, scheme: str, out: Path, *, as_json: bool) -> None:
    """Quantize an ONNX file from anywhere."""
    from dataclasses import asdict

    from . import foreign

    with ExitStack() as stack:
        step = Screen(stack).progress("quantize")
        found = foreign.quantize(source, out, scheme, data=Path(data) if data else None, progress=step)
    if as_json:
        parity = {"outputs": {name: asdict(one) for name, one in found.parity.items()}, "rows": found.rows}
        parity |= {
            "max_abs": max((one.max_abs for one in found.parity.values()), default=0.0),
            "cosine": min((one.cosine for one in found.parity.values()), default=1.0),
            "shapes": [list(shape) for shape in found.shapes],
        }
        document = {"artifact": str(out), "precision": scheme, "parity": parity, "quality": None}
        _print({**document, "size_bytes": found.size_bytes, "quantized": found.quantized, "in_float": found.in_float})
        return
    share = found.size_bytes / found.float_bytes
    print(f"file       {out} ({found.size_bytes / 1e6:.1f} MB, {share:.0%} of the original, {scheme})")
    print(f"quantized  {len(found.quantized)} operators; in float {', '.join(found.in_float) or 'no other product'}")
    where = f"{found.rows} rows" if found.rows else "random inputs, for there was no --data"
    for name, one in found.parity.items():
        print(f"parity     {name}: cosine {one.cosine:.6f}, max abs {one.max_abs:.2e}, on {where}")


def _write_mixed(
    source: tuple[str, str | None, str | None, str | None],
    scheme: str,
    out: Path,
    max_drop: str,
    where: tuple[str, int, int | None],
    *,
    rotate: bool,
    as_json: bool,
    seed: int,
    trust_remote_code: bool,
) -> None:
    """Quantize all operators but the fewest that keep the drop within ``max_drop``; ConstraintError where that does not
    pay. ``source`` is model, data, columns and metric, ``where`` target, batch and sequence."""
    import shutil
    import tempfile
    from dataclasses import asdict

    from . import recipe
    from .benchmarks import compare as comparing
    from .benchmarks import mixed
    from .benchmarks.targets import connect, parse
    from .compress import quantize as quantizers
    from .compress.quantize.sensitivity import SCHEMES
    from .export.artifact import seal
    from .files import new_folder
    from .gate import Constraint, Standing, gate
    from .models import metrics

    quantizers.get(scheme)
    if scheme not in SCHEMES:
        raise UsageError(f"--max-drop keeps operators in float of {' and '.join(SCHEMES)}, not of {scheme}.")
    allowed, (target, batch, seq), (model, data, columns, metric) = recipe.quantity("drop", max_drop), where, source
    if parse(target).runtime != "onnx":
        raise UnavailableError(f"What operators in float cost is measured in ONNX Runtime, not on '{target}'.")
    with ExitStack() as stack:
        stack.enter_context(connect(parse(target), "onnx"))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workload, screen = _load(stack, model, data, columns, seed, trust_remote_code, metric)
        found = mixed.fit(
            metrics.for_artifacts(workload),
            scheme,
            folder,
            max_drop=allowed,
            target=target,
            batch=batch,
            sequence=seq or min(128, workload.max_length or 128),
            rotate=rotate,
            seed=seed,
            say=screen.say,
            progress=screen.progress("quantize"),
        )
        chosen, in_float = found.found.best.artifact, found.found.in_float
        with new_folder(out) as place:
            shutil.copytree(chosen.folder, place, dirs_exist_ok=True)
            seal(place, chosen.manifest.model_copy(update={"name": out.name}), {})
    rows = comparing.rows(found.measured)
    first, best = found.measured[0], found.measured[-1]
    assert first.quality and best.quality
    kept, reason = gate(
        Standing(first.name, first.quality, first.size_bytes, None),
        Standing(best.name, best.quality, best.size_bytes, comparing.speedup(first, best)),
        Constraint(max_drop=allowed),
    )
    parity = chosen.manifest.parity
    assert parity is not None
    if as_json:
        document = {"artifact": str(out), "precision": scheme, "parity": parity.model_dump(mode="json")}
        _print({**document, "quality": asdict(best.quality), "mixed": found.to_json(), "rows": rows})
    else:
        _table(rows[0], rows[1:], rows[-1]["name"] if kept else None)
        print(f"artifact   {out} ({best.size_bytes / 1e6:.1f} MB, {scheme})")
        print(f"in float   {', '.join(in_float) or 'nothing'} ({len(in_float)} of {found.count} operators)")
    if not kept:
        share = f"{len(in_float)} of {found.count} operators"
        tried = f"operators left in float: {found.found.tried}"
        raise ConstraintError(f"No mix of {scheme} and float pays: with {share} in float it {reason}; {tried}.")


@app.command()
def export(
    model: Model,
    data: Data = None,
    columns: Columns = None,
    trust_remote_code: Trust = False,
    to: Annotated[str, typer.Option("--to", help="onnx, openvino, tensorrt or executorch.")] = "onnx",
    scheme: Annotated[
        str,
        typer.Option(
            "--scheme", help="fp32, fp16, bf16 or int8; for tensorrt also fp8, for onnx and openvino all of quantize."
        ),
    ] = "fp32",
    cache: Annotated[
        int | None,
        typer.Option("--cache", help="Of --to onnx: what writes text keeps keys and values, of so many tokens.", min=1),
    ] = None,
    opset: Annotated[
        int | None, typer.Option("--opset", help="Of --to onnx: the version of the standard operators, 18 to 25.")
    ] = None,
    capability: Annotated[
        str | None,
        typer.Option("--capability", help="Of --to tensorrt: sm80, sm86, sm89 … ahead of time; else the GPU's own."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="MODEL is an artifact: check its files, and what it computes here.")
    ] = False,
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Of --to tensorrt: kernels for 2:4 weights, see prune --sparsity.")
    ] = False,
    out: Annotated[Path, typer.Option("-o", "--out", help="Artifact folder to write.")] = Path("exported"),
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Write an artifact with dynamic batch and sequence, and prove that it computes what the model does."""
    options: dict[str, Any] = {}
    if verify:
        if data or columns or cache or opset or capability or sparse or (to, scheme) != ("onnx", "fp32"):
            raise UsageError("--verify takes an artifact folder alone.")
        _verify(Path(model), as_json=json_)
        return
    if to == "tensorrt":
        options = {"capability": capability, "sparse": sparse}
    elif capability or sparse:
        raise UsageError(f"{'--capability' if capability else '--sparse'} is of --to tensorrt, not of --to {to}.")
    if (cache or opset) and to != "onnx":
        raise UsageError(f"{'--cache' if cache else '--opset'} is of --to onnx, not of --to {to}.")
    options |= {name: given for name, given in (("cache", cache), ("opset", opset)) if given}
    _write_artifact(
        model,
        data,
        columns,
        to,
        scheme,
        out,
        as_json=json_,
        seed=seed,
        trust_remote_code=trust_remote_code,
        options=options,
    )


def _write_artifact(
    model: str,
    data: str | None,
    columns: str | None,
    to: str,
    scheme: str,
    out: Path,
    *,
    as_json: bool,
    seed: int,
    trust_remote_code: bool,
    steps: int = 0,
    rotate: bool = False,
    options: dict[str, Any] | None = None,
) -> None:
    from dataclasses import asdict

    from .benchmarks import mixed
    from .compress import quantize as quantizers
    from .compress.quantize.distilled import distilled
    from .export import backends, encoder_decoder, towers
    from .models import tasks
    from .plan import QuantizationPlan

    if scheme != "fp32":
        quantizers.get(scheme)
    runtime = backends.writing(scheme, to)
    with ExitStack() as stack:
        workload, screen = _load(stack, model, data, columns, seed, trust_remote_code)
        step = screen.progress("export")
        step(0, 0, "writing and proving parity")
        more = dict(options or {})

        def write(part: Workload, folder: Path) -> Artifact:
            plan = QuantizationPlan("fp32")
            if scheme != "fp32":
                plan = quantizers.quantize(part, scheme, rotate=rotate, say=screen.say)
            if steps and folder != out:
                raise UnavailableError(f"{workload.name} is exported in parts; --steps trains whole models alone.")
            if steps:
                train, state = screen.progress("distil"), _unfinished(out)
                found = distilled(part, plan, steps=steps, checkpoint=state, seed=seed, progress=train)
                part, plan = found.workload, found.plan
            name = out.name if folder == out else f"{out.name}-{folder.name}"
            by = partial(runtime.write, part, folder=folder, name=name, **more)
            if not steps:
                return mixed.proven(part, plan, by, rotate=rotate, seed=seed, say=screen.say, progress=step)
            written: Artifact = by(plan)
            state.unlink(missing_ok=True)
            return written

        if workload.task is tasks.RETRIEVAL:
            artifacts, word = towers.write(workload, out, write), "towers"
        elif "cache" in more and encoder_decoder.has_parts(workload):
            artifacts, word = encoder_decoder.write(workload, more.pop("cache"), out, write), "parts"
        else:
            artifacts, word = [write(workload, out)], ""
        quality = _judged(workload, artifacts, runtime, screen, seed, joined=word == "parts")
    parts: list[dict[str, Any]] = []
    for one in artifacts:
        assert one.manifest.parity is not None
        figures = one.manifest.parity.model_dump(mode="json")
        parts.append({"artifact": str(one.folder), "precision": one.precision, "parity": figures})
    whole = {"artifact": str(out), word: parts} if word else parts[0]
    if as_json:
        _print({**whole, "quality": asdict(quality) if quality else None})
        return
    for one in artifacts:
        parity = one.manifest.parity
        assert parity is not None
        print(f"artifact   {one.folder} ({one.size_bytes / 1e6:.1f} MB, {one.precision})")
        print(f"parity     max abs {parity.max_abs:.2e}, cosine {parity.cosine:.6f}, at {len(parity.shapes)} shapes")
    if quality:
        print(f"{quality.metric}   {quality.value:.2f} [{quality.low:.2f}, {quality.high:.2f}]")


def _judged(
    workload: Workload, artifacts: Sequence[Artifact], runtime: ModuleType, screen: Screen, seed: int, *, joined: bool
) -> Quality | None:
    """The quality of an artifact, or of several that make one model, on the evaluation rows."""
    from .export import encoder_decoder
    from .models import metrics

    judged = metrics.for_artifacts(workload)
    if not len(judged.data.evaluation):
        return None
    try:
        with ExitStack() as stack:
            opened = [runtime.open_session(one, threads=os.cpu_count() or 1) for one in artifacts]
            sessions = [stack.enter_context(one) for one in opened]

            def apart(feeds: Feeds) -> list[Any]:
                return [
                    session.run({name: feeds[name] for name in one.manifest.inputs if name in feeds})[0]
                    for one, session in zip(artifacts, sessions, strict=True)
                ]

            run = encoder_decoder.joined(*(session.run for session in sessions)) if joined else apart
            return metrics.of_session(run, judged, seed=seed, progress=screen.progress("evaluate"))
    except UnavailableError as error:  # an engine for another machine
        screen.say(f"note: its quality is not known. {error}")
        return None


def _verify(folder: Path, *, as_json: bool) -> None:
    """Check an artifact, or each part of one, against its checksums and its references."""
    from dataclasses import asdict

    from .export.artifact import MANIFEST, open_artifact
    from .export.reference import verify

    parts = [] if (folder / MANIFEST).exists() else sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    found = []
    for part in parts or [folder]:
        artifact = open_artifact(part)
        told = asdict(verify(artifact, threads=os.cpu_count() or 1))
        facts = {"artifact": str(part), "precision": artifact.precision, "files": len(artifact.manifest.files)}
        found.append({**facts, **told})
    if as_json:
        _print(found[0] if not parts else {"artifact": str(folder), "parts": found})
        return
    for one in found:
        print(f"artifact   {one['artifact']} ({one['precision']}), {one['files']} files as they were written")
        if one["cases"]:
            figures = f"max abs {one['max_abs']:.2e}, cosine {one['cosine']:.6f}"
            print(f"reference  {figures} from where it was proven, on {one['cases']} inputs")
        else:
            print("reference  none came with it, so what it computes here was not compared")


@app.command()
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
    from .benchmarks import compare as comparing
    from .export.artifact import open_artifact

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
        _print({"rows": rows, "environment": next(iter(environments.values())), "environments": environments})
        return
    per_shape = len(opened)
    for start in range(0, len(rows), per_shape):
        first, *others = rows[start : start + per_shape]
        tokens = f" x sequence {first['sequence']}" if first["sequence"] else ""
        tokens += f" after {first['past']}" if first["past"] else ""
        print(f"{first['target']}, batch {first['batch']}{tokens}")
        _table(first, others, None)


def _sweep_table(found: Sequence[dict[str, Any]]) -> None:
    """A line for each cell: what was chosen, beside its original."""
    from .benchmarks.tables import COLUMNS, plain_table
    from .benchmarks.tables import cells as texts

    lines = []
    for cell in found:
        rows = [row for row in (cell["original"], *cell["results"]) if row and row["name"] == cell["chosen"]]
        lines.append([cell["name"], cell["state"], *(texts(rows[0], cell["original"]) if rows else [cell["said"]])])
    width = max(map(len, lines), default=0)
    plain_table(["cell", "state", *COLUMNS][:width], [line + [""] * (width - len(line)) for line in lines])


def _measured(
    artifacts: Sequence[Artifact], names: Sequence[str], shapes: Sequence[tuple[int, int]], **options: Any
) -> list[list[Measurement]]:
    """``artifacts`` interleaved in each shape, batch and sequence, on each target; hosts work at the same time."""
    from .benchmarks import load, targets

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


def _shares(text: str) -> float | dict[str, float]:
    """``0.5``, or ``ffn=0.5,block=0.25``."""
    try:
        if "=" not in text:
            return float(text)
        return {kind.strip(): float(share) for kind, share in (part.split("=", 1) for part in text.split(","))}
    except ValueError as error:
        raise UsageError(f"--ratio '{text}' is not a share like 0.5, or shares like ffn=0.5,block=0.25.") from error


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UsageError(f"{option} '{text}' is not a list of positive numbers like 1,8.")
    return numbers


@app.command()
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
    from . import sweep as sweeps
    from .benchmarks.board import board
    from .cluster import on_ray

    cells = sweeps.read(grid, seed)
    finisher = partial(on_ray, address=ray) if ray else sweeps.local
    with board({cell.key: cell.name for cell in cells}) as tell:
        found = sweeps.sweep(cells, out, finisher, tell)
    if json_:
        _print({"cells": found})
    else:
        _sweep_table(found)
        print(f"results  {out / sweeps.RESULTS}")
    if failed := [cell for cell in found if cell["state"] == "failed"]:
        raise InputError(f"{len(failed)} of {len(found)} cells failed; {failed[0]['name']}: {failed[0]['said']}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="A run folder, results.sqlite, or artifact folders to measure.")],
    target: TargetsOption = None,
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """The table of a run against its original, of a sweep, or of artifacts measured now against the first."""
    from .stages import read_summary

    if len(runs) == 1 and runs[0].suffix == ".sqlite":
        from . import sweep as sweeps

        found = sweeps.results(runs[0])
        if json_:
            _print({"cells": found})
        else:
            _sweep_table(found)
        return
    if len(runs) == 1:
        summary = read_summary(runs[0])
        document = {name: summary[name] for name in ("original", "results", "chosen", "refused")}
        tables = [[document["original"], *document["results"]]]
    else:
        from .benchmarks import compare as comparing
        from .export.artifact import open_artifact

        opened = [open_artifact(folder) for folder in runs]
        tables = [comparing.rows(taken) for taken in _measured(opened, target or ["cpu"], [(1, 128)])]
        original, *results = [row for table in tables for row in table]
        document = {"original": original, "results": results, "chosen": None, "refused": []}
    if json_:
        _print(document)
        return
    for first, *others in tables:
        if len(tables) > 1:
            print(first["target"])
        _table(first, others, document["chosen"])


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Write report.html and report.md of a finished run anew."""
    from .benchmarks.report import write_report

    page = write_report(run)
    if json_:
        _print({"report": str(page)})
    else:
        print(page)


@app.command()
def targets(
    device: Annotated[str | None, typer.Argument(help="ssh://user@host; this machine, if none is given.")] = None,
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """What this machine or a device can run, and what is missing for the rest."""
    from .benchmarks.tables import plain_table
    from .benchmarks.targets import listing, listing_of

    environment, rows = listing_of(device) if device else (None, listing())
    if json_:
        _print({"targets": rows, **({"environment": environment} if environment else {})})
        return
    if environment:
        cores = f"{environment['cpus']} usable CPUs, {environment['memory_bytes'] / 1e9:.1f} GB of memory"
        print(f"device     {environment['cpu']} ({environment['arch']}), {cores}")
        print(f"python     {environment['python']}, {environment['system']} {environment['kernel']}")
    lines = [[row["target"], "yes" if row["available"] else "no", row["note"]] for row in rows]
    plain_table(["target", "available", ""], lines)


@app.command()
def methods(json_: Json = False, verbose: Verbose = False, seed: Seed = 0) -> None:
    """Every score, quantizer, runtime and family, with its source."""
    from .benchmarks.tables import plain_table
    from .methods import listing

    rows = listing()
    if json_:
        _print({"methods": rows})
    else:
        plain_table(["kind", "name", "what", "source"], [[r["kind"], r["name"], r["what"], r["source"]] for r in rows])


@app.command()
def zoo(json_: Json = False, verbose: Verbose = False, seed: Seed = 0) -> None:
    """The trained models that come by name, with what they are measured to reach; nothing is downloaded."""
    from .benchmarks.tables import plain_table, quality_text
    from .models.zoo import listing

    rows = listing()
    if json_:
        _print({"zoo": rows})
        return
    titles = ["model", "what", "parameters", "download", "quality [95 % interval]", "origin", "licence"]
    lines = []
    for row in rows:
        quality = row["quality"]
        judged = f"{quality['metric']} {quality_text(quality)}, {quality['n']:,} rows"
        size = f"{row['download_bytes'] / 1e6:.0f} MB" if row["download_bytes"] else "none"
        params = f"{row['params'] / 1e6:.1f} M"
        lines.append([f"zoo:{row['name']}", row["what"], params, size, judged, row["origin"], row["licence"]])
    plain_table(titles, lines)
