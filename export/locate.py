"""Where an artifact departs from what it was made from: the first operator, found by bisection.

Operators are looked at in the order of the graph. Each look runs graph and reference with another output, so that two
tensors are held at a time and n operators take about log2(n) looks. Bisection takes it that a difference, once there,
stays, as the residual stream carries it on; but operators beside each other do not share theirs, so from where it ends
the way is followed back, to operators that read what still agrees.

The reference of a graph in few bits is the float graph, whose tensors have the same names; that of a float graph is the
module, of whose layers the outputs are known. A step after a past is held against the module that reads all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..models.workload import Workload
from . import cache as caching
from . import encoder_decoder, parity
from .parity import PAST_IDS
from .reference import TOLERANCE
from .session import OnnxSession

Feeds = Mapping[str, NDArray[Any]]
Array = NDArray[Any]


@dataclass(frozen=True)
class Departure:
    operator: str
    """The node's name, which begins with its module's path."""
    error: float
    """Root mean square difference, in units of the reference's."""
    before: float
    """The largest of the same at the operators it reads from, 0 for the first."""


@dataclass(frozen=True)
class Case:
    feeds: Feeds
    """What a graph reads."""
    module: Callable[[], object]
    """Runs the module on the same."""
    past: int = 0
    """So many positions come first in what the module's layers put out, which a step of the graph does not have."""


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
    limit = TOLERANCE.get(scheme, parity.INTEGER_TOLERANCE)
    look = look or _run
    for case in _cases(workload, graph):
        if scheme == "fp32":
            found = from_module(graph, workload, case, limit, look)
        else:
            found = from_graph(graph, reference(), case.feeds, limit, look)
        if found:
            return (
                f" It begins at '{found.operator}', whose output is {found.error:.2e} of its root mean square away; "
                f"before it that was {found.before:.2e}."
            )
    return ""


def _cases(workload: Workload, graph: onnx.ModelProto) -> Iterator[Case]:
    """At the corners of the declared shapes.

    Of steps those of one row alone, where ``graph`` gives their past: several are padded, and what is answered to
    padding is not to be compared.
    """
    corners = parity.corners(workload)
    if encoder_decoder.is_decoder(workload):
        yield from _steps(workload, graph, encoder_decoder.feeds(workload), encoder_decoder)
    elif caching.names(workload.example):
        yield from _steps(workload, graph, (parity.split(workload, sizes) for sizes in corners), parity)
    else:
        answers: Any = encoder_decoder.encoded if encoder_decoder.is_encoder(workload) else parity.answers
        for feed in (parity.feeds(workload, sizes) for sizes in corners):
            yield Case(feed, partial(answers, workload, feed))


def _steps(workload: Workload, graph: onnx.ModelProto, feeds: Iterable[parity.Feeds], kind: Any) -> Iterator[Case]:
    for feed in feeds:
        if len(feed[PAST_IDS]) > 1:
            continue
        try:
            given = kind.step(workload, _session(graph).run, feed)
        except Exception:  # noqa: S112 - ONNX Runtime's own derive from it alone; no look is worth an error
            continue
        yield Case(given, partial(kind.at_once, workload, feed), feed[PAST_IDS].shape[1])


def from_graph(
    graph: onnx.ModelProto, reference: onnx.ModelProto, feeds: Feeds, limit: float, look: Look | None = None
) -> Departure | None:
    """The first node of ``graph`` whose output is more than ``limit`` away from that of the same name in
    ``reference``; None where there is none."""
    known = {name for node in reference.graph.node for name in node.output if name}
    points = [(node.name, name) for node in graph.graph.node for name in node.output if name in known]
    return _bisected(graph, points, lambda at: _run(reference, points[at][1], feeds), feeds, limit, look=look or _run)


def from_module(
    graph: onnx.ModelProto, workload: Workload, case: Case, limit: float, look: Look | None = None
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
        return _put_out(layers[list(last)[at]], case)

    return _bisected(graph, list(last.values()), reference, case.feeds, limit, look=look or _run)


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
        return _session(probed(graph, name)).run(dict(feeds))[0]
    except Exception:  # ONNX Runtime's own derive from it alone, and no look is worth an error
        return None


def probed(graph: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """``graph`` with the tensor ``name`` as its one output."""
    found = onnx.ModelProto()
    found.CopyFrom(graph)
    del found.graph.output[:]
    found.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return found


def _session(graph: onnx.ModelProto) -> OnnxSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 4
    content = graph.SerializeToString()
    return OnnxSession(onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"]))


def _put_out(layer: nn.Module, case: Case) -> Array | None:
    """What ``layer`` puts out where the module reads what the graph does; of a step, at the tokens after the past."""
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, __, out: seen.append(out) if isinstance(out, Tensor) else None)
    try:
        case.module()
    finally:
        hook.remove()
    return seen[-1][:, case.past :].numpy() if seen and case.past else seen[-1].numpy() if seen else None
