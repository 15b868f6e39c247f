"""The two ends of the comparison of quantizers: the job that every tool is given, and the figures of what came back.

    python benchmarks/peers/run.py quantization …       does all of it; see there

``prepare`` writes the job folder (``tools/job.py``) of a model. ``measure`` opens the files of all tools in one
process: ``cosine`` is the mean, over evaluation rows, of that between what the last layer reads in the float model and
in the contender; ``drop`` is what is lost on the task, through the file; and for each shape and number of threads all
are timed interleaved, round by round in an order by chance. torchao's modules, which no other process can open, are
made here.

What is measured is kept, a file a figure, and not measured again by a run over the same files.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import onnx
import torch
from edgepress import files
from edgepress.benchmarks import compare, load, runner
from edgepress.benchmarks.environment import fingerprint
from edgepress.benchmarks.measurement import Measurement
from edgepress.benchmarks.peers.fp32_graphs import traced
from edgepress.benchmarks.peers.tools.job import slug
from edgepress.benchmarks.peers.torch_int8 import TorchContender, of_torchao
from edgepress.export.artifact import Artifact, open_artifact
from edgepress.models import metrics
from edgepress.models.workload import Workload
from numpy.typing import NDArray

Feeds = dict[str, NDArray[Any]]
SETS = 3
"""How often everything is opened anew for one cell: the same file is some per cent faster or slower by where in memory
it came to lie, and stays so for as long as it is open."""
TRACED = {"onnxruntime", "olive", "optimum_onnx"}
"""The tools that start from the traced graph, where values have other names."""


@dataclass(frozen=True)
class Contender:
    """A file, the runtime that it is for, what the runtime is told, and the value that its last layer reads."""

    name: str
    tool: str
    runtime: str
    model: Path
    inner: str
    disabled: tuple[str, ...] = ()
    seconds: float | None = None
    """That it took to make it."""

    def job(self) -> dict[str, Any]:
        return {"runtime": self.runtime, "model": str(self.model), "disabled_optimizers": list(self.disabled)}

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.model.parent.glob(f"{self.model.stem}.*"))

    def open(self, threads: int, feeds: Feeds) -> Callable[[], Any]:
        return runner.open_model(self.job(), threads, feeds)


# ---- the job


def prepare(model: str, folder: Path, *, rows: int, quick: bool) -> None:
    """Write the job of ``model`` into ``folder``, unless it is there."""
    if (folder / "job.json").exists():
        return
    workload = ep.load(model)
    if not (folder / "float").exists():
        ep.export(workload, folder / "float")
    (folder / "traced").mkdir(parents=True, exist_ok=True)
    traced(workload, folder / "traced" / "model.onnx")
    sample = workload.data.calibration.take(rows)
    arrays = {
        f"{row}/{name}": tensor.numpy()
        for row, batch in enumerate(sample.batches(1))
        for name, tensor in batch.inputs.items()
    }
    np.savez(folder / "rows.npz", **arrays)  # type: ignore[arg-type] # numpy's stub takes the arrays for its own option
    heads = workload.structure.of_kind("head")
    facts = {
        "model": model,
        "rows": len(sample),
        "quick": quick,
        "inputs": list(workload.input_axes),
        "family": workload.structure.family,
        "num_heads": heads[0].count if heads else 0,
        "hidden_size": workload.structure.hidden_size,
        "config": dict(workload.skeleton.config),
    }
    files.write_text(folder / "job.json", json.dumps(facts, default=str) + "\n")  # last: it says that all is there


# ---- the contenders


def contenders(job: Path, folders: Iterable[Path], also: Iterable[str]) -> list[Contender]:
    """Of all files that the tools have made, the float model first, and of the artifacts ``also``, NAME=FOLDER each."""
    inner = penultimate(onnx.load(job / "float" / "model.onnx"))
    of_traced = penultimate(onnx.load(job / "traced" / "model.onnx"))
    base = open_artifact(job / "float")
    found = [Contender("float", "edgepress", "onnx", base.model_file, inner, base.manifest.session.disabled_optimizers)]
    for folder in folders:
        tool = folder.name.partition("-")[0]
        for one in json.loads((folder / "contenders.json").read_text(encoding="utf-8"))["contenders"]:
            read = of_traced if tool in TRACED else inner
            path, disabled = (folder / one["model"]).resolve(), tuple(one["disabled"])
            found.append(Contender(one["name"], tool, one["runtime"], path, read, disabled, one["seconds"]))
    for name, _, made in (one.partition("=") for one in also):
        artifact = open_artifact(Path(made))
        runtime, disabled = artifact.manifest.runtime, artifact.manifest.session.disabled_optimizers
        read = penultimate(onnx.load(artifact.model_file)) if runtime == "onnx" else inner  # named alike
        found.append(Contender(name, "edgepress", runtime, artifact.model_file, read, disabled))
    return found


# ---- what they keep


def penultimate(graph: onnx.ModelProto) -> str:
    """The name of what the last product with a constant weight reads."""
    constants = {tensor.name for tensor in graph.graph.initializer}
    made = {name: node for node in graph.graph.node for name in node.output}
    node = made[graph.graph.output[0].name]
    while node.op_type not in {"MatMul", "Gemm"}:
        node = next(made[name] for name in node.input if name in made and name not in constants)
    return str(node.input[0])


def opened(contender: Contender | TorchContender, threads: int) -> Callable[[Feeds], list[NDArray[Any]]]:
    """What runs a contender and also returns what its last layer reads."""
    if isinstance(contender, TorchContender):
        return contender.read()
    if contender.runtime == "openvino":
        import openvino

        model = openvino.Core().read_model(contender.model)
        model.add_outputs(contender.inner)
        compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads})
        return lambda feeds: list(compiled(feeds).values())
    import onnxruntime

    graph = onnx.load(contender.model)
    graph.graph.output.append(onnx.helper.make_tensor_value_info(contender.inner, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, ["CPUExecutionProvider"], disabled_optimizers=list(contender.disabled)
    )
    return lambda feeds: session.run(None, feeds)


def answered(workload: Workload, contender: Contender | TorchContender) -> tuple[Any, NDArray[Any]]:
    """The answers to all evaluation rows, and what the last layer read, [rows, values]; rows go with others as long."""
    run = opened(contender, torch.get_num_threads())
    read: list[NDArray[Any]] = []

    def answer(feeds: Feeds) -> list[NDArray[Any]]:
        logits, value = run(feeds)
        read.append(value.reshape(len(logits), -1))
        return [logits]

    return metrics.session_answers(answer, workload), np.concatenate(read)


@dataclass(frozen=True)
class Judge:
    """Holds contenders against the float model on the evaluation rows."""

    workload: Workload
    original: Contender

    @cached_property
    def answers(self) -> tuple[Any, NDArray[Any]]:
        return answered(self.workload, self.original)

    def quality(self, contender: Contender | TorchContender) -> dict[str, float]:
        answers, values = self.answers if contender is self.original else answered(self.workload, contender)
        data, then = self.workload.data, self.answers[1]
        lengths = np.linalg.norm(values, axis=1) * np.linalg.norm(then, axis=1)
        wanted = metrics.wanted(data.evaluation, data.metric)
        judged = metrics.quality(data.metric, answers, wanted, original=self.answers[0])
        cosine = float(np.mean((values * then).sum(axis=1) / lengths))
        return {"cosine": cosine, "value": judged.value, "drop": judged.drop or 0.0}


# ---- the figures


def timed(  # noqa: PLR0917
    contenders: Sequence[Contender | TorchContender],
    base: Artifact,
    shape: tuple[int, int],
    threads: int,
    queries: int,
    seconds: float,
) -> list[Measurement]:
    feeds = load.arbitrary(base, *shape)
    samples: list[list[int]] = [[] for _ in contenders]
    for _ in range(SETS):
        runs = [contender.open(threads, feeds) for contender in contenders]
        taken = runner.interleaved(runs, -(-queries // SETS), seconds * len(runs) / SETS)
        for so_far, more in zip(samples, taken, strict=True):
            so_far.extend(more)
    environment = fingerprint(threads)
    return [
        Measurement(
            name=contender.name,
            artifact=contender.name,
            target=f"cpu:{threads}",
            precision="",
            params=base.manifest.params,
            macs=base.manifest.macs,
            size_bytes=contender.size_bytes,
            load_ms=None,
            peak_rss_bytes=None,
            batch=shape[0],
            sequence=shape[1],
            samples_ms=tuple(ns / 1e6 for ns in taken),
            environment=environment,
        )
        for contender, taken in zip(contenders, samples, strict=True)
    ]


def rows_of(taken: Sequence[Measurement], threads: int, batch: int, sequence: int) -> list[dict[str, Any]]:
    """A row for each contender; speedups are over the first."""
    rows: list[dict[str, Any]] = []
    for one in taken:
        faster = compare.speedup(taken[0], one) if one is not taken[0] else None
        row = {"name": one.name, "threads": threads, "batch": batch, "sequence": sequence}
        rows.append({**row, "p50": one.p50, "n": len(one.samples), "speedup": faster.to_json() if faster else None})
    return rows


def sizes(text: str, *, texts: bool) -> list[tuple[int, int]]:
    """``1x32,8x128`` as pairs of batch and tokens, ``1,8`` with 0 tokens; SystemExit where that does not fit."""
    found = []
    for part in text.split(","):
        numbers = [int(number) for number in part.split("x") if number.isdecimal()]
        if len(numbers) != 1 + texts or not all(numbers):
            raise SystemExit(f"'{part}' is not a shape: of texts write it like 1x32, of images like 8.")
        found.append((numbers[0], numbers[1] if texts else 0))
    return found


# ---- all of it


@dataclass(frozen=True)
class Kept:
    """Figures by name, each in a file below ``folder``."""

    folder: Path

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        path = self.folder / f"{slug(name)}.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write_text(path, json.dumps(make()) + "\n")
        return json.loads(path.read_text(encoding="utf-8"))


def measure(job: Path, folders: Sequence[Path], options: argparse.Namespace) -> dict[str, Any]:
    """The document of all contenders' figures: those that are kept, and the missing ones measured."""
    workload = ep.load(json.loads((job / "job.json").read_text(encoding="utf-8"))["model"])
    evaluation = workload.data.evaluation.take(options.evaluation)
    workload = replace(workload, data=replace(workload.data, evaluation=evaluation))
    base, kept = open_artifact(job / "float"), Kept(options.kept)
    found: list[Contender | TorchContender] = list(contenders(job, folders, options.also))
    failed: list[dict[str, str]] = []
    if not options.no_torchao:
        try:
            found += of_torchao(workload, job)
        except (ImportError, RuntimeError) as error:
            failed.append({"tool": "torchao", "why": str(error)})
    original = found[0]
    assert isinstance(original, Contender)
    judge, told, entered = Judge(workload, original), [], []
    for contender in found:
        try:
            figures = kept.get(f"quality {contender.name}", lambda: judge.quality(contender))  # noqa: B023
        except Exception as error:  # a file that does not run is a line of the result
            failed.append({"tool": contender.tool, "name": contender.name, "why": str(error).splitlines()[0]})
            continue
        entered.append(contender)
        facts = {"name": contender.name, "tool": contender.tool, "runtime": contender.runtime}
        told.append({**facts, "size_bytes": contender.size_bytes, "seconds": contender.seconds, **figures})
        say(f"{contender.name:52} {contender.size_bytes / 1e6:7.1f} MB  {figures}")
    document: dict[str, Any] = {"contenders": told, "failed": failed, "rows": []}
    texts = any(axis.name == "sequence" for of in workload.input_axes.values() for axis in of.values())
    shapes = sizes(options.shapes or ("1x32,1x128,8x32,8x128" if texts else "1,8"), texts=texts)
    cells = [(int(threads), *shape) for threads in options.threads.split(",") for shape in shapes]
    for number, (threads, batch, sequence) in enumerate(cells, 1):
        say(f"cell {number} of {len(cells)}: {threads} threads, {batch} x {sequence}")

        def cell(threads: int = threads, batch: int = batch, sequence: int = sequence) -> Any:
            taken = timed(entered, base, (batch, sequence or 1), threads, options.queries, options.seconds)
            return {
                "rows": rows_of(taken, threads, batch, sequence),
                "environment": dict(taken[0].environment),
            }

        measured = kept.get(f"time {SETS} {threads} {batch} {sequence} {options.queries} {options.seconds}", cell)
        document["rows"] += measured["rows"]
        document["environment"] = measured["environment"]
        for row in measured["rows"]:
            ratio = f"{row['speedup']['value']:.2f}x" if row["speedup"] else "1.00x"
            say(f"{row['p50']:8.3f} ms {ratio}  {row['name']}")
    return document


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare")
    first.add_argument("job", type=Path)
    first.add_argument("--model", required=True)
    first.add_argument("--rows", type=int, required=True)
    first.add_argument("--quick", action="store_true")
    second = commands.add_parser("measure")
    second.add_argument("job", type=Path)
    second.add_argument("folders", type=Path, nargs="+", help="of the tools, called TOOL-DIGEST")
    second.add_argument("--kept", type=Path, required=True, help="where figures are kept")
    second.add_argument("--shapes")
    second.add_argument("--threads", required=True)
    second.add_argument("--evaluation", type=int, required=True)
    second.add_argument("--queries", type=int, required=True)
    second.add_argument("--seconds", type=float, required=True)
    second.add_argument("--also", action="append", default=[])
    second.add_argument("--no-torchao", action="store_true")
    second.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.command == "prepare":
        prepare(options.model, options.job, rows=options.rows, quick=options.quick)
        return
    document = measure(options.job, options.folders, options)
    files.write_text(options.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
