"""What rotation brings: the same schemes with and without it, judged through the ONNX file.

    python benchmarks/studies/rotation.py [--model zoo:llama-stdlib] [--schemes int8-dynamic,int4:rtn]
        [--forms none,values,all] [--seeds 3] [--evaluation 300] [-o result.json]
    python benchmarks/studies/rotation.py --table result.json …

``values`` turns what attentions mix alone, ``all`` the residual stream too, for which a table that is also the output
layer becomes two. Each is drawn with several seeds. ``kl`` is that of the answers from those of the float file, in
nats; the drop is of the data's own metric, with its paired interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import edgepress as ep
import torch
from edgepress.compress import quantize as quantizers
from edgepress.compress.quantize import sensitivity
from edgepress.compress.quantize.rotate import rotation
from edgepress.errors import ParityError
from edgepress.export.artifact import Artifact
from edgepress.export.backends import onnx as backend
from edgepress.models import metrics
from edgepress.models.dequantize import dequantized
from edgepress.models.workload import Workload
from edgepress.plan import QuantizationPlan

SCHEMES = "int8-dynamic,int8,int8-weight,int4:rtn,int4:hqq,int4:gptq"
FORMS = "none,values,all"
CALIBRATION = 32
"""Rows that ranges and smoothing are found on in PyTorch; in files all 128."""


def planned(workload: Workload, scheme: str, form: str, seed: int, **options: Any) -> QuantizationPlan:
    """The plan of ``scheme``, ``int4:rtn`` for a method of one, under a rotation."""
    name, _, method = scheme.partition(":")
    options |= {"method": method} if method else {}
    if form == "none":
        return quantizers.quantize(workload, name, **options)
    state = rotation(workload, untie=form == "all", stream=form == "all", seed=seed).state
    turned = dequantized(workload, QuantizationPlan("fp32", state=state))
    return quantizers.under(state, quantizers.quantize(turned, name, **options))


def answers(artifact: Artifact, workload: Workload) -> Any:
    with backend.open_session(artifact, threads=torch.get_num_threads()) as session:
        return metrics.session_answers(session.run, workload)


def results(workload: Workload, schemes: list[str], forms: list[str], seeds: int) -> Iterator[dict[str, Any]]:
    rows, metric = workload.data.evaluation, workload.data.metric
    nearness = "token-agreement" if workload.task.by_token else "kl"
    with tempfile.TemporaryDirectory() as place:
        base = ep.export(workload, Path(place) / "float")
        wanted = answers(base, workload)
        for scheme in schemes:
            for form in forms:
                for seed in range(seeds if form != "none" else 1):
                    folder = Path(place) / f"{scheme}-{form}-{seed}".replace(":", "-")
                    row: dict[str, Any] = {"scheme": scheme, "form": form, "seed": seed}
                    try:
                        made = backend.write(workload, planned(workload, scheme, form, seed), folder, base=base)
                    except ParityError as error:
                        yield {**row, "failed": str(error)}
                        continue
                    found = answers(made, workload)
                    judged = metrics.quality(metric, found, metrics.wanted(rows, metric), original=wanted)
                    near = metrics.quality(nearness, found, None, original=wanted)
                    yield {**row, "size_bytes": made.size_bytes, "quality": asdict(judged), "fidelity": asdict(near)}


def distances(workload: Workload, schemes: list[str], forms: list[str], seeds: int) -> Iterator[dict[str, Any]]:
    """The same in PyTorch, for integer schemes, in a fraction of the time."""
    data = workload.data
    judged = replace(workload, data=replace(data, calibration=data.evaluation))
    trials = sensitivity.Trials(judged, rows=len(data.evaluation), seed=0)
    for scheme in schemes:
        options: dict[str, Any] = {"correct_bias": False, "rows": CALIBRATION} if scheme == "int8" else {}
        for form in forms:
            for seed in range(seeds if form != "none" else 1):
                plan = planned(workload, scheme, form, seed, **options)
                yield {"scheme": scheme, "form": form, "seed": seed, "kl": trials.distance(plan, list(plan.weights))}


def table(documents: list[Mapping[str, Any]]) -> str:
    """Markdown: medians over seeds, with the least and the greatest."""
    lines = ["| model | scheme | rotated | MB | fidelity | lost |", "|" + " --- |" * 6]
    for document in documents:
        groups: dict[tuple[str, str], list[Any]] = {}
        for row in document["rows"]:
            groups.setdefault((row["scheme"], row["form"]), []).append(row)
        for (scheme, form), rows in groups.items():
            begin = f"| {document['model']} | {scheme.replace(':', ', ')} | {form} |"
            if "kl" in rows[0]:
                lines.append(f"{begin} | {_spread([row['kl'] for row in rows], '.2e')} | |")
                continue
            if any("failed" in row for row in rows):
                lines.append(f"{begin} | parity fails | |")
                continue
            parts = [[row["fidelity"]["value"] for row in rows], [row["quality"]["drop"] for row in rows]]
            shown = [_spread(part, digits) for part, digits in zip(parts, (".3g", "+.3f"), strict=True)]
            lines.append(f"{begin} {rows[0]['size_bytes'] / 1e6:.2f} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _spread(values: list[float], digits: str) -> str:
    middle = format(statistics.median(values), digits)
    return middle if len(values) == 1 else f"{middle} [{min(values):{digits}}, {max(values):{digits}}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:llama-stdlib")
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--forms", default=FORMS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluation", type=int, default=300)
    parser.add_argument("--pytorch", action="store_true", help="by fake quantization, no files")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument(
        "--table", type=Path, nargs="+", help="print the Markdown of these results, and measure nothing"
    )
    options = parser.parse_args()
    if options.table:
        print(table([json.loads(path.read_text(encoding="utf-8")) for path in options.table]))
        return
    warnings.simplefilter("ignore")
    workload = ep.load(options.model)
    evaluation = workload.data.evaluation.take(options.evaluation)
    workload = replace(workload, data=replace(workload.data, evaluation=evaluation))
    document: dict[str, Any] = {"model": options.model, "metric": workload.data.metric, "rows": []}
    found = (distances if options.pytorch else results)(
        workload, options.schemes.split(","), options.forms.split(","), options.seeds
    )
    for row in found:
        document["rows"].append(row)
        told = (
            f"{row['kl']:.2e} nats"
            if "kl" in row
            else row.get("failed") or f"{row['fidelity']['value']:.3g}, {row['quality']['drop']:+.3f} lost"
        )
        print(f"{row['scheme']} {row['form']} {row['seed']}: {told}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
