"""Graphs of other sizes: what a model exports to at any number of kept units, made from two of its exports.

Removing units changes the sizes of a graph's tensors and nothing else, and each size is a linear function of how many
units stay. Two exports therefore tell all others, in milliseconds instead of the seconds that an export takes. Good
for measuring latency; the values are the original's first ones, so the answers are not those of a pruned model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper


@dataclass(frozen=True)
class Resize:
    """How a graph changes with the units kept of some sites: what one unit adds.

    ``shapes`` are the initializers, by name, whose dimensions change, ``values`` the small integer tensors, targets of
    reshapes and the like, whose entries do, and ``attributes`` the whole numbers of nodes, by position and name, such
    as how many heads an ``Attention`` has.
    """

    count: int
    """Units of each site in the whole graph."""
    shapes: dict[str, tuple[int, ...]]
    values: dict[str, tuple[int, ...]]
    attributes: dict[tuple[int, str], int]

    def apply(self, model: onnx.ModelProto, kept: int) -> None:
        """Change ``model``, which holds the whole sites, into one that holds ``kept`` units of each."""
        less = self.count - kept
        for tensor in model.graph.initializer:
            if tensor.name in self.shapes:
                array = numpy_helper.to_array(tensor)
                sizes = [size - less * step for size, step in zip(array.shape, self.shapes[tensor.name], strict=True)]
                array = np.ascontiguousarray(array[tuple(slice(size) for size in sizes)])
            elif tensor.name in self.values:
                array = numpy_helper.to_array(tensor)
                array = array - less * np.array(self.values[tensor.name], dtype=array.dtype).reshape(array.shape)
            else:
                continue
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        for (position, name), step in self.attributes.items():
            for attribute in model.graph.node[position].attribute:
                if attribute.name == name:
                    attribute.i -= less * step


def between(whole: onnx.ModelProto, fewer: onnx.ModelProto, count: int) -> Resize | None:
    """The change from ``whole``, with ``count`` units in each of some sites, to ``fewer``, with one less in each.

    None where the two differ in more than sizes: then only an export can tell.
    """
    ours, theirs = whole.graph, fewer.graph
    if len(ours.initializer) != len(theirs.initializer) or _nodes(ours) != _nodes(theirs):
        return None
    shapes: dict[str, tuple[int, ...]] = {}
    values: dict[str, tuple[int, ...]] = {}
    for large, small in zip(ours.initializer, theirs.initializer, strict=True):
        if len(large.dims) != len(small.dims) or large.data_type != small.data_type:
            return None
        if list(large.dims) != list(small.dims):
            shapes[large.name] = tuple(a - b for a, b in zip(large.dims, small.dims, strict=True))
        elif large.data_type == onnx.TensorProto.INT64:
            difference = numpy_helper.to_array(large).ravel() - numpy_helper.to_array(small).ravel()
            if difference.any():
                values[large.name] = tuple(difference.tolist())
    attributes = {
        (position, large.name): large.i - small.i
        for position, (more, less) in enumerate(zip(ours.node, theirs.node, strict=True))
        for large, small in zip(more.attribute, less.attribute, strict=True)
        if large.i != small.i
    }
    return Resize(count, shapes, values, attributes)


def _nodes(graph: onnx.GraphProto) -> list[Any]:
    """The nodes with their inputs and outputs numbered: the exporter names values after their sizes."""
    numbers: dict[str, int] = {}

    def numbered(names: Iterable[str]) -> list[int]:
        return [numbers.setdefault(name, len(numbers)) for name in names]

    numbered(value.name for value in (*graph.input, *graph.initializer))
    return [
        (
            node.op_type,
            [_without_heads(attribute) for attribute in node.attribute],
            numbered(node.input),
            numbered(node.output),
        )
        for node in graph.node
    ]


def _without_heads(attribute: onnx.AttributeProto) -> bytes:
    """An attribute as bytes, without its value where that counts heads."""
    if not attribute.name.endswith("num_heads"):
        return bytes(attribute.SerializeToString(deterministic=True))
    return str(attribute.name).encode()
