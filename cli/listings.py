"""``edgepress targets``, ``methods`` and ``zoo``."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Json, Seed, Verbose
from .screen import print_json


def targets(
    device: Annotated[str | None, typer.Argument(help="ssh://user@host; this machine, if none is given.")] = None,
    json_: Json = False,
    verbose: Verbose = False,
    seed: Seed = 0,
) -> None:
    """What this machine or a device can run, and what is missing for the rest."""
    from ..benchmarks.tables import plain_table
    from ..benchmarks.targets import listing, listing_of

    environment, rows = listing_of(device) if device else (None, listing())
    if json_:
        print_json({"targets": rows, **({"environment": environment} if environment else {})})
        return
    if environment:
        cores = f"{environment['cpus']} usable CPUs, {environment['memory_bytes'] / 1e9:.1f} GB of memory"
        print(f"device     {environment['cpu']} ({environment['arch']}), {cores}")
        print(f"python     {environment['python']}, {environment['system']} {environment['kernel']}")
    lines = []
    for row in rows:
        versions = ", ".join(f"{name} {found}" for name, found in row["versions"].items())
        lines.append([row["target"], "yes" if row["available"] else "no", versions, row["note"]])
    plain_table(["target", "available", "version", ""], lines)


def methods(json_: Json = False, verbose: Verbose = False, seed: Seed = 0) -> None:
    """Every score, quantizer, runtime and family, with its source."""
    from ..benchmarks.tables import plain_table
    from ..methods import listing

    rows = listing()
    if json_:
        print_json({"methods": rows})
    else:
        plain_table(["kind", "name", "what", "source"], [[r["kind"], r["name"], r["what"], r["source"]] for r in rows])


def zoo(json_: Json = False, verbose: Verbose = False, seed: Seed = 0) -> None:
    """The trained models that come by name, with what they are measured to reach; nothing is downloaded."""
    from ..benchmarks.tables import plain_table, quality_text
    from ..models.zoo import listing

    rows = listing()
    if json_:
        print_json({"zoo": rows})
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
