"""Post-training quantization: edgepress, ONNX Runtime's tools, NNCF on OpenVINO, and torchao, on one machine.

    python benchmarks/peers/quantization.py [--model zoo:minilm-reviews] [--shapes 1x32,1x128,8x32,8x128]
        [--threads 1,2] [--also NAME=FOLDER] [-o result.json]        with nncf, openvino and, if any, torchao installed
    python benchmarks/peers/quantization.py --model zoo:vit-fashion --shapes 1,8    images: how many at a time

Every contender gets the same float model and the same calibration rows. For each shape and number of threads all of
them are measured in one process, interleaved round by round. ``cosine`` is the mean, over evaluation rows, of that
between what the last layer reads in the float model and in the contender; ``drop`` is what is lost on the task, through
the file. ``--also`` takes an artifact of the same model that is pruned too. The tools of ONNX Runtime are given the
graph that they do best on: exported by tracing, with eager attention.

Peers: onnxruntime.quantization (quantize_dynamic, quantize_static), onnxruntime.transformers, nncf.quantize, and
torchao.quantization.quantize_ in PyTorch, eager and compiled.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import onnx
import torch
from edgepress.benchmarks import compare, load, runner
from edgepress.benchmarks.environment import fingerprint
from edgepress.benchmarks.measurement import Measurement
from edgepress.benchmarks.peers.fp32_graphs import fused, traced
from edgepress.benchmarks.peers.torch_int8 import TorchContender, of_torchao
from edgepress.compress import quantize as quantizers
from edgepress.export.artifact import Artifact, open_artifact
from edgepress.export.backends import onnx as backend
from edgepress.export.backends import openvino as openvino_backend
from edgepress.models import metrics
from edgepress.models.workload import Workload
from numpy.typing import NDArray

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Contender:
    """A file, the runtime that it is for, and what the runtime is told."""

    name: str
    runtime: str
    model: Path
    disabled: tuple[str, ...] = ()

    def job(self) -> dict[str, Any]:
        return {"runtime": self.runtime, "model": str(self.model), "disabled_optimizers": list(self.disabled)}

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.model.parent.glob(f"{self.model.stem}.*"))

    def open(self, threads: int, feeds: Feeds) -> Callable[[], Any]:
        return runner.open_model(self.job(), threads, feeds)


# ---- the contenders


def calibration(workload: Workload, rows: int, length: int | None = None) -> Iterator[Feeds]:
    """One row after the other, as long as it is, or cut and padded to ``length``."""
    taken = workload.data.calibration.take(rows)
    for batch in taken.batches(1):
        feeds = {name: tensor.numpy() for name, tensor in batch.inputs.items()}
        if length and "input_ids" in feeds:
            feeds = {n: np.pad(a[:, :length], ((0, 0), (0, max(0, length - a.shape[1])))) for n, a in feeds.items()}
        yield feeds


def of_onnxruntime(workload: Workload, folder: Path, rows: int) -> Iterator[Contender]:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Rows(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, length: int | None) -> None:
            self.feeds = calibration(workload, rows, length)

        def get_next(self) -> Feeds | None:
            return next(self.feeds, None)

    def place(name: str) -> Path:
        made = folder / name.replace(" ", "-").replace(",", "") / "model.onnx"
        made.parent.mkdir(parents=True)
        return made

    graphs = {"traced": place("traced")}
    traced(workload, graphs["traced"])
    if workload.structure.of_kind("head"):
        graphs["fused"] = place("fused")
        fused(workload, graphs["traced"], graphs["fused"])
    for graph, source in graphs.items():
        for per_channel in (False, True):
            name = f"ORT dynamic, {graph}, per {'channel' if per_channel else 'tensor'}"
            path = place(name)
            # shape inference ends at operators outside the standard, as the fused graph has
            more = {"DefaultTensorType": onnx.TensorProto.FLOAT}
            quantize_dynamic(source, path, per_channel=per_channel, weight_type=QuantType.QInt8, extra_options=more)
            yield Contender(name, "onnx", path)
            if graph == "traced" and per_channel:  # what one switch of the runtime gives
                yield Contender(f"{name}, no skip-LayerNorm", "onnx", path, ("SkipLayerNormFusion",))
    products = ["MatMul", "Gemm"]
    for method in ("MinMax", "Percentile", "Entropy"):
        for operators in (products, None) if method == "MinMax" else (products,):
            name = f"ORT static, {method}, {'products' if operators else 'all operators'}"
            path = place(name)
            try:
                quantize_static(
                    graphs["traced"],
                    path,
                    # the histograms of percentile and entropy fail on lengths that vary
                    Rows(None if method == "MinMax" else 128),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=operators,
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    calibrate_method=getattr(CalibrationMethod, method),
                )
            except Exception as error:  # a peer that fails is a line of the table
                print(f"{name}: failed, {str(error).splitlines()[0]}", flush=True)
                continue
            yield Contender(name, "onnx", path)


def of_openvino(workload: Workload, base: Artifact, folder: Path, rows: int) -> Iterator[Contender]:
    import nncf
    import openvino

    def place(name: str, model: Any) -> Contender:
        path = folder / name.replace(" ", "-").replace(",", "") / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=False)
        return Contender(name, "openvino", path)

    yield place("OpenVINO float", openvino.convert_model(base.model_file))
    for name, kind in (("NNCF", None), ("NNCF, transformer", nncf.ModelType.TRANSFORMER)):
        data = nncf.Dataset(list(calibration(workload, rows)))
        model = openvino.convert_model(base.model_file)
        yield place(name, nncf.quantize(model, data, model_type=kind, subset_size=rows))


def of_edgepress(workload: Workload, base: Artifact, folder: Path, rows: int) -> Iterator[Contender]:
    settings: Mapping[str, dict[str, Any]] = {
        "int8-dynamic": {},
        "int8": {"rows": rows},
        "int8, folded": {"rows": rows, "smooth": "folded"},
        "int8, mse": {"rows": rows, "observer": "mse"},
    }
    for name, options in settings.items():
        plan = quantizers.quantize(workload, name.split(",", maxsplit=1)[0], **options)
        written = backend.write(workload, plan, folder / name.replace(", ", "-"), base=base)
        yield Contender(f"edgepress {name}", "onnx", written.model_file, written.manifest.session.disabled_optimizers)
        if name == "int8":  # the same plan on the other runtime
            written = openvino_backend.write(workload, plan, folder / f"{name}-openvino", base=base)
            yield Contender(f"edgepress {name}, OpenVINO", "openvino", written.model_file)


# ---- what they keep


def penultimate(graph: onnx.ModelProto) -> str:
    """The name of what the last product with a constant weight reads."""
    constants = {tensor.name for tensor in graph.graph.initializer}
    made = {name: node for node in graph.graph.node for name in node.output}
    node = made[graph.graph.output[0].name]
    while node.op_type not in {"MatMul", "Gemm"}:
        node = next(made[name] for name in node.input if name in made and name not in constants)
    return str(node.input[0])


def opened(contender: Contender | TorchContender, inner: str, threads: int) -> Callable[[Feeds], list[NDArray[Any]]]:
    """What runs a contender and also returns the value ``inner``."""
    if isinstance(contender, TorchContender):
        return contender.read()
    if contender.runtime == "openvino":
        import openvino

        model = openvino.Core().read_model(contender.model)
        model.add_outputs(inner)
        compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": threads})
        return lambda feeds: list(compiled(feeds).values())
    import onnxruntime

    graph = onnx.load(contender.model)
    graph.graph.output.append(onnx.helper.make_tensor_value_info(inner, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, ["CPUExecutionProvider"], disabled_optimizers=list(contender.disabled)
    )
    return lambda feeds: session.run(None, feeds)


def quality(
    workload: Workload, contenders: Sequence[Contender | TorchContender], inners: Sequence[str]
) -> list[dict[str, float]]:
    """The cosine to the first contender and the drop from it, of each; rows are batched with others as long."""
    data, results, first = workload.data, [], None
    for contender, inner in zip(contenders, inners, strict=True):
        run = opened(contender, inner, torch.get_num_threads())
        read: list[NDArray[Any]] = []

        def answer(feeds: Feeds, run: Any = run, read: list[Any] = read) -> list[NDArray[Any]]:
            logits, value = run(feeds)
            read.append(value.reshape(len(logits), -1))
            return [logits]

        answers = metrics.session_answers(answer, workload)
        values = np.concatenate(read)
        first = first or (answers, values)
        lengths = np.linalg.norm(values, axis=1) * np.linalg.norm(first[1], axis=1)
        wanted = metrics.wanted(data.evaluation, data.metric)
        judged = metrics.quality(data.metric, answers, wanted, original=first[0])
        cosine = float(np.mean((values * first[1]).sum(axis=1) / lengths))
        results.append({"cosine": cosine, "value": judged.value, "drop": judged.drop or 0.0})
    return results


# ---- the table


def timed(  # noqa: PLR0917
    contenders: Sequence[Contender | TorchContender],
    base: Artifact,
    shape: tuple[int, int],
    threads: int,
    queries: int,
    seconds: float,
) -> list[Measurement]:
    feeds = load.arbitrary(base, *shape)
    runs = [contender.open(threads, feeds) for contender in contenders]
    samples = runner.interleaved(runs, queries, seconds * len(runs))
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


def table(document: Mapping[str, Any]) -> str:
    """The result as Markdown: a line for each contender, and of each shape its speedup with the interval."""
    shapes = list(dict.fromkeys((row["threads"], row["batch"], row["sequence"]) for row in document["rows"]))
    heads = [
        f"{threads} thread{'s' * (threads > 1)}, {batch}{f' x {length}' if length else ''}"
        for threads, batch, length in shapes
    ]
    lines = [f"| | MB | cosine | points lost | {' | '.join(heads)} |", "|" + " --- |" * (4 + len(heads))]
    rows = {(row["name"], (row["threads"], row["batch"], row["sequence"])): row["speedup"] for row in document["rows"]}
    for one in document["contenders"]:
        faster = [rows[one["name"], shape] for shape in shapes]
        shown = [
            f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "1" for ratio in faster
        ]
        kept = f"{one['size_bytes'] / 1e6:.1f} | {one['cosine']:.4f} | {one['drop']:+.2f}"
        lines.append(f"| {one['name']} | {kept} | {' | '.join(shown)} |")
    return "\n".join(lines)


def sizes(text: str, *, texts: bool) -> list[tuple[int, int]]:
    """``1x32,8x128`` as pairs of batch and tokens, ``1,8`` with 0 tokens; SystemExit where that does not fit."""
    found = []
    for part in text.split(","):
        numbers = [int(number) for number in part.split("x") if number.isdecimal()]
        if len(numbers) != 1 + texts or not all(numbers):
            raise SystemExit(f"'{part}' is not a shape: of texts write it like 1x32, of images like 8.")
        found.append((numbers[0], numbers[1] if texts else 0))
    return found


def everyone(
    workload: Workload, base: Artifact, folder: Path, options: argparse.Namespace
) -> tuple[list[Contender | TorchContender], list[str]]:
    """The contenders, the float model first, and the name of what the last layer reads in each one's file."""
    inner = penultimate(onnx.load(base.model_file))
    contenders: list[Contender | TorchContender] = [Contender("float", "onnx", base.model_file)]
    contenders += of_edgepress(workload, base, folder, options.rows)
    contenders += of_openvino(workload, base, folder, options.rows)
    try:
        contenders += of_torchao(workload, folder)
    except ImportError as error:
        print(f"torchao: not installed ({error})", flush=True)
    inners = [inner] * len(contenders)
    for name, _, made in (one.partition("=") for one in options.also):
        artifact = open_artifact(Path(made))
        runtime, disabled = artifact.manifest.runtime, artifact.manifest.session.disabled_optimizers
        contenders.append(Contender(name, runtime, artifact.model_file, disabled))
        inners.append(penultimate(onnx.load(artifact.model_file)) if runtime == "onnx" else inner)  # named alike
    if not options.no_ort_tools:
        peers = list(of_onnxruntime(workload, folder, options.rows))
        inners += [penultimate(onnx.load(folder / "traced" / "model.onnx"))] * len(peers)
        contenders += peers
    return contenders, inners


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:minilm-reviews")
    parser.add_argument("--shapes", help="batch x tokens; of images batches alone (1x32,1x128,8x32,8x128; 1,8)")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rows", type=int, default=128, help="of calibration")
    parser.add_argument("--evaluation", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each contender at each shape, at most")
    parser.add_argument("--no-ort-tools", action="store_true", help="leave out what ONNX Runtime's tools make")
    parser.add_argument("--also", metavar="NAME=FOLDER", action="append", default=[], help="an artifact, measured too")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--table", type=Path, help="print the Markdown of this result, and measure nothing")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    warnings.simplefilter("ignore")

    workload = ep.load(options.model)
    texts = any(axis.name == "sequence" for of in workload.input_axes.values() for axis in of.values())
    shapes = sizes(options.shapes or ("1x32,1x128,8x32,8x128" if texts else "1,8"), texts=texts)
    evaluation = workload.data.evaluation.take(options.evaluation)
    workload = replace(workload, data=replace(workload.data, evaluation=evaluation))
    document: dict[str, Any] = {"model": options.model, "contenders": [], "rows": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = ep.export(workload, folder / "base")
        contenders, inners = everyone(workload, base, folder, options)
        kept = quality(workload, contenders, inners)
        for contender, figures in zip(contenders, kept, strict=True):
            document["contenders"].append({"name": contender.name, "size_bytes": contender.size_bytes, **figures})
            print(f"{contender.name:52} {contender.size_bytes / 1e6:7.1f} MB  {figures}", flush=True)
        for threads in map(int, options.threads.split(",")):
            for batch, sequence in shapes:
                shape = f"{batch}x{sequence}" if sequence else str(batch)
                taken = timed(contenders, base, (batch, sequence or 1), threads, options.queries, options.seconds)
                for one in taken:
                    faster = compare.speedup(taken[0], one) if one is not taken[0] else None
                    row: dict[str, Any] = {"name": one.name, "threads": threads, "batch": batch, "sequence": sequence}
                    row |= {"p50": one.p50, "speedup": faster.to_json() if faster else None}
                    document["rows"].append(row)
                    ratio = f"{faster.value:.2f}x" if faster else "1.00x"
                    print(f"{threads} threads {shape:6} {one.p50:8.3f} ms {ratio}  {one.name}", flush=True)
                document["environment"] = dict(taken[0].environment)
                if options.out:
                    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
