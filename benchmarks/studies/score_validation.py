"""Which scores to believe: every method against trials on models of the zoo, as JSON and as the tables of the docs.

    python benchmarks/studies/score_validation.py zoo:vit-fashion --units 32 --rows 256 --trial-rows 256 -o results.json
    python benchmarks/studies/score_validation.py --tables -o results.json

The first measures one model and adds it to the file; the second prints the file as Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any


def measure(model: str, *, units: int, rows: int, trial_rows: int, threads: int, seed: int) -> dict[str, Any]:
    import edgepress as ep
    import torch
    from edgepress.benchmarks.environment import fingerprint
    from edgepress.compress import score as scores
    from edgepress.compress.score import validate

    torch.set_num_threads(threads)
    workload = ep.load(model)
    methods = ("masked_taylor", *scores.cheap(), "hessian")
    begin = time.perf_counter()
    found = scores.score_all(workload, methods, rows=rows, seed=seed)
    scored = time.perf_counter() - begin
    judged = validate.unseen(workload, scored=rows, count=trial_rows, seed=seed)
    last = 0.0

    def progress(done: int, total: int, note: str) -> None:
        nonlocal last
        if time.perf_counter() - last > 30:
            last = time.perf_counter()
            print(f"{model}: {done:,} of {total:,} {note}", file=sys.stderr)

    validation = validate.validate(workload, found, units=units, rows=judged, seed=seed, progress=progress)
    return {
        "units": units,
        "rows": len(workload.data.calibration.take(rows, seed)),
        "trial_rows": len(judged),
        "seed": seed,
        "seconds": {"scores": scored, "all": time.perf_counter() - begin},
        "validation": validation,
        "environment": fingerprint(threads),
    }


def tables(results: dict[str, Any]) -> str:
    """For each model and kind: the methods in the order of the area under their curves."""
    texts = []
    for model, found in results.items():
        texts.append(
            f"### {model}\n\n{found['rows']} rows scored, {found['units']} units of each kind masked in trials on "
            f"{found['trial_rows']} other rows.\n"
        )
        of = found["validation"]
        for kind, first in next(iter(of.values())).items():
            sets = bool(first["sets"])
            ceiling = _figure(first["ceiling"])
            note = f", of sets of {first['sets']['size']} {_figure(first['sets']['ceiling'])}" if sets else ""
            head = ["method", "Spearman", "Kendall", "regret", *(["Spearman of sets"] if sets else []), "area"]
            texts.append(f"**{kind}**, {first['n']} units; ceiling of the correlation {ceiling}{note}\n")
            texts.append(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
            best = min(of, key=lambda method: float(of[method][kind]["curve"]["area"]))
            for method in sorted(of, key=lambda method: float(of[method][kind]["curve"]["area"])):
                texts.append(f"| {' | '.join(_cells(method, of[method][kind], best))} |")
            texts.append("")
    return "\n".join(texts)


def _cells(method: str, entry: dict[str, Any], best: str) -> list[str]:
    def known(part: dict[str, Any], name: str, low: str, high: str) -> str:
        return f"{_figure(part[name])} [{_figure(part[low])}, {_figure(part[high])}]"

    cells = [f"**{method}**" if method == best else method, known(entry, "spearman", "low", "high")]
    cells += [known(entry, "kendall", "kendall_low", "kendall_high"), _figure(entry["regret"])]
    if entry["sets"]:
        cells.append(known(entry["sets"], "spearman", "low", "high"))
    curve = entry["curve"]
    return [*cells, f"{curve['area']:.3g} [{curve['low']:.3g}, {curve['high']:.3g}]"]


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--units", type=int, default=32)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--trial-rows", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("-o", "--out", type=Path, default=Path("score-validation.json"))
    given = parser.parse_args()
    results = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    if given.model:
        options = {"units": given.units, "rows": given.rows, "trial_rows": given.trial_rows}
        found = measure(given.model, threads=given.threads, seed=given.seed, **options)
        results = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
        given.out.write_text(json.dumps({**results, given.model: found}, indent=1) + "\n", encoding="utf-8")
    if given.tables:
        print(tables(results))


if __name__ == "__main__":
    main()
