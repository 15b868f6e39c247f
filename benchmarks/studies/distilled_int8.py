"""What training with rounding in the loop wins: the answers of INT8 files before and after, beside the original's.

    python benchmarks/studies/distilled_int8.py [--model zoo:minilm-reviews] [--schemes int8,int8-dynamic] [--steps 80]
        [--ratio 0.5] -o result.json

Each scheme is written as it is planned and as it is trained, and all are judged through their files on the same
evaluation rows: the mean of KL(original || file) over rows, and the metric with its paired drop from the original. With
``--ratio`` the model is pruned and reconstructed first; the original stays the one that answers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import torch
from edgepress import files
from edgepress.benchmarks.environment import fingerprint
from edgepress.compress import quantize as quantizers
from edgepress.compress.prune.reconstruct import reconstruct
from edgepress.compress.quantize.distilled import distilled
from edgepress.export.backends import onnx
from edgepress.models import metrics
from edgepress.models.workload import Workload
from edgepress.plan import QuantizationPlan


def judged(workload: Workload, plan: QuantizationPlan, original: Any, judge: Workload) -> dict[str, Any]:
    """What the file of ``workload`` in ``plan`` answers to the evaluation rows of ``judge``."""
    rows, metric = judge.data.evaluation, judge.data.metric
    with tempfile.TemporaryDirectory() as folder:
        artifact = onnx.write(workload, plan, Path(folder) / "artifact")
        with onnx.open_session(artifact, threads=torch.get_num_threads()) as session:
            answers = metrics.session_answers(session.run, judge)
        size = artifact.size_bytes
    ours, theirs = (torch.log_softmax(torch.from_numpy(np.asarray(one)), dim=-1) for one in (answers, original))
    distance = float((theirs.exp() * (theirs - ours)).sum(dim=-1).mean())
    quality = asdict(metrics.quality(metric, answers, metrics.wanted(rows, metric), original=original))
    return {"kl": distance, "size_bytes": size, "quality": quality}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:minilm-reviews")
    parser.add_argument("--schemes", default="int8,int8-dynamic")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--ratio", type=float, help="prune by this share first")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    whole = ep.load(options.model)
    small = whole
    if options.ratio:
        small = reconstruct(whole, ep.prune(whole, ep.score(whole), ratio=options.ratio))
    original = metrics.answers(whole, whole.data.evaluation, metric=whole.data.metric)
    asked = {name: value for name, value in vars(options).items() if name != "out"}
    document: dict[str, Any] = {**asked, "environment": fingerprint(torch.get_num_threads())}
    document["rows"] = [{"scheme": "fp32", "steps": 0, **judged(small, QuantizationPlan("fp32"), original, whole)}]
    for scheme in options.schemes.split(","):
        plan = quantizers.quantize(small, scheme)
        document["rows"].append({"scheme": scheme, "steps": 0, **judged(small, plan, original, whole)})
        begin = time.perf_counter()
        trained = distilled(small, plan, original=whole, steps=options.steps)
        seconds = time.perf_counter() - begin
        found = judged(trained.workload, trained.plan, original, whole)
        document["rows"].append({"scheme": scheme, "steps": options.steps, "seconds": seconds, **found})
        files.write_text(options.out, json.dumps(document, indent=1) + "\n")
        for row in document["rows"][-2:]:
            print(
                f"{scheme} after {row['steps']} steps: KL {row['kl']:.2e}, drop {row['quality']['drop']:+.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
