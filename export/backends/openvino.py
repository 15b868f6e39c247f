"""OpenVINO.

What    Writes OpenVINO IR (``model.xml`` and ``model.bin``) with dynamic batch and sequence, and runs it on the CPU.
When    x86 CPUs, where its kernels of 8 bits and of bfloat16 are the fastest for many shapes.
Cost    As an ONNX export, and a conversion of seconds.
Source  docs.openvino.ai, "OpenVINO IR format", "CPU device", "Low Precision Transformations"
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from numpy.typing import NDArray

from ...errors import ParityError, UnavailableError, UsageError
from ...files import new_folder
from ...models.dequantize import dequantized
from ...models.workload import Workload
from ...plan import QuantizationPlan
from .. import artifact as artifacts
from .. import halves, large, locate, nbits, pairs, parity, reference, session
from ..artifact import Artifact, Session
from . import onnx as onnx_backend

MODEL_FILE = "model.xml"
SESSIONS = {
    "fp32": Session(inference_precision="f32"),
    "fp16": Session(inference_precision="f32"),
    "bf16": Session(inference_precision="bf16"),
    "int8": Session(),
    "int8-weight": Session(inference_precision="f32", dynamic_quantization=0),
    "int4": Session(inference_precision="f32", dynamic_quantization=0),
}
"""What floats are computed in. By itself OpenVINO takes bfloat16 where the CPU has it, for fp32 files too; beside 8
bits that is wanted. A CPU without bfloat16 computes in float32 whatever is asked. Beside weights of few bits it would
round inputs to 8 bits as they come; told not to, it computes exactly what the codes stand for."""
SCHEMES = tuple(SESSIONS)
BLOCKS = ("int8-weight", "int4")


def write(
    workload: Workload,
    plan: QuantizationPlan,
    folder: Path,
    *,
    name: str | None = None,
    base: Artifact | None = None,
) -> Artifact:
    """Write ``workload`` as OpenVINO IR in the precision of ``plan``, prove parity with its module, seal the folder.

    ``base`` is a float ONNX artifact of the same module, whose graph is used unless the plan changes the module's
    state. Raises UnavailableError where OpenVINO is not installed or cannot read the graph, and ParityError; nothing
    is left behind then.
    """
    openvino = session.openvino()
    if plan.scheme not in SCHEMES:
        raise UsageError(
            f"The openvino runtime cannot write the scheme '{plan.scheme}' (it can: {', '.join(SCHEMES)})."
        )
    if base is not None and (base.manifest.runtime, base.precision) != ("onnx", "fp32"):
        made = f"{base.precision} for {base.manifest.runtime}"
        raise UsageError(f"A graph to convert must be an fp32 onnx artifact; {base.folder} is {made}.")
    with new_folder(folder) as place:
        float_graph = onnx.load(base.model_file) if base and not plan.state else None
        graph = written(float_graph or onnx_backend.export(dequantized(workload, plan)), plan)
        with large.readable(graph) as source:
            try:
                model = openvino.Core().read_model(source)
            except RuntimeError as error:
                why = session.reason(error)
                raise UnavailableError(f"OpenVINO cannot read the graph of {workload.name}: {why}") from error
            openvino.save_model(model, place / MODEL_FILE, compress_to_fp16=False)
        described = artifacts.describe(workload, plan, graph, runtime="openvino", file=MODEL_FILE, name=name, base=base)
        tools = {tool: version(tool) for tool in ("torch", "onnx", "openvino", "transformers")}
        kinds = Counter(operator.get_type_name() for operator in model.get_ops())
        more = {"session": SESSIONS[plan.scheme], "operators": dict(sorted(kinds.items())), "tools": tools}
        manifest = described.model_copy(update=more)
        with open_session(Artifact(place, manifest), threads=torch.get_num_threads()) as opened:
            kept = reference.Recorder(opened.run)
            try:
                proof = parity.prove(workload, lambda feed: kept.run(feed)[0], precision=plan.scheme)
            except ParityError as error:
                made_from = partial(onnx_backend.export, dequantized(workload, plan))
                look = partial(_look, SESSIONS[plan.scheme])
                raise ParityError(f"{error}{locate.whence(workload, plan.scheme, graph, made_from, look)}") from error
        kept.save(place)
        manifest = artifacts.seal_proven(place, manifest, proof, workload)
    return Artifact(folder, manifest)


def _look(told: Session, graph: onnx.ModelProto, name: str, feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any] | None:
    """The tensor ``name`` of a graph as OpenVINO computes it; None where it cannot give that one."""
    core = session.openvino().Core()
    try:
        with large.readable(locate.probed(graph, name)) as source:
            told_all = session.settings(told, torch.get_num_threads())
            compiled = core.compile_model(core.read_model(source), "CPU", told_all)
        wanted = {one.get_any_name() for one in compiled.inputs}
        found: NDArray[Any] = compiled({key: array for key, array in feeds.items() if key in wanted})[0]
    except RuntimeError:  # no look is worth an error
        return None
    return found


def written(graph: onnx.ModelProto, plan: QuantizationPlan) -> onnx.ModelProto:
    """A float graph with the precisions of ``plan`` written into it, for OpenVINO to read.

    It reads ONNX Runtime's operators for weights in blocks as constants of 8 or 4 bits that are converted, less the
    zero points, times the scales, which its CPU plugin makes part of the product and of the look-up.
    """
    if plan.scheme == "int8":
        return pairs.place(graph, plan)
    if plan.scheme in halves.TYPES:
        halves.store(graph, plan)
    elif plan.scheme in BLOCKS:
        nbits.rewrite(graph, plan, whole=True)
    return graph


open_session = session.open_openvino
