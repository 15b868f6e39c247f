"""QuantizeLinear and DequantizeLinear pairs, placed where OpenVINO's CPU kernels of 8 bits start from.

OpenVINO computes a product in integers where its left input was quantized and dequantized, in one scale and zero point,
and its right one is a constant of signed 8 bits that is dequantized by a scale for each output channel. Then the bias,
a GELU and the quantization of the next product's input become part of the same kernel, and what lies between products
goes on in the float type that the CPU is fastest in. Ranges, smoothing and codes are the plan's.

Of attention's two products, which have activations on both sides, the first is computed in 8 bits where the plan knows
the ranges of queries and keys. The second is not: among n keys that are attended to alike each has a share of 1/n,
which is few steps of 1/255. Tables stay in 8 bits and are dequantized after the look-up.

Source: docs.openvino.ai, "Low Precision Transformations" and "Quantized Model"; onnx.ai/onnx/operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from ..errors import InputError
from ..plan import QuantizationPlan
from .attention import constant, take_place
from .placement import LARGEST, Float, Product, place_table, planned, siblings, signed, smoothing, unsigned

OPSET = 13
"""The first in which a weight has a scale for each channel."""
MOVES = {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand"}

Zero = NDArray[np.uint8] | NDArray[np.int8]


def place(graph: onnx.ModelProto, plan: QuantizationPlan) -> onnx.ModelProto:
    """``graph`` with the products and tables of ``plan`` in 8 bits, in float32 otherwise.

    Raises InputError where the plan names what is no product or table of the graph, or its ranges, scales or codes do
    not fit.
    """
    model = ir.from_proto(graph)
    model.opset_imports[""] = max(OPSET, model.opset_imports[""])
    done = set()
    together = siblings(model.graph, plan)
    _place_attention(model.graph, [product for alike in together for product in alike], plan)
    for alike in together:
        _place(model.graph, alike, plan)
        done |= {product.name for product in alike}
    for node in list(model.graph):
        if node.op_type == "Gather" and (name := planned(node, plan)):
            place_table(model.graph, node)
            done.add(name)
    missing = sorted(plan.weights.keys() - done)
    if missing:
        raise InputError(f"The plan quantizes '{missing[0]}', which is not a product or a table in this graph.")
    passes.RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


def _place(graph: ir.Graph, alike: Sequence[Product], plan: QuantizationPlan) -> None:
    """Products of one input, which is quantized once for them all."""
    first, smooth = alike[0], smoothing(alike[0], plan)
    value, label = first.input, first.node.name or first.name  # a module that runs twice has two nodes
    if not smooth.size and _maker(value) is not value:
        # Behind a move rounding is a kernel of its own, which OpenVINO has for float32 alone: it would convert bfloat16
        # first. As part of a product with ones it is not.
        smooth = np.ones(first.weight.shape[0], np.float32)
    if smooth.size:
        divide = ir.node("Mul", [value, constant(graph, f"{first.name}.smooth", 1 / smooth)], name=f"{label}/Smooth")
        graph.insert_before(first.node, divide)
        value = divide.outputs[0]
    spans = [plan.activations.get(product.name, (np.inf, -np.inf)) for product in alike]
    scale, zero = unsigned(min(low for low, _ in spans), max(high for _, high in spans), first.name)
    quantize, back = _pair(graph, value, scale, zero, f"{label}/Input")
    graph.insert_before(first.node, [quantize, back])
    for product in alike:
        _place_product(graph, product, plan, back.outputs[0])


def _place_product(graph: ir.Graph, product: Product, plan: QuantizationPlan, value: ir.Value) -> None:
    codes, scales = signed(product, plan)
    label = product.node.name or product.name
    held = [constant(graph, f"{label}.weight_codes", codes), constant(graph, f"{label}.weight_scale", scales)]
    weight = ir.node("DequantizeLinear", held, {"axis": 1}, name=f"{label}/DequantizeLinear")
    last = ir.node("MatMul", [value, weight.outputs[0]], name=label)
    graph.insert_before(product.node, [weight, last])
    if product.bias is not None:
        bias = constant(graph, f"{label}.bias", product.bias)
        last = ir.node("Add", [last.outputs[0], bias], name=f"{label}/Bias")
        graph.insert_before(product.last, last)
    take_place(graph, product.last, last.outputs[0])


def _pair(graph: ir.Graph, value: ir.Value, scale: Float, zero: Zero, label: str) -> tuple[ir.Node, ir.Node]:
    grid = [constant(graph, f"{label}.scale", scale), constant(graph, f"{label}.zero_point", zero)]
    quantize = ir.node("QuantizeLinear", [value, *grid], name=f"{label}/QuantizeLinear")
    return quantize, ir.node("DequantizeLinear", [quantize.outputs[0], *grid], name=f"{label}/DequantizeLinear")


def _place_attention(graph: ir.Graph, products: Sequence[Product], plan: QuantizationPlan) -> None:
    """Quantize what is multiplied in each product of two activations, where the range of both is known."""
    ranges = {one.last.outputs[0]: plan.outputs[one.name] for one in products if one.name in plan.outputs}
    wanted: dict[ir.Value, str] = {}
    for node in graph:
        makers = [_maker(value) for value in node.inputs] if node.op_type == "MatMul" else []
        if makers and all(maker in ranges for maker in makers):
            wanted |= {maker: f"{node.name}/{side}" for maker, side in zip(makers, "AB", strict=True) if maker}
    for value, label in wanted.items():
        producer = value.producer()
        assert producer is not None
        quantize, back = _pair(graph, value, *_symmetric(*ranges[value]), label)
        value.replace_all_uses_with(back.outputs[0])
        quantize.replace_input_with(0, value)
        graph.insert_after(producer, [quantize, back])


def _maker(value: ir.Value | None) -> ir.Value | None:
    """What ``value`` is a view of: the value before nodes that move numbers and change none."""
    node = None if value is None else value.producer()
    return _maker(node.inputs[0]) if node is not None and node.op_type in MOVES else value


def _symmetric(low: float, high: float) -> tuple[Float, Zero]:
    """Scale and a zero point of 0, which products of two activations want."""
    scale = max(-low, high, np.finfo(np.float32).tiny * LARGEST) / LARGEST
    return np.asarray(scale, np.float32), np.zeros((), np.int8)
