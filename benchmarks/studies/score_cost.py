"""What scoring costs: time against rows and against parameters, and memory against what a training step takes.

    python benchmarks/studies/score_cost.py [--model zoo:minilm-reviews] [--threads 2] [-o cost.json] [--charts docs]

All methods that share one pass, together, on rows of 128 tokens. Every figure comes from a process of its own, and
repetitions are interleaved. Memory is the peak resident set, held against that of a process which loads the same model
and makes one ordinary step, forward and backward with the gradients of all parameters, on one batch: of as many rows as
scoring takes at once, and of 32.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

TOKENS = 128
ROWS = (64, 128, 256, 512, 640)
LAYERS = (1, 2, 4, 7, 10)
WORKS = ("load", "step", "score")


def stacked(layers: int) -> tuple[Any, dict[str, Any]]:
    """MiniLM's encoder with so many layers and few tokens, so that parameters grow as layers do."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=1536)
    config.vocab_size = config.max_position_embeddings = TOKENS
    return BertForSequenceClassification(config), {"input_ids": torch.ones(1, TOKENS, dtype=torch.int64)}


for count in LAYERS:  # as functions, which is how edgepress takes a user's own models
    globals()[f"stack{count}"] = partial(stacked, count)


def loaded(model: str, rows: int) -> Any:
    """The workload with ``rows`` calibration rows of ``TOKENS`` tokens."""
    import edgepress as ep
    import numpy as np
    from edgepress.models.data import Data, Rows, key_of

    workload = ep.load(model)
    if len(workload.data.train):
        train = workload.data.train
        full = train.pick([row for row, length in enumerate(train.lengths) if length == TOKENS]).take(rows)
    else:
        ids = list(np.random.default_rng(0).integers(3, 128, size=(rows, TOKENS)))
        full = Rows({"input_ids": ids}, np.arange(rows) % 2, tuple(key_of(row) for row in ids))
    assert len(full) == rows, f"{model} has {len(full)} rows of {TOKENS} tokens; {rows} are needed"
    return replace(workload, data=Data(full, full, full))


def work(what: str, model: str, rows: int, threads: int) -> dict[str, Any]:
    """One figure, in this process."""
    import torch
    from edgepress.compress import score as scores

    torch.set_num_threads(threads)
    workload = loaded(model, rows)
    begin = time.perf_counter()
    if what == "step":
        (batch,) = workload.data.calibration.batches(rows)
        workload.losses(batch).sum().backward()
    elif what == "score":
        scores.score_all(workload, scores.cheap(), rows=rows)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_rss_bytes": peak, "params": workload.params}


def elsewhere(what: str, model: str, rows: int, threads: int) -> dict[str, Any]:
    """One figure, in a fresh process."""
    argv = [sys.executable, __file__, "--work", what, "--model", model, "--rows", str(rows), "--threads", str(threads)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)  # noqa: S603 - this very file
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def study(model: str, threads: int, repeat: int) -> dict[str, Any]:
    from edgepress.benchmarks.environment import fingerprint
    from edgepress.compress import score as scores
    from edgepress.compress.score.evidence import BATCH

    name = f"{Path(__file__).stem}:stack"
    cases = [("score", model, rows) for rows in ROWS] + [("score", f"{name}{layers}", 128) for layers in LAYERS]
    cases += [("load", model, BATCH), ("step", model, BATCH), ("step", model, 32)]
    taken: dict[tuple[str, str, int], list[dict[str, Any]]] = {case: [] for case in cases}
    for number in range(repeat):
        for what, of, rows in cases:
            print(f"repetition {number + 1} of {repeat}: {what} {of}, {rows} rows", file=sys.stderr)
            taken[what, of, rows].append(elsewhere(what, of, rows, threads))

    def middle(case: tuple[str, str, int], figure: str) -> float:
        return float(median(one[figure] for one in taken[case]))

    by_rows = [{"rows": rows, "seconds": middle(("score", model, rows), "seconds")} for rows in ROWS]
    by_params = [
        {"params": taken[case][0]["params"], "seconds": middle(case, "seconds")}
        for case in (("score", f"{name}{layers}", 128) for layers in LAYERS)
    ]
    memory = {
        f"{what} {rows}": middle((what, model, rows), "peak_rss_bytes")
        for what, of, rows in cases
        if of == model and (what != "score" or rows in {ROWS[0], ROWS[-1]})
    }
    return {
        "model": model,
        "methods": list(scores.cheap()),
        "tokens": TOKENS,
        "repetitions": repeat,
        "by_rows": by_rows,
        "by_params": by_params,
        "peak_rss_bytes": memory,
        "environment": fingerprint(threads),
    }


def charts(found: dict[str, Any], folder: Path) -> None:
    """Time against rows and against parameters, each with its straight line."""
    from edgepress.benchmarks.charts import growth, standalone

    title = f"{len(found['methods'])} scores together, {found['environment']['threads']} threads"
    for series, label, unit in (("rows", f"rows of {TOKENS} tokens", 1), ("params", "million parameters", 1e6)):
        entries = found[f"by_{series}"]
        xs, ys = [entry[series] / unit for entry in entries], [entry["seconds"] for entry in entries]
        picture = standalone(growth(xs, ys, label, "seconds", title))
        (folder / f"score-cost-{series}.svg").write_text(picture, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:minilm-reviews")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("-o", "--out", type=Path, default=Path("score-cost.json"))
    parser.add_argument("--charts", type=Path, help="folder for the pictures")
    parser.add_argument("--work", choices=WORKS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=512, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        sys.path.insert(0, str(Path(__file__).parent))
        print(json.dumps(work(given.work, given.model, given.rows, given.threads)))
        return
    found = study(given.model, given.threads, given.repeat)
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if given.charts:
        charts(found, given.charts)
    print(json.dumps({name: found[name] for name in ("by_rows", "by_params", "peak_rss_bytes")}, indent=1))


if __name__ == "__main__":
    main()
