"""ONNX Runtime.

What    Writes an ONNX file with dynamic batch and sequence, in float or with integer products, and runs it.
When    Any CPU. It is the default runtime.
Cost    An export takes seconds and about twice the model's memory.
Source  torch.onnx.export (dynamo); onnxruntime.quantization; https://onnxruntime.ai/docs
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from ...errors import InputError, ParityError, UnavailableError, UsageError
from ...files import new_folder
from ...models.dequantize import dequantized
from ...models.workload import Workload
from ...plan import QuantizationPlan
from .. import artifact as artifacts
from .. import axes, encoder_decoder, halves, large, locate, nbits, parity, placement, reference, session, traced
from .. import cache as caching
from ..artifact import Artifact, Session

FORMS: dict[str, Session] = {
    "default": Session(),
    "unfused-skip-layernorm": Session(disabled_optimizers=("SkipLayerNormFusion",)),
}
"""Graph forms worth measuring: which of ONNX Runtime's own rewrites are kept from happening. Its fused
skip-LayerNorm kernel is slower than Add followed by LayerNormalization on some CPUs."""

MODEL_FILE = "model.onnx"
OPSETS = range(18, 26)
"""Versions of the standard operators that can be asked for. The exporter has its own in 18 and converts from there;
downwards only by a tool that loses what a node comes from, by which it is quantized."""
QUANTIZED = ("Gather", "MatMul", "Gemm", "LSTM")
INTEGER = ("int8", "int8-dynamic")
REWRITERS = {"int4": nbits.rewrite, "int8-weight": nbits.rewrite, "fp16": halves.store, "bf16": halves.store}
"""What writes a scheme's weights into a float graph."""
SCHEMES = ("fp32", *INTEGER, *REWRITERS)


def write(
    workload: Workload,
    plan: QuantizationPlan,
    folder: Path,
    *,
    name: str | None = None,
    form: str | None = None,
    base: Artifact | None = None,
    cache: int | None = None,
    opset: int | None = None,
) -> Artifact:
    """Export ``workload`` in the precision of ``plan``, prove parity with its module, and seal the folder.

    ``base`` is the float artifact of the same module where there is one already; its graph is used instead of
    exporting again, unless the plan changes the module's state. ``form`` is "default" for a float graph and, if none is
    given, the one in which integer products were measured to run faster for the others. With ``cache`` the graph is a
    step of generation for so many tokens, see :mod:`..cache`. ``opset`` is the version of the standard operators, one
    of ``OPSETS``; left out, the exporter's own, or a later one that a scheme needs. Raises UsageError where the scheme
    needs a later one than ``opset``, and ParityError where the file does not compute what it should; nothing is left
    behind then.
    """
    if opset is not None and opset not in OPSETS:
        raise UsageError(f"Operator set {opset} cannot be written; {OPSETS[0]} to {OPSETS[-1]} can.")
    form = form or ("unfused-skip-layernorm" if plan.scheme in INTEGER else "default")
    if form not in FORMS:
        raise UsageError(f"There is no graph form '{form}' (known: {', '.join(FORMS)}).")
    if base is not None and base.precision != "fp32":
        raise UsageError(f"A graph to quantize must be fp32; {base.folder} is {base.precision}.")
    if cache is not None:
        workload = caching.with_past(workload, cache)
    if base is not None and set(base.manifest.inputs) != set(workload.example):
        raise UsageError(f"{base.folder} has other inputs than the graph that it should be made into.")
    with new_folder(folder) as place:
        path = place / MODEL_FILE
        usable = None if plan.state or opset else base  # which has other weights, or other operators
        graph = onnx.load(usable.model_file) if usable else export(dequantized(workload, plan), opset)
        costs = {}
        if encoder_decoder.is_part(workload):
            plan, costs = encoder_decoder.only(plan, graph), encoder_decoder.costs(workload)
        _save(graph, plan, path)
        onnx.checker.check_model(path, full_check=True)  # with shape inference, in its strict mode
        final = onnx.load(path, load_external_data=False)
        written = _opset(final)
        if opset not in {None, written}:
            raise UsageError(f"{workload.name} in {plan.scheme} needs operator set {written} at least, not {opset}.")
        described = artifacts.describe(workload, plan, final, runtime="onnx", file=MODEL_FILE, name=name, base=base)
        tools = {tool: version(tool) for tool in ("torch", "onnx", "transformers")}
        tools["onnxruntime"] = onnxruntime.__version__  # whatever its build is called
        more = {"session": FORMS[form], "tools": tools, "opset": written}
        manifest = described.model_copy(update={**more, **costs})
        with open_session(Artifact(place, manifest), threads=torch.get_num_threads()) as opened:
            kept = reference.Recorder(opened.run)
            try:
                if encoder_decoder.is_part(workload):
                    proof = encoder_decoder.prove(workload, kept.run, precision=plan.scheme)
                elif caching.names(workload.example):
                    proof = parity.prove_steps(workload, kept.run, precision=plan.scheme)
                else:
                    proof = parity.prove(workload, lambda feed: kept.run(feed)[0], precision=plan.scheme)
            except ParityError as error:
                made = onnx.load(path)
                source = partial(_float_graph, workload, plan, made, usable)
                raise ParityError(f"{error}{locate.whence(workload, plan.scheme, made, source)}") from error
        kept.save(place)
        manifest = artifacts.seal_proven(place, manifest, proof, workload)
    return Artifact(folder, manifest)


def _save(graph: onnx.ModelProto, plan: QuantizationPlan, path: Path) -> None:
    """Write ``graph`` in the precision of ``plan``."""
    if plan.scheme in INTEGER:
        quantize_graph(graph, plan, path)
        return
    if plan.scheme != "fp32":
        REWRITERS[plan.scheme](graph, plan)
    large.save(graph, path)


