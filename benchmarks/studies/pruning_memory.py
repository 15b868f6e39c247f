"""What pruning costs in memory, stage by stage, as a multiple of the model.

    python benchmarks/studies/pruning_memory.py [--model MODEL] [--data FILE --columns text=…] [-o out.json]

In a process of its own the model is loaded, answers one row, and goes through what ``prune --speedup`` does but for the
latency: scores, predicted losses, the plan that keeps half of the multiply-accumulates, its removal, and the
reconstruction. A small model has gone through the same before, so that code and what libraries keep for themselves are
not counted.

A stage's figure is the peak of the resident set while it runs, less the resident set after loading, plus the weights,
over the weights: 1.0 is the model alone. What the pruned copy takes is counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from resource import getpagesize
from typing import Any, TypeVar

Made = TypeVar("Made")

WARM_UP = "zoo:vit-fashion"


def stages(
    model: str, data: str | None, columns: dict[str, str] | None, rows: int, say: Callable[[str], None]
) -> dict[str, Any]:
    import edgepress as ep
    from edgepress.benchmarks.runner import peak_rss
    from edgepress.compress import score as scores
    from edgepress.compress.prune.budget import by_latency, counted
    from edgepress.compress.prune.predicted import predict
    from edgepress.compress.prune.reconstruct import reconstruct
    from edgepress.models import surgery
    from edgepress.models.memory import give_back

    workload = ep.load(model, data, columns=columns) if data else ep.load(model)
    workload.forward(workload.example)
    give_back()
    loaded = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * getpagesize()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in workload.module.parameters())
    found: dict[str, Any] = {}

    def stage(name: str, run: Callable[[], Made]) -> Made:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux forgets the peak so far
        begin = time.perf_counter()
        made = run()
        over = peak_rss() - loaded
        found[name] = {"over_bytes": over, "ratio": 1 + over / weights, "seconds": time.perf_counter() - begin}
        say(f"{name:12} {over / 1e6:6.0f} MB over the model, {1 + over / weights:.2f}x, {found[name]['seconds']:.0f} s")
        return made

    scored = stage("score", lambda: scores.score(workload))
    told = stage("losses", lambda: predict(workload, scored.values))
    cost = counted(workload.structure, "macs", workload.macs)
    plan = by_latency(workload.structure, told.losses, cost, workload.macs / 2, order=told.orders)
    pruned = stage("removal", lambda: surgery.prune(workload, plan))
    stage("reconstruct", lambda: reconstruct(workload, pruned, rows=rows, in_place=True))
    return {"model": model, "rows": rows, "weights_bytes": weights, "torch": version("torch"), "stages": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:minilm-reviews")
    parser.add_argument("--data")
    parser.add_argument("--columns", help="text=review,label=stars")
    parser.add_argument("--rows", type=int, default=512, help="of the reconstruction")
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    columns = dict(pair.split("=", 1) for pair in options.columns.split(",")) if options.columns else None
    stages(WARM_UP, None, None, 32, lambda _: None)
    document = stages(options.model, options.data, columns, options.rows, partial(print, flush=True))
    if options.out:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
