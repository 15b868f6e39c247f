"""An ONNX file from anywhere, in fewer bits: its nodes take the place of modules, an ``.npz`` that of a workload.

Products with constant weights get the same integer kernels as our own exports, with smoothing searched on the graph's
own tensors. Where most weights are in convolutions, ONNX Runtime's quantizer does all of it: what a chain of those
needs is in that tool. Whatever is left in float is named in what is returned.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from .compress.quantize import blocks
from .compress.quantize.choice import LARGE
from .compress.quantize.smoothquant import Sample, best
from .errors import InputError, ParityError, UsageError
from .export import attention, nbits, placement
from .export.backends.onnx import quantize_graph, without_advice
from .export.placement import Product
from .files import write_bytes
from .models.workload import Progress
from .plan import QuantizationPlan

SCHEMES = ("int8", "int8-dynamic", "int8-weight")
SMALL = 1 << 10
"""Products with fewer weights stay in float: nothing is gained by them."""
BATCH, LENGTH, MOST_ROWS = 8, 16, 256
LEAST_COSINE = 0.9
"""Of an output with that in float: below it the file is broken, as in :mod:`.export.parity`."""
BETWEEN = ("Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Add", "Concat")
"""What is in 8 bits beside products where convolutions are, so that those hand on what they have in 8 bits."""
TOKENS = 512
"""Sampled of each tensor for the strength of its smoothing."""

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Agreement:
    """One output of the quantized file beside that of the original, over all rows that were run."""

    cosine: float
    max_abs: float


@dataclass(frozen=True)
class Quantized:
    path: Path
    scheme: str
    size_bytes: int
    float_bytes: int
    """Of the graph as it was read."""
    quantized: tuple[str, ...]
    """The nodes in fewer bits."""
    in_float: tuple[str, ...]
    """The products and convolutions that are not."""
    parity: Mapping[str, Agreement]
    """By output."""
    rows: int
    """Of the data that the outputs were compared on; 0 where it was made up."""
    shapes: tuple[tuple[int, ...], ...]


def quantize(
    source: Path, out: Path, scheme: str, *, data: Path | None = None, progress: Progress | None = None
) -> Quantized:
    """Write the ONNX file ``source`` to ``out`` in one of ``SCHEMES``, and compare the two.

    ``data`` is an ``.npz`` with an array for each input, a row along its first axis; ``int8`` calibrates on it. Raises
    UsageError for what does not go together, InputError for files that cannot be used and ParityError where an output
    becomes another, and writes nothing then.
    """
    if scheme not in SCHEMES:
        raise UsageError(f"An .onnx file cannot be quantized to '{scheme}' (it can: {', '.join(SCHEMES)}).")
    if out.suffix != ".onnx" or out.is_dir() or out.resolve() == source.resolve():
        raise UsageError(f"{out} is not another file that ends in .onnx; give one with -o.")
    tell = progress or (lambda done, total, note: None)
    graph = read(source)
    content = graph.SerializeToString()
    session, float_bytes = _session(content, source), len(content)
    feeds = list(batches(session, data)) if data else []
    if scheme == "int8" and not feeds:
        names = ", ".join(one.name for one in session.get_inputs())
        raise UsageError(f"int8 calibrates ranges on rows: give an .npz file with the arrays {names} with --data.")
    model = ir.from_proto(graph)
    named = {node.name or "": node for node in model.graph}
    heavy = {name: _size(node) for name, node in named.items() if node.op_type in {"MatMul", "Gemm", "Conv", "LSTM"}}
    of_convolutions = sum(size for name, size in heavy.items() if named[name].op_type == "Conv")
    tell(0, 0, "quantizing")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        if 2 * of_convolutions > sum(heavy.values()):
            if scheme != "int8":
                raise UsageError(f"Most weights of {source} are in convolutions, which have kernels for int8 alone.")
            _convolutional(graph, feeds, path)
            chosen = {name for name, size in heavy.items() if size}
        else:
            plan = _plan(model, scheme, source, feeds, tell)
            chosen = set(plan.weights)
            if scheme == "int8-weight":
                nbits.rewrite(graph, plan)
                onnx.save(graph, path)
            else:
                quantize_graph(graph, plan, path)
        content = path.read_bytes()
    made = _session(content, out)
    tell(0, 0, "comparing")
    compared = feeds or [_made_up(session, model)]
    parity = _agreement(session, made, compared)
    _check(parity, scheme, source)
    write_bytes(out, content)
    return Quantized(
        out,
        scheme,
        len(content),
        float_bytes,
        tuple(sorted(chosen)),
        tuple(name for name, size in heavy.items() if size and name not in chosen),
        parity,
        sum(len(next(iter(feed.values()))) for feed in feeds),
        tuple(sorted({tuple(next(iter(feed.values())).shape) for feed in compared})),
    )


# ---- reading


def read(source: Path) -> onnx.ModelProto:
    """The graph in ``source`` with constants folded, functions inlined and a name for each node, at the operator set
    that attention needs where it can be converted. Raises InputError where it is not an ONNX model in float."""
    import onnxscript.optimizer

    try:
        graph = onnx.load(source)
        onnx.checker.check_model(graph)
    except (OSError, DecodeError, onnx.checker.ValidationError, ValueError, TypeError) as error:
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"{source} cannot be read as an ONNX model: {said.rstrip('.')}.") from error
    if not graph.graph.node:
        raise InputError(f"{source} cannot be read as an ONNX model: it has no operators.")
    versions = {one.domain: one.version for one in graph.opset_import}
    if versions.get("", 0) < attention.OPSET:
        try:
            graph = onnx.version_converter.convert_version(graph, attention.OPSET)
        except Exception as error:  # the converter's C++ raises many kinds, where an operator has no adapter
            if versions.get("", 0) < 13:
                raise InputError(
                    f"{source} is written in operator set {versions.get('', 0)}, and cannot be converted to a newer "
                    f"one: {next(iter(str(error).splitlines()), type(error).__name__)}"
                ) from error
    for noisy in ("onnxscript", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    limit = 1 << 28
    graph = onnxscript.optimizer.optimize(graph, input_size_limit=limit, output_size_limit=limit)
    taken: set[str] = set()
    modules: set[str] = set()
    for number, node in enumerate(graph.graph.node):
        name = node.name or f"{node.op_type}_{number}"
        while name in taken | modules or placement.names(name)[1] in taken:  # a plan must not mean another node by it
            name = f"{name}_{number}".replace("/", ".")
        node.name = name
        taken.add(name)
        modules |= {*placement.names(name)} - {name}
    return graph


def _session(content: bytes, source: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own exceptions derive from Exception alone
        raise InputError(f"ONNX Runtime cannot load {source}: {str(error).splitlines()[0]}") from error


def _size(node: ir.Node) -> int:
    """How many constant weights a product has; 0 where it has none, or none in float."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor.size if tensor is not None and tensor.dtype == ir.DataType.FLOAT else 0


