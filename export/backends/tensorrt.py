"""TensorRT.

What    Builds an engine from a graph in which every precision is written: half precision with normalisation and softmax
        in float32, INT8 and FP8 as explicit Q/DQ, 2:4 sparse weights. One recipe for TensorRT 10, 11 and TensorRT-RTX;
        the last builds ahead of time, without a GPU. Runs it with CUDA graphs, on device buffers.
When    NVIDIA GPUs, from Jetson to RTX. FP16 first; INT8 from Ampere, FP8 from Ada on, where the batch is large enough.
Cost    Seconds with TensorRT-RTX, minutes with TensorRT, which times kernels; a timing cache makes the second build
        short.
Source  docs.nvidia.com/deeplearning/tensorrt; docs.nvidia.com/deeplearning/tensorrt-rtx
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InputError, ParityError, UnavailableError, UsageError
from ...files import new_folder
from ...models.dequantize import dequantized
from ...models.workload import Workload
from ...plan import QuantizationPlan
from .. import artifact as artifacts
from .. import engine as engines
from .. import large, layers, parity, qdq, reference, typed
from ..artifact import Artifact
from ..placement import names
from . import onnx as onnx_backend

MODEL_FILE = "model.engine"
SOURCE_FILE = "source.onnx"
"""The typed graph that the engine was built from, to prove, refit or rebuild it anywhere."""
SCHEMES = ("fp32", "fp16", "bf16", "int8", "fp8")
GRAPHS = 8
"""CUDA graphs that are kept, one for each of the latest input shapes; each holds its own working memory."""


def write(
    workload: Workload,
    plan: QuantizationPlan,
    folder: Path,
    *,
    name: str | None = None,
    base: Artifact | None = None,
    capability: str | None = None,
    tuned: Mapping[str, int] | None = None,
    sparse: bool = False,
    compatible: bool = False,
    stripped: bool = False,
    timing_cache: Path | None = None,
) -> Artifact:
    """Build an engine of ``workload`` in the precision of ``plan``, prove it, and seal the folder.

    ``base`` is a float ONNX artifact of the same module, whose graph is used unless the plan changes the module's
    state. ``capability``, ``"sm89"`` for instance, is built for ahead of time; without it the engine is for the GPU
    that is present or, with TensorRT-RTX, for any from 8.0 up. ``tuned`` gives the sizes that kernels are chosen for,
    by the name of the axis: one row of the example's length where it is silent. ``sparse`` uses 2:4 kernels where
    weights follow that pattern. ``compatible`` asks TensorRT for an engine that later versions and other GPUs run too;
    TensorRT-RTX's are. ``stripped`` leaves the weights to the source graph. ``timing_cache`` is read, and written anew.

    What INT8 and FP8 leave is FP16. Where the engine cannot run here, it is its graph that is proven, on the CPU.
    Raises UnavailableError for what the library or the capability cannot do, PrecisionError where a product got another
    precision than its graph says, and ParityError; nothing is left behind then.
    """
    if plan.scheme not in SCHEMES:
        raise UsageError(
            f"The tensorrt runtime cannot write the scheme '{plan.scheme}' (it can: {', '.join(SCHEMES)})."
        )
    if base is not None and (base.manifest.runtime, base.precision) != ("onnx", "fp32"):
        made = f"{base.precision} for {base.manifest.runtime}"
        raise UsageError(f"A graph to build from must be an fp32 onnx artifact; {base.folder} is {made}.")
    engines.check(engines.target(engines.library(), capability), plan.scheme, sparse=sparse, stripped=stripped)
    profile = ranges(workload, tuned or {})
    with new_folder(folder) as place:
        float_graph = onnx.load(base.model_file) if base and not plan.state else None
        graph = typed_graph(float_graph or onnx_backend.export(dequantized(workload, plan)), plan)
        zeros = layers.sparse(graph) if sparse else []
        if sparse and not zeros:
            raise InputError(
                f"No weight of {workload.name} follows 2:4; 'edgepress prune --sparsity 2:4' makes such ones."
            )
        large.save(graph, place / SOURCE_FILE)
        built = engines.build(
            place / SOURCE_FILE,
            profile,
            capability=capability,
            sparse=sparse,
            compatible=compatible,
            stripped=stripped,
            timing_cache=timing_cache,
        )
        (place / MODEL_FILE).write_bytes(built.plan)
        described = artifacts.describe(workload, plan, graph, runtime="tensorrt", file=MODEL_FILE, name=name, base=base)
        tools = {tool: version(tool) for tool in ("torch", "onnx", "transformers")}
        narrow = {name: kind for name, kind in plan.weights.items() if name in plan.activations}
        more = {
            "engine": _facts(built, graph, stripped=stripped, sparse=len(zeros)),
            "quantized": narrow if plan.scheme in qdq.GRIDS else described.quantized,
            "tools": {**tools, built.library: built.version},
        }
        manifest = described.model_copy(update=more)
        proof = _prove(workload, Artifact(place, manifest))
        manifest = artifacts.seal_proven(place, manifest, proof, workload)
    return Artifact(folder, manifest)


def _facts(built: engines.Engine, graph: onnx.ModelProto, *, stripped: bool, sparse: int) -> artifacts.Engine:
    """What the manifest says of an engine. PrecisionError where a product got another precision than in ``graph``."""
    return artifacts.Engine(
        library=built.library,
        version=built.version,
        capability=built.capability,
        stripped=stripped,
        layers=len(built.layers),
        attention=sum(layer.is_attention for layer in built.layers),
        products=layers.check(built.layers, layers.products(graph)),
        sparse=sparse,
    )


def typed_graph(graph: onnx.ModelProto, plan: QuantizationPlan) -> onnx.ModelProto:
    """A float graph with the precisions of ``plan`` written into it.

    Raises InputError where the plan quantizes what is no product with a weight in the graph.
    """
    if plan.scheme == "fp32":
        return graph
    if plan.scheme not in qdq.GRIDS:
        return typed.narrow(graph, plan.scheme)
    made = typed.narrow(qdq.place(graph, plan, np.dtype(np.float16)), "fp16")
    placed = {known for node, kind in layers.products(made).items() if kind == plan.scheme for known in names(node)}
    missing = [name for name in plan.activations if name not in placed]
    if missing or not placed:
        what = f"'{missing[0]}', which is not a product" if missing else "no product"
        raise InputError(f"The plan quantizes {what} with a weight in this graph.")
    return made


def ranges(workload: Workload, tuned: Mapping[str, int]) -> dict[str, engines.Range]:
    """The optimisation profile: the declared range of each axis, and the size in it that kernels are chosen for."""
    known = {axis.name for of_input in workload.input_axes.values() for axis in of_input.values()}
    unknown = [name for name in tuned if name not in known]
    if unknown:
        raise UsageError(f"'{unknown[0]}' is no axis of {workload.name} (it has {', '.join(sorted(known))}).")
    found = {}
    for name, axes in workload.input_axes.items():
        shape = tuple(workload.example[name].shape)
        least, middle, most = list(shape), list(shape), list(shape)
        for place, axis in axes.items():
            least[place], most[place] = axis.min, axis.max
            middle[place] = tuned.get(axis.name, min(max(shape[place], axis.min), axis.max))
            if not axis.min <= middle[place] <= axis.max:
                raise UsageError(f"{axis.name} {middle[place]} is not in its range, {axis.min} to {axis.max}.")
        found[name] = engines.Range(tuple(least), tuple(middle), tuple(most))
    return found


def _prove(workload: Workload, artifact: Artifact) -> artifacts.Parity:
    """Parity of the engine with the module, whose references are kept, or of its graph where it cannot be loaded here.

    Raises ParityError where it can be, and does not run then.
    """
    precision = artifact.precision
    with ExitStack() as stack:
        try:
            session = stack.enter_context(open_session(artifact))
        except UnavailableError:
            return _prove_graph(workload, artifact.folder / SOURCE_FILE, precision)
        kept = reference.Recorder(session.run)
        try:
            proof = parity.prove(workload, lambda feed: kept.run(feed)[0], precision=precision)
        except UnavailableError as error:
            raise ParityError(f"The engine of {workload.name} does not run: {error}") from error
    kept.save(artifact.folder)
    return proof


def _prove_graph(workload: Workload, path: Path, precision: str) -> artifacts.Parity:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    with ExitStack() as stack:
        source: bytes | Path = path
        if precision == "bf16":
            source = stack.enter_context(large.readable(typed.emulated(onnx.load(path))))
        runner = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        name = "the PyTorch module, by the engine's graph on the CPU"
        return parity.prove(workload, lambda feed: runner.run(None, feed)[0], precision=precision, reference=name)


@contextmanager
def open_session(artifact: Artifact, *, device: str = "cuda", threads: int = 1) -> Iterator[EngineSession]:
    """Open an engine on a GPU, ``"cuda"`` or ``"cuda:1"``; ``threads`` are the CPU's and of no use here.

    Raises UnavailableError, with the library's own reason, where the engine does not run there.
    """
    if device.split(":", maxsplit=1)[0] != "cuda":
        raise UsageError(f"The tensorrt runtime runs on 'cuda', not on '{device}'.")
    made = artifact.manifest.engine
    if made is None:
        raise InputError(f"{artifact.folder} is not a TensorRT artifact: its manifest describes no engine.")
    trt = engines.library(made.library)
    if engines.present() is None:
        raise UnavailableError(f"{artifact.folder} needs an NVIDIA GPU, and there is none here.")
    with torch.cuda.device(device):
        log = engines.logger(trt)
        engine = engines.load(trt, log, artifact.model_file.read_bytes())
        if made.stripped:
            engines.refit(trt, log, engine, artifact.folder / SOURCE_FILE)
        yield EngineSession(trt, engine, log)


@dataclass(frozen=True)
class _Prepared:
    """An execution context in one input shape, its buffers, and how it is run in them."""

    context: Any
    inputs: dict[str, Tensor]
    outputs: list[Tensor]
    launch: Callable[[], None]


class EngineSession:
    """An open engine: ``run`` maps input arrays by name to the list of outputs."""

    def __init__(self, trt: Any, engine: Any, log: Any) -> None:
        self._trt, self._engine, self._log = trt, engine, log
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._prepared: OrderedDict[tuple[tuple[int, ...], ...], _Prepared] = OrderedDict()
        every = [engine.get_tensor_name(place) for place in range(engine.num_io_tensors)]
        self._inputs = [one for one in every if engine.get_tensor_mode(one) == trt.TensorIOMode.INPUT]
        self._outputs = [one for one in every if one not in self._inputs]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        return [output.cpu().numpy() for output in self.prepared(feeds)()]

    def prepared(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], list[Tensor]]:
        """The inputs copied to the GPU, and a function that runs the engine on them once and waits for it.

        It returns the output buffers on the GPU, which every run in this shape overwrites.
        """
        shapes = tuple(tuple(feeds[name].shape) for name in self._inputs)
        one = self._prepared.pop(shapes, None) or self._in_shape(dict(zip(self._inputs, shapes, strict=True)))
        self._prepared[shapes] = one
        if len(self._prepared) > GRAPHS:
            self._prepared.popitem(last=False)
        with torch.cuda.stream(self._stream):
            for name, buffer in one.inputs.items():
                buffer.copy_(torch.from_numpy(np.ascontiguousarray(feeds[name])))

        def launch() -> list[Tensor]:
            one.launch()
            self._stream.synchronize()
            return one.outputs

        return launch

    def _in_shape(self, shapes: Mapping[str, tuple[int, ...]]) -> _Prepared:
        context = self._context()
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                raise UsageError(f"The engine does not take '{name}' of shape {list(shape)}: {self._log.reason()}.")
        buffers = {name: torch.zeros(shape, dtype=self._type(name), device="cuda") for name, shape in shapes.items()}
        for name in self._outputs:
            buffers[name] = torch.zeros(tuple(context.get_tensor_shape(name)), dtype=self._type(name), device="cuda")
        for name, buffer in buffers.items():
            context.set_tensor_address(name, buffer.data_ptr())
        torch.cuda.synchronize()
        launch = self._captured(context)
        inputs = {name: buffers[name] for name in self._inputs}
        return _Prepared(context, inputs, [buffers[name] for name in self._outputs], launch)

    def _captured(self, context: Any) -> Callable[[], None]:
        """How the context is run: by a CUDA graph where what it does can be captured, else kernel by kernel."""

        def enqueue() -> None:
            if not context.execute_async_v3(self._stream.cuda_stream):
                raise UnavailableError(f"The engine does not run on this GPU: {self._log.reason()}.")

        enqueue()  # what is compiled or allocated at the first run must not be captured
        self._stream.synchronize()
        capturable = getattr(context, "is_stream_capturable", None)
        if capturable is not None and not capturable(self._stream.cuda_stream):
            return enqueue
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            enqueue()

        def replay() -> None:
            with torch.cuda.stream(self._stream):
                graph.replay()

        return replay

    def _context(self) -> Any:
        """An execution context; TensorRT-RTX compiles its kernels for the very shape at the first run, not later."""
        config = []
        if hasattr(self._trt, "DynamicShapesKernelSpecializationStrategy"):
            config.append(self._engine.create_runtime_config())
            strategies = self._trt.DynamicShapesKernelSpecializationStrategy
            config[0].dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        context = self._engine.create_execution_context(*config)
        if context is None:
            raise UnavailableError(f"The engine does not run on this GPU: {self._log.reason()}.")
        return context

    def _type(self, name: str) -> torch.dtype:
        word = self._engine.get_tensor_dtype(name).name
        known = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT32": torch.int32}
        return {**known, "INT64": torch.int64, "INT8": torch.int8, "UINT8": torch.uint8, "BOOL": torch.bool}[word]
