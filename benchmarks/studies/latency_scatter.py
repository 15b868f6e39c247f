"""Does the latency table tell the latency? Random plans, predicted from the table and measured end to end.

    python benchmarks/studies/latency_scatter.py zoo:minilm-reviews --target cpu:2 --plans 20 \\
        -o benchmarks/results/latency-scatter.json --picture docs/latency-scatter.svg

Every plan mixes heads, channels and whole blocks at random, and any count of them. Its model is exported and measured
interleaved with the original, so the error is one of ratios: (predicted / whole) / (measured / original) - 1. Where the
original took a tenth longer than in the table, something disturbed the machine, and the calmer of two runs counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np


def draw(structure: Any, random: np.random.Generator) -> Any:
    """A plan of a strength of its own: up to half of the blocks of a stack, and of the rest any share."""
    from edgepress.compress.prune.budget import choices, fewest
    from edgepress.plan import PruningPlan

    strength = random.random()
    units = []
    for site in choices(structure):
        if site.kind != "block":
            share = np.clip(strength + random.uniform(-0.3, 0.3), 0, 1)
            kept = max(fewest(site), round(site.count * (1 - share)))
            units += [site.units[index] for index in random.permutation(site.count)[kept:]]
    for stack in structure.stacks:
        blocks = [site.units[0] for site in structure.of_kind("block") if site.layer in stack.layers]
        going = int(random.integers(0, len(blocks) // 2 + 1)) if random.random() < 0.5 else 0
        units += [blocks[place] for place in random.permutation(len(blocks))[:going]]
    return PruningPlan.of(units)


def point(table: Any, structure: Any, plan: Any, original: Any, small: Any) -> dict[str, Any]:
    """What the table says of a plan beside the two measurements; shares are of the original's latency."""
    from edgepress.benchmarks import compare

    faster, paired = compare.speedup(original, small), compare.share(original, small)
    predicted = table.predict(structure, plan)
    share = predicted / table.total_ms
    return {
        "plan": plan.to_json(),
        "blocks": len(plan.blocks),
        "predicted_ms": predicted,
        "predicted_share": share,
        "original_ms": original.p50,
        "measured_ms": small.p50,
        "measured_share": 1 / faster.value,
        "interval": [1 / faster.high, 1 / faster.low],
        "error": share * faster.value - 1,
        "paired_share": paired,
        "paired_error": share / paired - 1,
        "load_1min": small.environment["load_1min"],
    }


def scatter(model: str, *, target: str, precision: str, plans: int, seconds: float, seed: int) -> dict[str, Any]:
    import edgepress as ep
    from edgepress.benchmarks import latency, load
    from edgepress.benchmarks.disturbance import calmest
    from edgepress.export.backends import onnx
    from edgepress.models import surgery
    from edgepress.plan import QuantizationPlan

    workload = ep.load(model)
    last = 0.0

    def progress(done: int, total: int, note: str) -> None:
        nonlocal last
        if time.perf_counter() - last > 20:
            last = time.perf_counter()
            print(f"{precision}: {done} of {total} {note}", file=sys.stderr, flush=True)

    table = latency.measure(workload, target=target, precision=precision, progress=progress)
    random = np.random.default_rng(seed)
    points = []
    with tempfile.TemporaryDirectory() as folder:

        def artifact(of: Any, name: str) -> Any:
            scheme = QuantizationPlan("fp32") if precision == "fp32" else ep.quantize(of, precision)
            return onnx.write(of, scheme, Path(folder) / name, form=table.form)

        original = artifact(workload, "original")
        for number in range(plans):
            plan = draw(workload.structure, random)
            small = artifact(surgery.prune(workload, plan), "small")
            take = partial(
                load.benchmark,
                [original, small],
                target=target,
                batch=table.batch,
                sequence=table.sequence,
                min_queries=1_000_000,  # the time ends it
                min_seconds=seconds,
                memory=False,
            )
            first, second = calmest(take, table.total_ms)
            points.append(point(table, workload.structure, plan, first, second))
            share, found, paired = (points[-1][name] for name in ("predicted_share", "measured_share", "paired_share"))
            print(
                f"{precision} {number + 1}: {share:.3f} of the whole predicted, {found:.3f} measured "
                f"({paired:.3f} round by round, {100 * points[-1]['paired_error']:+.1f} %)",
                file=sys.stderr,
                flush=True,
            )
    summary = {}
    for name in ("error", "paired_error"):
        errors = np.abs([one[name] for one in points])
        within = float((errors <= 0.1).mean())
        summary[name] = {"median": float(np.median(errors)), "most": float(errors.max()), "within_10_percent": within}
    return {
        "model": model, "errors": summary, "points": points, "table": table.to_json(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="zoo:minilm-reviews")
    parser.add_argument("--target", default="cpu:2")
    parser.add_argument("--precision", default="fp32,int8-dynamic")
    parser.add_argument("--plans", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10, help="that a plan and the original are timed for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()

    from edgepress.benchmarks.charts import agreement, standalone

    found = {
        precision: scatter(
            options.model, target=options.target, precision=precision,
            plans=options.plans, seconds=options.seconds, seed=options.seed,
        )
        for precision in options.precision.split(",")
    }  # fmt: skip
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for precision, result in found.items():
        print(precision, json.dumps(result["errors"]))
    if options.picture:
        pairs = {
            precision: [(100 * p["predicted_share"], 100 * p["measured_share"]) for p in result["points"]]
            for precision, result in found.items()
        }
        axes = ("predicted from the table, % of the original's latency", "measured, %")
        title = f"Latency of random plans of {options.model} on {options.target}"
        options.picture.write_text(standalone(agreement(pairs, axes, title)), encoding="utf-8")


if __name__ == "__main__":
    main()