# ---- rows

TYPES = {"float": np.float32, "double": np.float64, "float16": np.float16, "bool": np.bool_}
TYPES |= {name: getattr(np, name) for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")}


def batches(session: Any, data: Path) -> Iterator[Feeds]:
    """The rows of an ``.npz`` as a session takes them, ``BATCH`` at a time or as many as its graph says."""
    try:
        with np.load(data, allow_pickle=False) as found:
            arrays = dict(found)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{data} cannot be read as an .npz file: {error}.") from error
    inputs = {one.name: one for one in session.get_inputs()}
    missing = [name for name in inputs if name not in arrays]
    if missing:
        held = ", ".join(arrays) or "nothing"
        raise InputError(f"{data} lacks the input '{missing[0]}' of the graph (it holds: {held}).")
    arrays = {name: _fitting(arrays[name], one, data) for name, one in inputs.items()}
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"The arrays of {data} have different numbers of rows: {counts}.")
    fixed = [one.shape[0] for one in inputs.values() if isinstance(one.shape[0], int)]
    size, count = (fixed or [BATCH])[0], min(MOST_ROWS, *counts.values())
    if count < (size if fixed else 1):
        raise InputError(f"{data} has {count} rows, and the graph takes {size} at a time.")
    for start in range(0, count - size + 1 if fixed else count, size):
        yield {name: array[start : start + size] for name, array in arrays.items()}


def _fitting(array: NDArray[Any], one: Any, data: Path) -> NDArray[Any]:
    """``array`` in the type of an input, whose other axes it must have."""
    dtype = TYPES.get(one.type.removeprefix("tensor(").removesuffix(")"))
    if dtype is None or not one.shape:
        raise InputError(f"The graph's input '{one.name}' is a {one.type} of shape {one.shape}, which has no rows.")
    wrong = array.ndim != len(one.shape) or any(
        isinstance(size, int) and place and array.shape[place] != size for place, size in enumerate(one.shape)
    )
    if wrong or not np.can_cast(array.dtype, dtype, "same_kind"):
        held = f"{array.dtype} {list(array.shape)}"
        raise InputError(f"'{one.name}' in {data} is {held}; the graph takes {np.dtype(dtype)} {one.shape}.")
    return np.ascontiguousarray(array, dtype=dtype)


