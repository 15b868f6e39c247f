"""Where an artifact departs from what it was made from: the first operator, found by bisection.

Operators are looked at in the order of the graph. Each look runs graph and reference with another output, so that two
tensors are held at a time and n operators take about log2(n) looks. Bisection takes it that a difference, once there,
stays, as the residual stream carries it on; but operators beside each other do not share theirs, so from where it ends
the way is followed back, to operators that read what still agrees.

The reference of a graph in few bits is the float graph, whose tensors have the same names; that of a float graph is the
module, of whose layers the outputs are known. A step after a past is held against the module that reads all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..models.workload import Workload
from . import cache as caching
from . import parity

Feeds = Mapping[str, NDArray[Any]]
Array = NDArray[Any]
PAST_IDS = "past_ids"
"""Beside the inputs of a step, the tokens whose keys and values are among them."""


@dataclass(frozen=True)
class Departure:
    operator: str
    """The node's name, which begins with its module's path."""
    error: float
    """Root mean square difference, in units of the reference's."""
    before: float
    """The largest of the same at the operators it reads from, 0 for the first."""


Look = Callable[[onnx.ModelProto, str, Feeds], "Array | None"]
"""What a runtime computes for one tensor of a graph; None where it cannot give that one."""


def whence(
    workload: Workload,
    scheme: str,
    graph: onnx.ModelProto,
    reference: Callable[[], onnx.ModelProto],
    look: Look | None = None,
) -> str:
    """The sentence that says which operator of ``graph`` departs first, or nothing where that is not found.

    ``reference`` makes the float graph, which is asked for where ``scheme`` has few bits. ``look`` runs ``graph``, by
    ONNX Runtime where nothing is given.
    """
    limit = parity.TOLERANCE.get(scheme, parity.INTEGER_TOLERANCE)
    look = look or _run
    steps = bool(caching.names(workload.example))
    for sizes in parity.corners(workload):
        if steps and sizes["batch"] > 1:
            continue  # rows that are padded answer something to that, which is not to be compared
        feeds = _step(workload, graph, sizes) if steps else parity.feeds(workload, sizes)
        if feeds is None:
            continue
        if scheme == "fp32":
            found = from_module(graph, workload, feeds, limit, look)
        else:
            found = from_graph(graph, reference(), feeds, limit, look)
        if found:
            return (
                f" It begins at '{found.operator}', whose output is {found.error:.2e} of its root mean square away; "
                f"before it that was {found.before:.2e}."
            )
    return ""


def _step(workload: Workload, graph: onnx.ModelProto, sizes: Mapping[str, int]) -> Feeds | None:
    """The inputs of a step of one row, with the past that ``graph`` gives, if it does, and the tokens of that."""
    fed = parity.split(workload, sizes)
    before, mask = fed[PAST_IDS], fed["attention_mask"]
    past = {name: workload.example[name][:1, :, :0].numpy() for name in caching.names(workload.example)}
    if before.shape[1]:
        first = {"input_ids": before, "attention_mask": mask[:, : before.shape[1]], **past}
        try:
            content = graph.SerializeToString()
            session = onnxruntime.InferenceSession(content, _options(), providers=["CPUExecutionProvider"])
            past = caching.kept(workload, session.run(None, first))
        except Exception:  # ONNX Runtime's own derive from it alone; that the file is not proven is said anyway
            return None
    return {**fed, **past}


def from_graph(
    graph: onnx.ModelProto, reference: onnx.ModelProto, feeds: Feeds, limit: float, look: Look | None = None
) -> Departure | None:
    """The first node of ``graph`` whose output is more than ``limit`` away from that of the same name in
    ``reference``; None where there is none."""
    known = {name for node in reference.graph.node for name in node.output if name}
    points = [(node.name, name) for node in graph.graph.node for name in node.output if name in known]
    return _bisected(graph, points, lambda at: _run(reference, points[at][1], feeds), feeds, limit, look=look or _run)


