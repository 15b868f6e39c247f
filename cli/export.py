"""``edgepress export``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UnavailableError, UsageError
from .options import Columns, Data, Json, Model, Seed, Trust, Verbose
from .screen import Screen, check_out, load, print_json, unfinished

if TYPE_CHECKING:
    from ..export.artifact import Artifact
    from ..export.parity import Feeds
    from ..models.metrics import Quality
    from ..models.workload import Workload


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
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Artifact folder to write, 'exported' if not said.")
    ] = None,
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """Write an artifact with dynamic batch and sequence, and prove that it computes what the model does."""
    options: dict[str, Any] = {}
    if verify:
        others = (data, columns, trust_remote_code, cache, opset, capability, sparse, out)
        if any(others) or (to, scheme) != ("onnx", "fp32"):
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
    write_artifact(
        model,
        data,
        columns,
        to,
        scheme,
        out or Path("exported"),
        as_json=json_,
        seed=seed,
        trust_remote_code=trust_remote_code,
        options=options,
    )


def write_artifact(
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
    from ..benchmarks import mixed
    from ..compress import quantize as quantizers
    from ..compress.quantize.distilled import distilled
    from ..export import backends, encoder_decoder, towers
    from ..models import tasks
    from ..plan import QuantizationPlan

    if scheme != "fp32":
        quantizers.get(scheme)
    runtime = backends.writing(scheme, to)
    check_out(out, model, data)
    with ExitStack() as stack:
        workload, screen = load(stack, model, data, columns, seed, trust_remote_code)
        step = screen.progress("export")
        step(0, 0, "writing and proving parity")
        more = dict(options or {})

        def write(part: Workload, folder: Path) -> Artifact:
            plan = QuantizationPlan("fp32")
            if scheme != "fp32":
                plan = quantizers.quantize(part, scheme, rotate=rotate, seed=seed, say=screen.say)
            if steps and folder != out:
                raise UnavailableError(f"{workload.name} is exported in parts; --steps trains whole models alone.")
            if steps:
                train, state = screen.progress("distil"), unfinished(out)
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
    _show(artifacts, quality, out, word, as_json=as_json)


def _show(artifacts: Sequence[Artifact], quality: Quality | None, out: Path, word: str, *, as_json: bool) -> None:
    """What was written; several are the ``word``, towers or parts, of one model in ``out``."""
    from dataclasses import asdict

    parts: list[dict[str, Any]] = []
    for one in artifacts:
        assert one.manifest.parity is not None
        figures = one.manifest.parity.model_dump(mode="json")
        parts.append({"artifact": str(one.folder), "precision": one.precision, "parity": figures})
    whole = {"artifact": str(out), word: parts} if word else parts[0]
    if as_json:
        print_json({**whole, "quality": asdict(quality) if quality else None})
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
    from ..export import encoder_decoder
    from ..models import metrics

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

    from ..export.artifact import MANIFEST, open_artifact
    from ..export.reference import verify

    parts = [] if (folder / MANIFEST).exists() else sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    found = []
    for part in parts or [folder]:
        artifact = open_artifact(part)
        told = asdict(verify(artifact, threads=os.cpu_count() or 1))
        facts = {"artifact": str(part), "precision": artifact.precision, "files": len(artifact.manifest.files)}
        found.append({**facts, **told})
    if as_json:
        print_json(found[0] if not parts else {"artifact": str(folder), "parts": found})
        return
    for one in found:
        print(f"artifact   {one['artifact']} ({one['precision']}), {one['files']} files as they were written")
        if one["cases"]:
            figures = f"max abs {one['max_abs']:.2e}, cosine {one['cosine']:.6f}"
            print(f"reference  {figures} from where it was proven, on {one['cases']} inputs")
        else:
            print("reference  none came with it, so what it computes here was not compared")