def _made_up(session: Any, model: ir.Model) -> Feeds:
    """Two rows of noise; whole numbers are below the rows of the table that they look up, or 0 and 1."""
    random = np.random.default_rng(0)
    below = {}
    for node in model.graph:
        if node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[1] is not None:
            table = ir.convenience.get_const_tensor(node.inputs[0])
            if table is not None:
                below[node.inputs[1].name] = table.numpy().shape[0]
    feeds: Feeds = {}
    for one in session.get_inputs():
        dtype = np.dtype(TYPES.get(one.type.removeprefix("tensor(").removesuffix(")"), np.float32))
        free = (2, *[LENGTH] * len(one.shape))
        shape = [size if isinstance(size, int) else free[min(place, 1)] for place, size in enumerate(one.shape)]
        if dtype.kind == "f":
            feeds[one.name] = random.standard_normal(shape).astype(dtype)
        else:
            least = 1 if "mask" in one.name else 0
            feeds[one.name] = random.integers(least, max(below.get(one.name, 2), 2), size=shape).astype(dtype)
    return feeds


# ---- planning


@dataclass
class _Seen:
    """What calibration keeps of one tensor [tokens, channels]."""

    sample: Sample
    low: NDArray[np.float32] = field(default_factory=lambda: np.zeros(1, np.float32))
    high: NDArray[np.float32] = field(default_factory=lambda: np.zeros(1, np.float32))

    def add(self, x: NDArray[np.float32]) -> None:
        self.low, self.high = np.minimum(self.low, x.min(axis=0)), np.maximum(self.high, x.max(axis=0))
        self.sample.add(torch.from_numpy(x))

    def span(self, scales: NDArray[np.float32]) -> tuple[float, float]:
        """The range of the tensor over ``scales``."""
        return float((self.low / scales).min()), float((self.high / scales).max())


def _plan(model: ir.Model, scheme: str, source: Path, feeds: Sequence[Feeds], tell: Progress) -> QuantizationPlan:
    every = {node.name or "": "int8" for node in model.graph if node.op_type in {"MatMul", "Gemm"}}
    found = placement.products(model.graph, QuantizationPlan(scheme, every))
    products = [one for one in found if one.weight.size >= SMALL and _size(one.node)]
    names = [one.name for one in products] + [node.name or "" for node in model.graph if _is_table(node)]
    if scheme == "int8-dynamic":
        names += [node.name or "" for node in model.graph if node.op_type == "LSTM" and _size(node)]
    if not names:
        raise UsageError(f"{source} has no product with constant weights in float that {scheme} could quantize.")
    weights = dict.fromkeys(names, "int8")
    if scheme == "int8-dynamic":
        return QuantizationPlan(scheme, weights)
    if scheme == "int8-weight":
        looked_up = {n.name or "": n.inputs[0] for n in model.graph if _is_table(n)}
        tables = {name: ir.convenience.get_const_tensor(one) for name, one in looked_up.items() if one is not None}
        matrices = {one.name: one.weight.T for one in products}
        matrices |= {name: table.numpy() for name, table in tables.items() if table is not None}
        codes = {
            name: blocks.to_nearest(torch.from_numpy(np.array(matrix)), bits=8, block=32, symmetric=False)
            for name, matrix in matrices.items()
        }
        return QuantizationPlan(scheme, weights, codes=codes)
    spans, smooth = {}, {}
    by_input: dict[str, list[Product]] = {}
    for product in products:
        by_input.setdefault(product.input.name or "", []).append(product)
    seen = _calibrated(model, list(by_input), feeds, tell)
    for done, (name, siblings) in enumerate(by_input.items()):
        tell(done, len(by_input), "tensors smoothed")
        weights_of = [torch.from_numpy(np.array(one.weight.T)) for one in siblings]
        centred = [False] * len(siblings)
        scales, strength = best(seen[name].sample, weights_of, centred=centred, observe="minmax")
        for product in siblings:
            spans[product.name] = seen[name].span(scales.numpy())
            if strength:
                smooth[product.name] = scales
    return QuantizationPlan(scheme, weights, spans, smooth=smooth)


