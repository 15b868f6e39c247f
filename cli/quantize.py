"""``edgepress sensitivity`` and ``edgepress quantize``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConstraintError, UnavailableError, UsageError
from ..files import check_writable
from .export import write_artifact
from .options import Columns, Data, Json, MetricOption, Model, Seed, Trust, Verbose, check_of
from .screen import Screen, check_out, load, print_json, table


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
    from ..compress.quantize import sensitivity as trials

    if out and (out.suffix != ".svg" or out.is_dir()):
        raise UsageError(f"{out} is not a file that ends in .svg; the chart is one.")
    if out:
        check_writable(out.parent)
    with ExitStack() as stack:
        workload, screen = load(stack, model, data, columns, seed, trust_remote_code)
        if not len(workload.data.calibration):
            raise UsageError(f"Without rows nothing can be tried on {workload.name}: give them with --data.")
        plan = trials.uncorrected(workload, scheme, seed=seed, progress=screen.progress("quantize"))
        found = trials.measure(workload, plan, rows=rows, seed=seed, progress=screen.progress("sensitivity"))
    order = found.order()
    alone, without = [found.alone[name] for name in order], [found.without[name] for name in order]
    if out:
        from ..benchmarks import charts
        from ..files import write_text

        write_text(out, charts.standalone(charts.sensitivity(order, alone, without, found.whole)))
    operators = [
        {"name": name, "alone": one, "all_but_it": others}
        for name, one, others in zip(order, alone, without, strict=True)
    ]
    if json_:
        print_json(
            {
                "scheme": scheme,
                "rows": min(rows, len(workload.data.calibration)),
                "whole": found.whole,
                "operators": operators,
            }
        )
        return
    from ..benchmarks.tables import plain_table

    lines = [[entry["name"], *(f"{entry[kind]:.3g}" for kind in ("alone", "all_but_it"))] for entry in operators]
    plain_table(["operator", "it alone", "all but it"], lines)
    print(f"all quantized: {found.whole:.3g} from the answers in float (nats, or a share of their mean square)")
    if out:
        print(f"chart  {out}")


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
    batch: Annotated[int | None, typer.Option("--batch", help="Of --max-drop: rows at a time, 1.", min=1)] = None,
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
        if any((columns, max_drop, target, batch, seq, metric, steps, rotate, trust_remote_code)):
            raise UsageError("An .onnx file takes --data with an .npz file of its inputs, --scheme and -o alone.")
        out = out or Path(f"{Path(model).stem}-{scheme}.onnx")
        check_writable(out.parent)
        _write_file(Path(model), data, scheme, out, as_json=json_)
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
            (target or "cpu", batch or 1, seq),
            rotate=rotate,
            as_json=json_,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        return
    check_of("--max-drop", target=target, batch=batch, seq=seq, metric=metric)
    write_artifact(
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

    from .. import foreign

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
        print_json(
            {**document, "size_bytes": found.size_bytes, "quantized": found.quantized, "in_float": found.in_float}
        )
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

    from .. import recipe
    from ..benchmarks import compare as comparing
    from ..benchmarks import mixed
    from ..benchmarks.targets import connect, to_write_for
    from ..compress import quantize as quantizers
    from ..compress.quantize.sensitivity import SCHEMES
    from ..export.artifact import seal
    from ..files import new_folder
    from ..gate import Constraint, Standing, gate
    from ..models import metrics

    quantizers.get(scheme)
    if scheme not in SCHEMES:
        raise UsageError(f"--max-drop keeps operators in float of {' and '.join(SCHEMES)}, not of {scheme}.")
    allowed, (target, batch, seq), (model, data, columns, metric) = recipe.quantity("drop", max_drop), where, source
    at = to_write_for(target)
    if at.runtime != "onnx":
        raise UnavailableError(f"What operators in float cost is measured in ONNX Runtime, not on '{target}'.")
    check_out(out, model, data)
    with ExitStack() as stack:
        stack.enter_context(connect(at, "onnx"))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workload, screen = load(stack, model, data, columns, seed, trust_remote_code, metric)
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
        print_json({**document, "quality": asdict(best.quality), "mixed": found.to_json(), "rows": rows})
    else:
        table(rows[0], rows[1:], rows[-1]["name"] if kept else None)
        print(f"artifact   {out} ({best.size_bytes / 1e6:.1f} MB, {scheme})")
        print(f"in float   {', '.join(in_float) or 'nothing'} ({len(in_float)} of {found.count} operators)")
    if not kept:
        share = f"{len(in_float)} of {found.count} operators"
        tried = f"operators left in float: {found.found.tried}"
        raise ConstraintError(f"No mix of {scheme} and float pays: with {share} in float it {reason}; {tried}.")
