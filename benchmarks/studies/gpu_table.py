"""The table of :mod:`.gpu`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def table(document: Mapping[str, Any]) -> str:
    """The rows as Markdown, a table for each model."""
    where = document["environment"]
    libraries = ", ".join(f"{name} {number}" for name, number in where["packages"].items())
    lines = [
        f"# On {where['gpu']}",
        "",
        f"Driver {where.get('driver_version', 'unknown')}, CUDA {where['cuda']}; {libraries}. Made by "
        f"`benchmarks/studies/gpu.py`. {document.get('note', '')}".rstrip(),
        "",
        "A latency is the median of single inferences that are waited for, in ms, with inputs and outputs on the GPU; "
        "in brackets with the copies from and to the host. The ratio is the speedup over the fastest 16-bit form of "
        "the original in PyTorch at the same batch, with its 95 % interval. Cosine and largest relative error are of "
        "logits against PyTorch eager in FP32.",
    ]
    for model in dict.fromkeys(row["model"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["model"] == model]
        quality = {row["name"]: row["quality"] for row in rows if row.get("quality")}
        sequence = next(row["sequence"] for row in rows)
        lines += ["", f"## {model}{f', {sequence} tokens' if sequence else ''}", ""]
        lines += ["| variant | batch | ms | rows/s | ratio | quality | cosine | error | MB |", "|" + " --- |" * 9]
        for row in (row for row in rows if "latency_ms" in row):
            faster, judgement = row["speedup"], quality.get(row["name"])
            ratio = f"{faster['value']:.2f} ({faster['low']:.2f} to {faster['high']:.2f})" if faster else "1"
            shown = f"{judgement['value']:.2f} ({judgement['low']:.2f} to {judgement['high']:.2f})" if judgement else ""
            lines.append(
                f"| {row['name']} | {row['batch']} | {row['latency_ms']['p50']:.3f} "
                f"({row['with_copies_ms']['p50']:.3f}) | {row['rows_per_second']:,.0f} | {ratio} | {shown} | "
                f"{row['parity']['cosine']:.4f} | {row['parity']['max_rel']:.1e} | {row['size_bytes'] / 1e6:.1f} |"
            )
        missing: dict[str, list[str]] = {}
        for row in (row for row in rows if "reason" in row):
            missing.setdefault(row["reason"], []).append(f"{row['name']} at {row['batch']}")
        lines += ["", *(f"- Not there: {', '.join(names)}. {why}" for why, names in missing.items())]
    return "\n".join(lines).rstrip() + "\n"