def _is_table(node: ir.Node) -> bool:
    """Whether a node looks rows up in a large constant of floats."""
    table = None if node.op_type != "Gather" or node.inputs[0] is None else node.inputs[0]
    tensor = None if table is None else ir.convenience.get_const_tensor(table)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return False
    return len(tensor.shape) == 2 and tensor.size >= LARGE and node.attributes.get_int("axis", 0) == 0


def _calibrated(model: ir.Model, names: Sequence[str], feeds: Sequence[Feeds], tell: Progress) -> dict[str, _Seen]:
    """What the rows make of the tensors ``names``, by running the graph with these as outputs as well."""
    graph = ir.to_proto(model)
    known = {one.name for one in (*graph.graph.input, *graph.graph.output)}
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    session = _session(graph.SerializeToString(), Path("the graph to calibrate"))
    asked = [name for name in names if name not in {one.name for one in graph.graph.input}]
    seen = {name: _Seen(Sample(TOKENS, 0)) for name in names}
    for done, feed in enumerate(feeds):
        tell(done, len(feeds), "batches calibrated")
        values = {**feed, **dict(zip(asked, session.run(asked, feed), strict=True))}
        for name in names:
            seen[name].add(values[name].reshape(-1, values[name].shape[-1]).astype(np.float32, copy=False))
    return seen


def _convolutional(graph: onnx.ModelProto, feeds: Sequence[Feeds], path: Path) -> None:
    """All of a convolutional graph by ONNX Runtime's tool: pairs around each operator, a scale for each channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    from .benchmarks.environment import fingerprint

    class Rows(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> Feeds | None:
            return next(self.left, None)

    flags = set(fingerprint(1)["flags"])
    folded = path.with_name("folded.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folded)  # normalisations become part of convolutions
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    float_graph = onnx.load(folded)
    _flatten_biases(float_graph)
    try:
        with without_advice():
            quantize_static(
                float_graph,
                path,
                Rows(),
                op_types_to_quantize=["Conv", "Gemm", "MatMul", *BETWEEN],
                per_channel=True,
                reduce_range=not flags & {"avx512_vnni", "avx_vnni", "asimddp"},
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
    except (ValueError, TypeError, RuntimeError, KeyError, IndexError) as error:  # what the tool raises by itself
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"ONNX Runtime's quantizer cannot take this graph with its convolutions: {said}") from error


def _flatten_biases(graph: onnx.ModelProto) -> None:
    """Biases [1, out] of products as [out], the only form that the tool takes with a scale for each channel."""
    biases = {node.input[2] for node in graph.graph.node if node.op_type == "Gemm" and len(node.input) > 2}
    readers = Counter(name for node in graph.graph.node for name in node.input)
    for one in graph.graph.initializer:
        if one.name in biases and readers[one.name] == 1 and len(one.dims) == 2 and one.dims[0] == 1:
            del one.dims[0]
    del graph.graph.value_info[:]  # inferred anew


# ---- comparing


def _check(parity: Mapping[str, Agreement], scheme: str, source: Path) -> None:
    """Raises ParityError where an output has become another."""
    for name, one in parity.items():
        if one.cosine < LEAST_COSINE:
            raise ParityError(
                f"In {scheme} the output '{name}' of {source} has a cosine of {one.cosine:.3f} with that in float; at "
                f"least {LEAST_COSINE:g} is wanted, so nothing was written."
            )


def _agreement(original: Any, made: Any, feeds: Sequence[Feeds]) -> dict[str, Agreement]:
    """Raises InputError where an output is not finite that was."""
    names = [one.name for one in original.get_outputs() if one.type in {"tensor(float)", "tensor(double)"}]
    sums = {name: np.zeros(3) for name in names}
    errors = dict.fromkeys(names, 0.0)
    for feed in feeds:
        for name, want, got in zip(names, original.run(names, feed), made.run(names, feed), strict=True):
            a, b = want.ravel().astype(np.float64), got.ravel().astype(np.float64)
            if np.isfinite(a).all() and not np.isfinite(b).all():
                raise InputError(f"Quantized, the output '{name}' is not finite any more; nothing was written.")
            sums[name] += a @ b, a @ a, b @ b
            errors[name] = max(errors[name], float(np.abs(a - b).max(initial=0.0)))
    return {
        name: Agreement(float(ab / max(np.sqrt(aa * bb), 1e-30)), errors[name]) for name, (ab, aa, bb) in sums.items()
    }
