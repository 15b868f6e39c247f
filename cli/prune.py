"""``edgepress prune``."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from .options import WHERE, Columns, Data, Json, MetricOption, Model, Seed, Trust, Verbose, check_of
from .screen import Screen, check_out, first, load, print_json, unfinished

if TYPE_CHECKING:
    from ..benchmarks.speed import Fitted
    from ..compress.score import Scores
    from ..models.workload import Workload


def prune(
    model: Model,
    data: Data = None,
    columns: Columns = None,
    trust_remote_code: Trust = False,
    method: Annotated[
        str | None, typer.Option("--method", help="Score, masked-taylor if not said; see 'edgepress methods'.")
    ] = None,
    ratio: Annotated[
        str | None,
        typer.Option("--ratio", help="Share of heads and channels that goes, 0.5 if not said: or ffn=0.5,block=0.25."),
    ] = None,
    speedup: Annotated[
        str | None, typer.Option("--speedup", help="Instead of a ratio: so much faster on --target, measured: 2x.")
    ] = None,
    target: Annotated[str | None, typer.Option("--target", help=f"Of --speedup: {WHERE}")] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Of --speedup: rows at a time, 1.", min=1)] = None,
    seq: Annotated[
        int | None, typer.Option("--seq", help="Of --speedup: tokens; 128 where the model takes as many.", min=1)
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="Of --speedup: what is deployed, fp32 or int8-dynamic.")
    ] = None,
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
    steps: Annotated[int | None, typer.Option("--steps", help="Steps of distillation, 160.", min=1)] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate of distillation, 5e-4.", min=1e-9)] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Checkpoint folder to write.")] = Path("pruned"),
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Remove the least important units for good, by a ratio or down to a measured speed, and write a checkpoint.

    With --low-rank, --merge-tokens or --sparsity units go only where --ratio or --speedup asks for it too.
    """
    if recover not in {"none", "reconstruct", "distill"}:
        raise UsageError(f"There is no recovery '{recover}' (there is: none, reconstruct, distill).")
    if recover != "distill":
        check_of("--recover distill", steps=steps, lr=lr)
    asked = Asked(
        method=method or "masked-taylor",
        ratio=_shares(ratio) if ratio else None,
        speed=_speed(speedup, target, batch, seq, precision),
        low_rank=low_rank,
        merge_tokens=merge_tokens,
        sparsity=sparsity,
        uniform=uniform,
        recover=recover,
        training={"steps": steps or 160, "lr": lr or 5e-4, "checkpoint": unfinished(out)},
        seed=seed,
    )
    _check(asked)
    if not asked.units:
        check_of("--ratio or --speedup", method=method)
    check_out(out, model, data)
    with ExitStack() as stack:
        if asked.speed:
            _connect(stack, asked.speed.target)
        workload, screen = load(stack, model, data, columns, seed, trust_remote_code, metric)
        document, fitted = _made(workload, asked, screen, out)
    (print_json if json_ else _pruned)(document)
    if fitted:
        fitted.check()


@dataclass(frozen=True)
class Speed:
    """What --speedup asks for, where, and in which form."""

    speedup: float
    target: str
    batch: int
    sequence: int | None
    precision: str


@dataclass(frozen=True)
class Asked:
    """What the options ask for."""

    method: str
    ratio: float | dict[str, float] | None
    speed: Speed | None
    low_rank: float | None
    merge_tokens: int | None
    sparsity: str | None
    uniform: bool
    recover: str
    training: dict[str, Any]
    """Of --recover distill."""
    seed: int

    @property
    def units(self) -> bool:
        """Whether units go."""
        return bool(self.ratio is not None or self.speed) or not (self.low_rank or self.merge_tokens or self.sparsity)

    @property
    def shares(self) -> float | dict[str, float]:
        return 0.5 if self.ratio is None else self.ratio


def _speed(
    speedup: str | None, target: str | None, batch: int | None, seq: int | None, precision: str | None
) -> Speed | None:
    """The speed asked for, of a target and in a precision that there are."""
    from .. import recipe
    from ..benchmarks.targets import to_write_for
    from ..compress import quantize as quantizers
    from ..export import backends

    if not speedup:
        check_of("--speedup", target=target, batch=batch, seq=seq, precision=precision)
        return None
    if "RANK" in os.environ:
        raise UsageError("--speedup is measured, so one process alone can prune to it; give several a --ratio.")
    if precision not in {None, "fp32"}:
        quantizers.get(str(precision))
    backends.writing(precision or "fp32", to_write_for(target or "cpu").runtime)
    wanted = recipe.quantity("speedup", speedup)
    if wanted <= 1:
        raise UsageError(f"A speedup of {wanted:g}x asks for nothing; it must be above 1.")
    return Speed(wanted, target or "cpu", batch or 1, seq, precision or "fp32")


def _check(asked: Asked) -> None:
    """Refuse what makes no sense before anything is loaded."""
    from ..compress import score as scores
    from ..compress.prune.sparsity import Pattern

    if asked.speed and (asked.ratio is not None or asked.uniform):
        raise UsageError(f"Give --speedup or {'--uniform' if asked.ratio is None else '--ratio'}, not both.")
    scores.get(asked.method)
    if asked.low_rank is not None and not 0 < asked.low_rank < 1:
        raise UsageError(
            f"--low-rank {asked.low_rank:g} is not a share of the weights; it must be above 0 and below 1."
        )
    if asked.sparsity:
        Pattern.parse(asked.sparsity)
    if asked.uniform and (asked.low_rank or asked.merge_tokens):
        word = "--low-rank" if asked.low_rank else "--merge-tokens"
        raise UsageError(f"No configuration can say {word}: leave --uniform.")
    if asked.recover == "distill" and not (asked.units or asked.low_rank):
        raise UsageError("--recover distill trains what --ratio, --speedup or --low-rank leave; give one of them.")


