"""Precision: in how many bits an artifact keeps the weight of each operator, and what it multiplies them with.

An ONNX graph is read, without its weights; of other files the manifest names what is not in float.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from google.protobuf.message import DecodeError
from onnx import NodeProto, TensorProto

from ..errors import InputError
from .artifact import Artifact

STORED: dict[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.FLOAT8E5M2: "fp8",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
    TensorProto.INT4: "int4",
    TensorProto.UINT4: "int4",
}
WHOLE = ("MatMulIntegerToFloat", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "QGemm")
"""Operators that multiply whole numbers of 8 bits with each other."""
PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "MatMulNBits", *WHOLE)
TABLES = ("Gather", "GatherBlockQuantized")
THROUGH = ("DequantizeLinear", "Cast", "Transpose", "Reshape", "Identity", "Unsqueeze", "Squeeze")
"""What may stand between a weight as it is stored and the operator that reads it."""
FEW = " weights"
"""Behind the bits of weights that are multiplied in float."""


def of(artifact: Artifact) -> dict[str, str]:
    """``int8``, ``int4 weights``, ``fp16``, ``fp32`` … by the path of the module whose weight it is, in the order of
    computation; only what is not in float where the file is no ONNX graph. InputError where the file is damaged."""
    manifest = artifact.manifest
    if manifest.runtime != "onnx" or not manifest.model_file.endswith(".onnx"):
        return dict(manifest.quantized)
    try:
        graph = onnx.load(artifact.model_file, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise InputError(f"{artifact.model_file} cannot be read as ONNX: {error}.") from error
    makers = {output: node for node in graph.node for output in node.output}
    kinds = {one.name: one.data_type for one in graph.initializer}
    large = {one.name for one in graph.initializer if len(one.dims) > 1}
    found: dict[str, str] = {}
    for node in graph.node:
        for name in _weights(node):
            stored, widened = _stored(name, makers, kinds)
            if stored is None or (node.op_type == "Gather" and not widened and name not in large):
                continue  # a Gather also picks tokens and shapes
            path = node.name.partition("/")[0] or name
            said = _said(node, makers, stored, widened)
            found[path] = min(found.get(path, said), said, key=_bits)  # a table's scales are looked up beside it
    return found


def _weights(node: NodeProto) -> Iterator[str]:
    """The input of a node that is its weight, if it is an operator that has one."""
    place = {"QLinearMatMul": 3, "QLinearConv": 3, "QGemm": 3}.get(node.op_type, 1)
    if node.op_type in TABLES:
        yield node.input[0]
    elif node.op_type in PRODUCTS and len(node.input) > place:
        yield node.input[place]


def _stored(name: str, makers: dict[str, NodeProto], kinds: dict[str, int]) -> tuple[str | None, bool]:
    """The type in which a weight is kept, None where it is no constant; and whether it is made wider to be used."""
    widened = False
    while name not in kinds and name in makers and makers[name].op_type in THROUGH:
        widened = widened or makers[name].op_type in {"DequantizeLinear", "Cast"}
        name = makers[name].input[0]
    return STORED.get(kinds.get(name, TensorProto.UNDEFINED)), widened


def _said(node: NodeProto, makers: dict[str, NodeProto], stored: str, widened: bool) -> str:
    if node.op_type in {"MatMulNBits", "GatherBlockQuantized"}:
        bits = next((one.i for one in node.attribute if one.name == "bits"), 4)
        return f"int{bits}{FEW}"
    if node.op_type in TABLES and _bits(stored) < 16:
        return f"{stored}{FEW}"
    if not widened or node.op_type in WHOLE:
        return stored
    reads = makers.get(node.input[0])
    both = reads is not None and reads.op_type == "DequantizeLinear"  # the runtime computes such pairs in few bits
    return stored if both else f"{stored}{FEW}"


def _bits(said: str) -> int:
    return int("".join(filter(str.isdigit, said)))