def from_module(
    graph: onnx.ModelProto, workload: Workload, feeds: Feeds, limit: float, look: Look | None = None
) -> Departure | None:
    """The first layer of ``graph`` whose output is more than ``limit`` away from the module's; None where there is
    none. Of a layer that became several nodes it is the last that is compared."""
    layers = {path: layer for path, layer in workload.module.named_modules() if path and not any(layer.children())}
    last: dict[str, tuple[str, str]] = {}
    for node in graph.graph.node:
        path = node.name.rsplit("/", 1)[0]
        if path in layers:
            last.pop(path, None)
            last[path] = node.name, node.output[0]

    def reference(at: int) -> Array | None:
        return _answer(workload, layers[list(last)[at]], feeds)

    return _bisected(graph, list(last.values()), reference, feeds, limit, look=look or _run)


def _bisected(
    graph: onnx.ModelProto,
    points: Sequence[tuple[str, str]],
    reference: Callable[[int], Array | None],
    feeds: Feeds,
    limit: float,
    *,
    look: Look,
) -> Departure | None:
    @cache
    def error(at: int) -> float:
        return _distance(look(graph, points[at][1], feeds), reference(at))

    low, high = -1, len(points) - 1  # at ``low`` they agree, at ``high`` they do not
    if not points or not error(high) > limit:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error(middle) > limit else (middle, high)
    before = _read_by(graph, [tensor for _, tensor in points])
    while bad := [at for at in before[high] if error(at) > limit]:
        high = bad[0]
    return Departure(points[high][0], error(high), max((error(at) for at in before[high]), default=0.0))


def _read_by(graph: onnx.ModelProto, tensors: Sequence[str]) -> list[list[int]]:
    """For each of ``tensors`` which others it is computed from, with none of them in between."""
    place = {name: at for at, name in enumerate(tensors)}
    nearest: dict[str, set[int]] = {}
    found: dict[int, list[int]] = {}
    for node in graph.graph.node:  # in the order of computation
        read = {at for name in node.input for at in nearest.get(name, ())}
        for name in node.output:
            nearest[name] = read
            if name in place:
                found[place[name]] = sorted(read)
                nearest[name] = {place[name]}
    return [found[at] for at in range(len(tensors))]


def _distance(ours: Array | None, theirs: Array | None) -> float:
    """Root mean square difference in units of the reference's; not a number, which is not above any limit, where the
    two cannot be compared."""
    if ours is None or theirs is None or ours.shape != theirs.shape or ours.dtype.kind != "f" or not ours.size:
        return float("nan")
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    if not np.isfinite(ours).all():
        return float("inf")
    return float(np.sqrt(np.square(ours - theirs).mean()) / max(np.sqrt(np.square(theirs).mean()), 1e-12))


def _run(graph: onnx.ModelProto, name: str, feeds: Feeds) -> Array | None:
    """The tensor ``name`` of a graph; None where the runtime cannot give it."""
    try:
        content = probed(graph, name).SerializeToString()
        session = onnxruntime.InferenceSession(content, _options(), providers=["CPUExecutionProvider"])
        wanted = {one.name for one in session.get_inputs()}
        found: Array = session.run([name], {key: array for key, array in feeds.items() if key in wanted})[0]
    except Exception:  # ONNX Runtime's own derive from it alone, and no look is worth an error
        return None
    return found


def probed(graph: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """``graph`` with the tensor ``name`` as its one output."""
    found = onnx.ModelProto()
    found.CopyFrom(graph)
    del found.graph.output[:]
    found.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return found


def _options() -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
    return options


def _answer(workload: Workload, layer: nn.Module, feeds: Feeds) -> Array | None:
    """What ``layer`` puts out when the module reads ``feeds``; of a step, to the tokens after the past."""
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, __, out: seen.append(out) if isinstance(out, Tensor) else None)
    try:
        with torch.no_grad():
            if PAST_IDS in feeds:
                ids = torch.from_numpy(np.concatenate([feeds[PAST_IDS], feeds["input_ids"]], axis=1))
                mask = torch.from_numpy(feeds["attention_mask"])
                workload.module(input_ids=ids, attention_mask=mask, position_ids=caching.positions(mask, 0))
            else:
                workload.forward({name: torch.from_numpy(array) for name, array in feeds.items()})
    finally:
        hook.remove()
    past = feeds[PAST_IDS].shape[1] if PAST_IDS in feeds else 0
    return seen[-1][:, past:].numpy() if seen and past else seen[-1].numpy() if seen else None
