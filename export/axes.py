"""Dynamic axes: what is declared free is free in the graph, or there is no artifact.

The exporter would rather write a graph for one size than none: where a forward needs a size to be a constant, or to be
within a narrower range, it takes that for what was asked, and does not say so. What it wrote is therefore looked at;
and where a graph that claims to take any size does not, the axis is found on which it fails.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..errors import UnavailableError
from ..models.workload import Axis, Workload

TRACED = {"batch": 2, "sequence": 16, "decoder_sequence": 7, "past_sequence": 5}
"""Sizes that a graph is traced with, cut at the example's. A size that is traced as 1 is taken for one that never
changes, so there are two rows; and lengths that are alike for one that is the same, so they differ."""
Sizes = Mapping[str, int]
ADVICE = "take sizes from the tensor's shape as they are, without int(), len() or a number written down"


def check(workload: Workload, program: torch.onnx.ONNXProgram) -> None:
    """Raise UnavailableError, which names input and axis, where ``program`` takes a declared axis for a constant, for
    something else than that axis, or for one of fewer sizes."""
    declared = {one.name: one.type.tensor_type.shape.dim for one in program.model_proto.graph.input}
    narrowed = dict(_upper_bounds(program.exported_program))
    for at, (name, axes) in enumerate(workload.input_axes.items()):
        for place, axis in axes.items():
            dim, most = declared[name][place], narrowed.get((at, place), axis.max)
            if dim.dim_param != axis.name:
                taken = f"'{dim.dim_param}'" if dim.dim_param else str(dim.dim_value)
                raise UnavailableError(f"{_refusal(workload, name, place, axis)} fixes it at {taken}; {ADVICE}.")
            if most < axis.max:
                raise UnavailableError(f"{_refusal(workload, name, place, axis)} holds for sizes up to {most} alone.")


def _refusal(workload: Workload, name: str, place: int, axis: Axis) -> str:
    return (
        f"{workload.name} cannot be exported: axis {place} of its input '{name}' is declared free ('{axis.name}', "
        f"{axis.min} to {axis.max}), but the model's forward"
    )


def _upper_bounds(program: Any) -> Iterator[tuple[tuple[int, int], int]]:
    """The largest size of each free axis that a traced program holds for, by number of input and place."""
    inputs = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    for at, name in enumerate(program.graph_signature.user_inputs):
        for place, size in enumerate(inputs[name].shape):
            found = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            if found is not None and found.upper.is_Integer:
                yield (at, place), int(found.upper)


def violated(workload: Workload, error: BaseException) -> str:
    """The sentence that names the axis of which ``error``, of the tracer, says that it is not free; "" for another."""
    found = re.search(r"Constraints violated \(([\w, ]+)\)", str(error))
    names = found.group(1).split(", ") if found else []
    free = [(name, place, axis) for name, axes in workload.input_axes.items() for place, axis in axes.items()]
    free.sort(key=lambda one: one[2].name == "total_sequence")  # last: it is the sum of two others
    for name, place, axis in free:
        if axis.name in names:
            return f"{_refusal(workload, name, place, axis)} needs certain sizes of it; {ADVICE}."
    return ""


def blame(workload: Workload, corners: Sequence[Sizes], fails: Callable[[Sizes], bool]) -> str:
    """The sentence that names the one axis on which a graph fails, as ``fails`` tells of sizes by name of axis.

    It is looked for from sizes like those that were traced, of which one at a time is changed for those in ``corners``.
    Empty where it fails there too, or where it takes more than one.
    """
    largest = {name: max(sizes[name] for sizes in corners) for name in corners[0]}
    usual = {**TRACED, "sequence": 7} if "past_sequence" in largest else TRACED
    inside = {name: min(most, usual[name]) for name, most in largest.items()}
    if fails(inside):
        return ""
    longest = max(map(_tokens, corners))
    where = {axis.name: (name, at) for name, axes in workload.input_axes.items() for at, axis in axes.items()}
    for axis, size in itertools.chain.from_iterable(sizes.items() for sizes in corners):
        changed = {**inside, axis: size}
        if _tokens(changed) <= longest and fails(changed):
            name, place = where[axis]
            return (
                f" Axis {place} of its input '{name}' ('{axis}') is not free: with {inside[axis]} it agrees, "
                f"with {size} it does not."
            )
    return ""


def _tokens(sizes: Sizes) -> int:
    """Those before and the new ones together."""
    return sizes.get("past_sequence", 0) + sizes.get("decoder_sequence", sizes.get("sequence", 0))