def _connect(stack: ExitStack, target: str) -> None:
    """Reach the target before anything is loaded."""
    from ..benchmarks.targets import connect, parse

    where = parse(target)
    stack.enter_context(connect(where, where.runtime))


def _made(workload: Workload, asked: Asked, screen: Screen, out: Path) -> tuple[dict[str, Any], Fitted | None]:
    """Prune, write the checkpoint, and judge before and after: what ``--json`` prints, and the fit to a speed."""
    from dataclasses import asdict

    from ..models import metrics

    if asked.units and not asked.speed:
        _check_kinds(workload, asked)
    judged = workload.data.evaluation if len(workload.data.evaluation) and first() else None
    judge, name = screen.progress("evaluate"), workload.data.metric
    before = metrics.answers(workload, judged, metric=name, progress=judge) if judged else None
    params, macs = workload.params, workload.macs
    pruned, fitted = _smaller(workload, asked, screen)
    _keep(pruned, out, plain=asked.uniform)
    quality = None
    if judged:
        after = metrics.answers(pruned, judged, metric=name, progress=judge)
        quality = asdict(metrics.quality(name, after, metrics.wanted(judged, name), original=before, seed=asked.seed))
    document = {
        "checkpoint": str(out),
        "plan": pruned.plan.to_json(),
        "params_before": params,
        "params_after": pruned.params,
        "macs_before": macs,
        "macs_after": pruned.macs,
        "quality": quality,
        **({"speed": fitted.to_json()} if fitted else {}),
        **_shapes(pruned, asked.sparsity),
    }
    return document, fitted


def _check_kinds(workload: Workload, asked: Asked) -> None:
    """Refuse shares of units that the model does not have, before they are scored."""
    import torch

    from ..compress.prune.allocate import by_ratio

    by_ratio(workload.structure, torch.zeros(workload.structure.num_units), asked.shares)


def _smaller(workload: Workload, asked: Asked, screen: Screen) -> tuple[Workload, Fitted | None]:
    """``workload`` without the units that go, factored, recovered, with tokens merged and zeros, as ``asked``."""
    from ..compress import score as scores

    seed = asked.seed
    alone = asked.recover == "none" or not (asked.units or asked.low_rank)  # nothing needs the original's module then
    pruned, fitted = workload, None
    if asked.units:
        found = scores.score(workload, asked.method, seed=seed, progress=screen.progress("score"))
        fitted = _fit(workload, found, screen, asked.speed, seed) if asked.speed else None
        pruned = _without_units(workload, found, fitted, asked, in_place=alone)
    pruned = _factored(pruned, asked.low_rank, screen, seed)
    if not alone:
        training = asked.training if asked.recover == "distill" else None
        pruned = _recovered(workload, pruned, screen, seed, training)
    return _same_shapes(pruned, asked.merge_tokens, asked.sparsity, screen, seed), fitted


def _fit(workload: Workload, found: Scores, screen: Screen, wanted: Speed, seed: int) -> Fitted:
    """The plan that makes ``workload`` as fast as ``wanted``."""
    from ..benchmarks import latency, speed
    from ..compress.prune.predicted import predict

    table = latency.measure(
        workload,
        target=wanted.target,
        batch=wanted.batch,
        sequence=wanted.sequence or min(128, workload.max_length or 128),
        precision=wanted.precision,
        progress=screen.progress("latency"),
        say=screen.say,
    )
    told = predict(workload, found.values, seed=seed, progress=screen.progress("losses"))
    step = screen.progress("allocate")
    return speed.fit(workload, table, told, speedup=wanted.speedup, say=screen.say, progress=step)


def _without_units(
    workload: Workload, found: Scores, fitted: Fitted | None, asked: Asked, *, in_place: bool
) -> Workload:
    """``workload`` cut down to the plan that fits a speed, or by the shares."""
    from ..compress.prune import prune as by_shares
    from ..models import surgery
    from ..models.plain import plain_skeleton

    if fitted:
        return surgery.prune(workload, fitted.plan, in_place=in_place)
    pruned = by_shares(workload, found, ratio=asked.shares, uniform=asked.uniform, in_place=in_place)
    if asked.uniform:
        plain_skeleton(pruned)  # refused before anything is trained
    return pruned


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

    pruned = reconstruct(workload, pruned, seed=seed, in_place=True, progress=screen.progress("reconstruct"))
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
    """``0.5``, or ``ffn=0.5,block=0.25``; each at least 0 and below 1."""
    try:
        pairs = [part.split("=", 1) for part in text.split(",")] if "=" in text else [["", text]]
        shares = {kind.strip(): float(share) for kind, share in pairs}
    except ValueError as error:
        raise UsageError(f"--ratio '{text}' is not a share like 0.5, or shares like ffn=0.5,block=0.25.") from error
    if wrong := [share for share in shares.values() if not 0 <= share < 1]:
        raise UsageError(f"--ratio '{text}' has {wrong[0]:g}; a share must be at least 0 and below 1.")
    return shares if "=" in text else shares[""]
