"""``edgepress inspect``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from ..files import check_writable
from .options import Columns, Data, Json, Model, Seed, Trust, Verbose
from .screen import load, print_json


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
    from ..models.inspect import inspect as look

    if out:
        check_writable(out)
    with ExitStack() as stack:
        workload, screen = load(stack, model, data, columns, seed, trust_remote_code)
        found = look(workload, rows=rows, seed=seed, progress=screen.progress("statistics"))
    if out:
        from ..benchmarks.inspection import write_inspection

        write_inspection(found, out)
    if json_:
        print_json(found)
        return
    from ..benchmarks.tables import plain_table
    from ..benchmarks.tables import statistics as table_of

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
