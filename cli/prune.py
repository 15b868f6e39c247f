"""``edgepress prune``."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .options import WHERE, Columns, Data, Json, MetricOption, Model, Seed, Trust, Verbose
from .screen import Screen, first, load, print_json, unfinished

if TYPE_CHECKING:
    from ..benchmarks.speed import Fitted
    from ..compress.score import Scores
    from ..models.workload import Workload


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

    from ..compress import score as scores

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
        from ..benchmarks.targets import connect, parse
        from ..models import metrics

        if wanted is not None:
            where = parse(target or "cpu")
            stack.enter_context(connect(where, where.runtime))

        workload, screen = load(stack, model, data, columns, seed, trust_remote_code, metric)
        judged = workload.data.evaluation if len(workload.data.evaluation) and first() else None
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
            options = {"steps": steps, "lr": lr, "checkpoint": unfinished(out)} if recover == "distill" else None
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
    (print_json if json_ else _pruned)(document)
    if fitted:
        fitted.check()


def _wanted(speedup: str, target: str, precision: str) -> float:
    """The speed asked for, of a target and in a precision that there are."""
    from .. import recipe
    from ..benchmarks.targets import to_write_for
    from ..compress import quantize as quantizers
    from ..export import backends

    if "RANK" in os.environ:
        raise UsageError("--speedup is measured, so one process alone can prune to it; give several a --ratio.")
    if precision != "fp32":
        quantizers.get(precision)
    backends.writing(precision, to_write_for(target).runtime)
    wanted = recipe.quantity("speedup", speedup)
    if wanted <= 1:
        raise UsageError(f"A speedup of {wanted:g}x asks for nothing; it must be above 1.")
    return wanted


def _fit(
    workload: Workload, found: Scores, screen: Screen, where: tuple[str, int, int | None, str], wanted: float, seed: int
) -> Fitted:
    """The plan that makes ``workload`` ``wanted`` times faster; ``where`` is target, batch, sequence and precision."""
    from ..benchmarks import latency, speed
    from ..compress.prune.predicted import predict

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
    from ..compress.prune import prune as by_shares
    from ..models import surgery
    from ..models.plain import plain_skeleton

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
    from ..compress.prune.sparsity import Pattern

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
    from ..compress.prune.low_rank import allocate, errors, factorise

    if share is None:
        return pruned
    curves = errors(pruned, seed=seed, progress=screen.progress("low rank"))
    return factorise(pruned, allocate(curves, share), seed=seed, progress=screen.progress("low rank"))


def _same_shapes(pruned: Workload, tokens: int | None, sparsity: str | None, screen: Screen, seed: int) -> Workload:
    """What comes last: training would fill the zeros again."""
    from ..compress.prune.sparsity import sparsify
    from ..compress.prune.token_merging import merge_tokens

    if tokens:
        pruned = merge_tokens(pruned, tokens)
    return sparsify(pruned, sparsity, seed=seed, progress=screen.progress("sparsity")) if sparsity else pruned


def _shapes(pruned: Workload, sparsity: str | None) -> dict[str, Any]:
    """What was done beyond units: ranks by layer, tokens merged by block, the share of zeros by layer."""
    from ..compress.prune.sparsity import zeros
    from ..models import low_rank, token_merging

    found = {"ranks": low_rank.ranks(pruned.module), "merged_tokens": token_merging.merged(pruned.module)}
    return {name: value for name, value in found.items() if value} | ({"zeros": zeros(pruned)} if sparsity else {})


def _recovered(
    workload: Workload, pruned: Workload, screen: Screen, seed: int, options: dict[str, Any] | None
) -> Workload:
    """``pruned`` reconstructed, and distilled where there are ``options`` for that."""
    from ..compress.prune.reconstruct import reconstruct
    from ..compress.recover import recover as distill

    pruned = reconstruct(workload, pruned, seed=seed, progress=screen.progress("reconstruct"))
    if options is None:
        return pruned
    return distill(pruned, workload, **options, seed=seed, progress=screen.progress("distill")).workload


def _keep(pruned: Workload, out: Path, *, plain: bool) -> None:
    """Write the checkpoint, in the first of several processes; the others end here."""
    from ..models import checkpoint

    if not first():
        raise typer.Exit
    checkpoint.save(pruned, out, plain=plain)
    unfinished(out).unlink(missing_ok=True)


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


def _shares(text: str) -> float | dict[str, float]:
    """``0.5``, or ``ffn=0.5,block=0.25``."""
    try:
        if "=" not in text:
            return float(text)
        return {kind.strip(): float(share) for kind, share in (part.split("=", 1) for part in text.split(","))}
    except ValueError as error:
        raise UsageError(f"--ratio '{text}' is not a share like 0.5, or shares like ffn=0.5,block=0.25.") from error
