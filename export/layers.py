"""What an engine is made of: its layers, the types they read and write, and the graph's operators that became them.

TensorRT lists them at DETAILED verbosity, in the log of a build and, on a GPU, by the engine inspector.

Source: TensorRT documentation, "Engine Inspector".
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from ..errors import EdgepressError

TYPES = {
    "Float": "fp32",
    "FP32": "fp32",
    "Half": "fp16",
    "FP16": "fp16",
    "BFloat16": "bf16",
    "BF16": "bf16",
    "Int8": "int8",
    "INT8": "int8",
    "FP8": "fp8",
}
"""The names that the versions have for them, and ours."""
LISTING = "Layers:\n"
WIDTH = {"fp8": 8, "int8": 8, "fp16": 16, "bf16": 16, "fp32": 32}


class PrecisionError(EdgepressError):
    """An engine computes a product in another precision than was asked for; no file is left behind."""


@dataclass(frozen=True)
class Layer:
    """``inputs``, ``constants`` and ``outputs`` are the types of floating and 8-bit tensors; of others nothing is said.

    ``nodes`` are the names of the graph's operators in it. An operator may be in several layers, its bias in another
    than its product.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: frozenset[str]

    @property
    def is_attention(self) -> bool:
        """Both products and the softmax between them in one kernel."""
        return "mha" in self.name.lower() or "fmha" in self.kind.lower()


def of_log(listing: str) -> tuple[Layer, ...]:
    """The layers in the message of a build's log that begins with :data:`LISTING`; none in an empty one."""
    rows = listing.split("\n")  # not splitlines: \\x1e or \\x1f stands between operators
    pattern = re.compile(
        r"Name: (.*?), LayerType: (\w+), Inputs: (.*), Constants: (.*), Outputs: (.*), TacticName: .*?, Metadata: (.*)"
    )
    found = []
    for match in filter(None, map(pattern.fullmatch, rows)):
        name, kind, *tensors, nodes = match.groups()
        inputs, constants, outputs = (_types(re.findall(r"Datatype: (\w+)", text)) for text in tensors)
        found.append(Layer(name, kind, inputs, constants, outputs, _nodes(nodes)))
    return tuple(found)


def of_inspector(text: str) -> tuple[Layer, ...]:
    """The layers in the JSON of an engine inspector."""
    found = []
    for row in json.loads(text)["Layers"]:
        if isinstance(row, dict):  # a name alone is a layer of which nothing is known
            parts = ("Inputs", "Constants", "Outputs")
            inputs, constants, outputs = (_types(map(_type, row.get(part, ()))) for part in parts)
            nodes = _nodes(row.get("Metadata", ""))
            found.append(Layer(row["Name"], row.get("LayerType", ""), inputs, constants, outputs, nodes))
    return tuple(found)


def _type(tensor: Mapping[str, Any]) -> str:
    """``"Half"`` of a tensor's Datatype, or ``"FP16"`` of "Row major linear FP16 format", as older versions say it."""
    text = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or tensor.get("Format") or "")
    return next((word for word in re.findall(r"\w+", text) if word in TYPES), "")


def _types(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(TYPES[word] for word in words if word in TYPES)


def _nodes(metadata: str) -> frozenset[str]:
    return frozenset(re.findall(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f]|$)", metadata))


PRECISIONS: dict[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.FLOAT8E4M3FN: "fp8",
}


def weights(graph: onnx.ModelProto) -> dict[str, tuple[onnx.NodeProto, TensorProto]]:
    """Each product of a typed graph that has a constant weight, by its name, with that weight as it is stored."""
    makers = {output: node for node in graph.graph.node for output in node.output}
    constants = {one.name: one for one in graph.graph.initializer}
    found = {}
    for node in graph.graph.node:
        if node.op_type in {"MatMul", "Gemm", "Conv"}:
            maker = makers.get(node.input[1])
            weight = maker.input[0] if maker is not None and maker.op_type == "DequantizeLinear" else node.input[1]
            if weight in constants:
                found[node.name] = node, constants[weight]
    return found


def products(graph: onnx.ModelProto) -> dict[str, str]:
    """The precision that a typed graph asks for, by the name of each product with a constant weight."""
    return {name: PRECISIONS[weight.data_type] for name, (_, weight) in weights(graph).items()}


def sparse(graph: onnx.ModelProto) -> list[str]:
    """The products whose weights have at most two of every four inputs other than zero, as 2:4 kernels want."""
    found = []
    for name, (node, weight) in weights(graph).items():
        array = numpy_helper.to_array(weight)
        turned = any(one.name == "transB" and one.i for one in node.attribute)
        rows = array if turned else array.T
        if array.ndim == 2 and rows.shape[1] % 4 == 0:
            groups = np.ascontiguousarray(rows).reshape(len(rows), -1, 4)
            if ((groups != 0).sum(axis=-1) <= 2).all():
                found.append(name)
    return found


def precisions(layers: Iterable[Layer], names: Iterable[str]) -> dict[str, str]:
    """The precision in which each of the products ``names`` is computed; of one that no layer lists, nothing.

    That is the narrowest type that a layer with the product in it both reads and has weights of. Where the list has no
    weights, it is the narrowest type read.
    """
    holding: dict[str, list[Layer]] = {}
    for layer in layers:
        for node in layer.nodes:
            holding.setdefault(node, []).append(layer)
    found = {}
    for name in names:
        of_name = holding.get(name, [])
        both = {kind for layer in of_name for kind in layer.inputs if kind in layer.constants}
        either = {kind for layer in of_name for kind in layer.inputs}
        if both or either:
            found[name] = min(sorted(both or either), key=WIDTH.__getitem__)
    return found


def check(layers: Iterable[Layer], wanted: Mapping[str, str]) -> dict[str, int]:
    """How many products are computed in each precision; PrecisionError where one is not in the ``wanted`` one."""
    got = precisions(layers, wanted)
    wrong = [name for name, precision in wanted.items() if got.get(name) != precision]
    if wrong:
        first = wrong[0]
        raise PrecisionError(
            f"The engine computes {len(wrong)} of {len(wanted)} products in another precision than was asked for: "
            f"'{first}' in {got.get(first, 'no layer that is listed')}, not in {wanted[first]}."
        )
    return dict(sorted(Counter(got.values()).items()))
