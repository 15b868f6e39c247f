"""QuantizeLinear and DequantizeLinear pairs, placed where OpenVINO's CPU kernels of 8 bits start from.

OpenVINO computes a product in integers where its left input was quantized and dequantized, in one scale and zero point,
and its right one is a constant of signed 8 bits that is dequantized by a scale for each output channel. Then the bias,
a GELU and the quantization of the next product's input become part of the same kernel, and what lies between products
goes on in the float type that the CPU is fastest in. Ranges, smoothing and codes are the plan's.

Tables stay in 8 bits and are dequantized after the look-up.

Source: docs.openvino.ai, "Low Precision Transformations" and "Quantized Model"; onnx.ai/onnx/operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from ..errors import InputError
from ..plan import QuantizationPlan
from .attention import constant, take_place
from .placement import Product, place_table, planned, siblings, signed, smoothing, unsigned

OPSET = 13
"""The first in which a weight has a scale for each channel."""


def place(graph: onnx.ModelProto, plan: QuantizationPlan) -> onnx.ModelProto:
    """``graph`` with the products and tables of ``plan`` in 8 bits, in float32 otherwise.

    Raises InputError where the plan names what is no product or table of the graph, or its ranges, scales or codes do
    not fit.
    """
    model = ir.from_proto(graph)
    model.opset_imports[""] = max(OPSET, model.opset_imports[""])
    done = set()
    for alike in siblings(model.graph, plan):
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
    if smooth.size:
        divide = ir.node("Mul", [value, constant(graph, f"{first.name}.smooth", 1 / smooth)], name=f"{label}/Smooth")
        graph.insert_before(first.node, divide)
        value = divide.outputs[0]
    spans = [plan.activations.get(product.name, (np.inf, -np.inf)) for product in alike]
    scale, zero = unsigned(min(low for low, _ in spans), max(high for _, high in spans), first.name)
    grid = [
        constant(graph, f"{first.name}.input_scale", scale),
        constant(graph, f"{first.name}.input_zero_point", zero),
    ]
    quantize = ir.node("QuantizeLinear", [value, *grid], name=f"{label}/QuantizeLinear")
    back = ir.node("DequantizeLinear", [quantize.outputs[0], *grid], name=f"{label}/Input/DequantizeLinear")
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
