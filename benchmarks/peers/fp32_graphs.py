"""Is the baseline the strongest plain one? Every FP32 graph that ONNX Runtime users reach, against ours.

    python benchmarks/peers/fp32_graphs.py [--model zoo:minilm-reviews] [--target cpu:2] [-o result.json]

Measured interleaved in one process: the edgepress export in each graph form, the torch.onnx export of the same module
by tracing (``dynamo=False``), and that graph fused by onnxruntime.transformers (Attention, SkipLayerNormalization).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import edgepress as ep
import onnx
import torch
from edgepress.benchmarks import compare, load
from edgepress.benchmarks.peers.tools.onnxruntime import fuse
from edgepress.export import artifact as artifacts
from edgepress.export.artifact import Artifact
from edgepress.export.backends import onnx as backend
from edgepress.models.workload import Workload


def traced(workload: Workload, path: Path) -> None:
    """The graph by tracing; eager attention, which is the one that onnxruntime.transformers recognises."""
    module = workload.module.eval()
    for child in module.modules():
        if hasattr(child, "set_attn_implementation"):
            child.set_attn_implementation("eager")  # type: ignore[operator]
    inputs = workload.input_axes
    example = tuple(workload.example[name] for name in inputs)
    axes = {name: {place: axis.name for place, axis in of_input.items()} for name, of_input in inputs.items()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        names = list(axes)
        torch.onnx.export(
            module, example, path, dynamo=False, input_names=names, output_names=["logits"], dynamic_axes=axes
        )


def fused(workload: Workload, source: Path, path: Path) -> None:
    """``source`` with the fusions of onnxruntime.transformers."""
    structure = workload.structure
    num_heads = structure.of_kind("head")[0].count
    fuse(source, path, family=structure.family, num_heads=num_heads, hidden_size=structure.hidden_size)


def variant(like: Artifact, name: str, graph: Path) -> Artifact:
    """``graph`` as an artifact with the inputs of ``like``."""
    counts = Counter(node.op_type for node in onnx.load(graph).graph.node)
    manifest = like.manifest.model_copy(
        update={
            "name": name,
            "model_file": graph.name,
            "operators": dict(sorted(counts.items())),
            "session": artifacts.Session(),
        }
    )
    return Artifact(graph.parent, artifacts.seal(graph.parent, manifest, {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:minilm-reviews")
    parser.add_argument("--target", default="cpu:2")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()

    workload = ep.load(options.model)
    with tempfile.TemporaryDirectory() as place:
        ours = ep.export(workload, Path(place) / "ours")
        plain = Path(place) / "traced" / "traced.onnx"
        fewer = Path(place) / "fused" / "fused.onnx"
        for path in (plain, fewer):
            path.parent.mkdir()
        traced(workload, plain)
        fused(workload, plain, fewer)
        candidates = [
            *(
                replace(
                    backend.in_form(ours, form),
                    manifest=backend.in_form(ours, form).manifest.model_copy(update={"name": f"edgepress, {form}"}),
                )
                for form in backend.FORMS
            ),
            variant(ours, "traced export", plain),
            variant(ours, "fused by onnxruntime.transformers", fewer),
        ]
        taken = load.benchmark(candidates, target=options.target, min_queries=options.queries, min_seconds=60)
        rows = compare.rows(taken)
        for row, candidate in zip(rows, candidates, strict=True):
            row["operators"] = candidate.manifest.operators
            row.pop("artifact")
    document = {"model": options.model, "rows": rows, "environment": dict(taken[0].environment)}
    for row in rows:
        ratio = f"{row['speedup']['value']:.2f}x" if row["speedup"] else "1.00x"
        print(f"{row['latency_ms']['p50']:7.2f} ms  {ratio}  {row['name']}")
    if options.out:
        options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