def _float_graph(workload: Workload, plan: QuantizationPlan, graph: onnx.ModelProto, base: Artifact | None) -> Any:
    """What ``graph`` was made from."""
    return onnx.load(base.model_file) if base else export(dequantized(workload, plan), _opset(graph))


def export_artifact(
    workload: Workload,
    folder: str | Path,
    plan: QuantizationPlan | None = None,
    *,
    cache: int | None = None,
    opset: int | None = None,
) -> Artifact:
    """Export ``workload`` to ``folder`` as an ONNX artifact, in FP32 or in the precision of ``plan``.

    With ``cache`` a causal language model takes and gives the keys and values of up to so many tokens. ``opset`` is the
    version of the standard operators that the file is written in.
    """
    return write(workload, plan or QuantizationPlan("fp32"), Path(folder), cache=cache, opset=opset)


def _opset(graph: onnx.ModelProto) -> int:
    version: int = next(one.version for one in graph.opset_import if not one.domain)
    return version


def in_form(artifact: Artifact, form: str) -> Artifact:
    """The same file, to be run in another graph form."""
    return Artifact(artifact.folder, artifact.manifest.model_copy(update={"session": FORMS[form]}))


def export(workload: Workload, opset: int | None = None) -> onnx.ModelProto:
    """The float graph of a workload's module: one node per operator, named after the module it comes from.

    ``opset`` is the version of the standard operators, the exporter's own where nothing is said. Raises
    UnavailableError where the module cannot be traced, has two answers, or reads its answer at a token, and where a
    declared axis would not be free.
    """
    module: Any = traced.module(workload)
    inputs, declared = traced.inputs(workload), workload.input_axes
    outputs: tuple[str, ...] = ("logits", *caching.outputs(declared))
    if encoder_decoder.is_part(workload):
        outputs = encoder_decoder.outputs(workload)
    steps = outputs != ("logits",)
    shapes = traced.sizes(workload, bounded=not steps)
    for noisy in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            if steps:
                module = caching.traced(module, inputs, shapes)
            program = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                dynamic_shapes={"inputs": shapes},
                input_names=list(declared),
                output_names=list(outputs),
                opset_version=opset,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        raise traced.refusal(workload, error.__cause__ or error, "ONNX") from error
    assert program is not None
    axes.check(workload, program)
    model = program.model_proto
    if opset not in {None, _opset(model)}:  # the exporter keeps what it cannot convert
        raise UnavailableError(f"{workload.name} cannot be written in operator set {opset}, only in {_opset(model)}.")
    _name_nodes(model)
    return model


def _name_nodes(model: onnx.ModelProto) -> None:
    """Name each node after the module that it comes from, and drop what the exporter noted about its own source."""
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        noted = {prop.key: prop.value for prop in node.metadata_props}
        scope = noted.get("namespace", "").split("/")
        module = scope[-2].split(":")[0].strip() if len(scope) > 1 else ""
        label = f"{module.removeprefix('model.')}/{node.op_type}"
        counts[label] += 1
        node.name = label if counts[label] == 1 else f"{label}_{counts[label]}"
        del node.metadata_props[:]
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer):
        del value.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    model.graph.doc_string = ""
    model.producer_name, model.producer_version = "edgepress", version("edgepress")


def quantize_graph(graph: onnx.ModelProto, plan: QuantizationPlan, path: Path) -> None:
    """Write ``graph`` with the weights of ``plan`` in 8 bits: per output channel for products, tables as they are.

    The plan names modules, or nodes of the graph. Raises InputError where it names what is neither or has no product
    or table in the graph.
    """
    if plan.scheme not in INTEGER:
        raise UsageError(f"The onnx runtime cannot write the scheme '{plan.scheme}' (it can: {', '.join(SCHEMES)}).")
    known = {name for node in graph.graph.node if node.op_type in QUANTIZED for name in placement.names(node.name)}
    missing = [name for name in plan.weights if name not in known]
    if missing:
        raise InputError(f"The plan quantizes '{missing[0]}', which is not a product or a table in this graph.")
    placed = placement.place(graph, plan)
    recurrent = [node.name for node in placed.graph.node if node.op_type == "LSTM" and _planned(node, plan)]
    if recurrent:
        _quantize_recurrent(placed, recurrent, path)
        placed = onnx.load(path)
    large.save(placed, path)
    left = [node.name for node in placed.graph.node if node.op_type in QUANTIZED[1:] and _planned(node, plan)]
    if left:
        raise InputError(f"The product of '{left[0]}' stays in float, which the plan quantizes.")


def _planned(node: onnx.NodeProto, plan: QuantizationPlan) -> bool:
    return any(name in plan.weights for name in placement.names(node.name))


def _quantize_recurrent(graph: onnx.ModelProto, nodes: Sequence[str], path: Path) -> None:
    """LSTMs by ONNX Runtime's own tool, which has a kernel for them whose activations are quantized as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with without_advice():
        quantize_dynamic(
            graph,
            path,
            op_types_to_quantize=["LSTM"],
            nodes_to_quantize=list(nodes),
            per_channel=True,
            weight_type=QuantType.QInt8,
        )


@contextmanager
def without_advice() -> Iterator[None]:
    """ONNX Runtime's tool does not advise to pre-process: the graph is folded and shape-inferred already."""

    def unprocessed(record: logging.LogRecord) -> bool:
        return "pre-process" not in record.getMessage()

    logging.getLogger().addFilter(unprocessed)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(unprocessed)


open_session = session.open_onnx
