"""Explicit quantization: the planned products of a graph read QuantizeLinear and DequantizeLinear pairs.

A runtime that is strongly typed computes a product in 8 bits where both of its inputs come out of a DequantizeLinear.
TensorRT wants zero points of 0, so ranges are made symmetric. Weights are stored in 8 bits: INT8 codes with one scale
for each output channel, FP8 codes with one for all weights that read the same input. Tables, and products that are not
planned, stay in float.

The scales of channels do not stand in the DequantizeLinear. TensorRT multiplies one number in float32 as it adds up,
but a vector only after the sum was rounded to half precision, and a sum of raw codes can be beyond that. So weights are
dequantized by the one scale of the largest channel, and the product is multiplied by each channel's share of it.

Source: TensorRT documentation, "Explicit Quantization"; onnx.ai/onnx/operators/onnx__QuantizeLinear.html; for FP8
Micikevicius et al. 2022 (arXiv 2209.05433).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from ml_dtypes import float8_e4m3fn
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from ..errors import InputError
from ..plan import QuantizationPlan
from . import large
from .attention import constant, take_place
from .placement import Float, Product, siblings, signed, smoothing

OPSET = 21
"""The first in which scales are of any floating type."""


@dataclass(frozen=True)
class Grid:
    """What numbers of 8 bits stand for: ``largest`` times the scale is the end of the range."""

    dtype: np.dtype[Any]
    largest: float
    per_channel: bool
    """Whether each output channel of a weight has a scale of its own."""


GRIDS = {"int8": Grid(np.dtype(np.int8), 127.0, True), "fp8": Grid(np.dtype(float8_e4m3fn), 448.0, False)}


@dataclass(frozen=True)
class Quantized:
    """A weight: ``codes`` [in, out] times ``scale``, one number, times ``shares`` [out] where it has some."""

    codes: NDArray[Any]
    scale: NDArray[np.float32]
    shares: NDArray[np.float32] | None


def place(graph: onnx.ModelProto, plan: QuantizationPlan, scale_type: np.dtype[Any]) -> onnx.ModelProto:
    """``graph`` with the products of ``plan`` between quantized inputs, in float32 otherwise.

    Scales are float32 that ``scale_type`` holds exactly, so that the graph may be narrowed to it afterwards. Raises
    InputError where a range, a scale or a code of the plan does not fit the graph.
    """
    model = large.inferred(graph)
    model.opset_imports[""] = max(OPSET, model.opset_imports[""])
    for alike in siblings(model.graph, plan):
        _place(model.graph, alike, plan, scale_type)
    passes.RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


def _place(graph: ir.Graph, alike: Sequence[Product], plan: QuantizationPlan, scale_type: np.dtype[Any]) -> None:
    """Products of one input, which is quantized once for them all."""
    first, scales, grid = alike[0], smoothing(alike[0], plan), GRIDS[plan.scheme]
    value, label = first.input, first.node.name or first.name  # a module that runs twice has two nodes
    if scales.size:
        divide = ir.node("Mul", [value, constant(graph, f"{first.name}.smooth", 1 / scales)], name=f"{label}/Smooth")
        graph.insert_before(first.node, divide)
        value = _typed(divide, ir.DataType.FLOAT, first.input.shape)
    ends = [abs(end) for product in alike for end in plan.activations.get(product.name, (np.inf,))]
    if not 0 < max(ends) < np.inf:
        raise InputError(f"The input of '{first.name}' cannot be quantized over a range that ends at {max(ends):g}.")
    input_scale = constant(graph, f"{first.name}.input_scale", _held(np.asarray(max(ends) / grid.largest), scale_type))
    zero = constant(graph, f"{grid.dtype.name}.zero", np.zeros((), grid.dtype))
    quantize = ir.node("QuantizeLinear", [value, input_scale, zero], name=f"{label}/Input/QuantizeLinear")
    code = _typed(quantize, ir.DataType.from_numpy(grid.dtype), value.shape)
    back = ir.node("DequantizeLinear", [code, input_scale, zero], name=f"{label}/Input/DequantizeLinear")
    graph.insert_before(first.node, [quantize, back])
    read = _typed(back, ir.DataType.FLOAT, value.shape)
    largest = max(float(np.abs(_weight(one, plan)).max()) for one in alike)  # of one scale, they become one product
    for product in alike:
        _place_product(graph, product, read, _quantized(product, plan, largest, scale_type))


def _place_product(graph: ir.Graph, product: Product, value: ir.Value, weight: Quantized) -> None:
    label, out = product.node.name or product.name, product.node.outputs[0]
    inputs = [
        constant(graph, f"{label}.weight_codes", weight.codes),
        constant(graph, f"{label}.weight_scale", weight.scale),
        constant(graph, f"{weight.codes.dtype.name}.zero", np.zeros((), weight.codes.dtype)),
    ]
    back = ir.node("DequantizeLinear", inputs, name=f"{label}/DequantizeLinear")
    made = ir.node("MatMul", [value, _typed(back, ir.DataType.FLOAT, inputs[0].shape)], name=label)
    graph.insert_before(product.node, [back, made])
    result = _typed(made, ir.DataType.FLOAT, out.shape)
    for word, op_type, vector in (("Scale", "Mul", weight.shares), ("Bias", "Add", product.bias)):
        if vector is not None:
            node = ir.node(
                op_type, [result, constant(graph, f"{label}.{word.lower()}", vector)], name=f"{label}/{word}"
            )
            graph.insert_before(product.last, node)
            result = _typed(node, ir.DataType.FLOAT, out.shape)
    take_place(graph, product.last, result)


def _weight(product: Product, plan: QuantizationPlan) -> Float:
    """The weight [in, out] that is rounded: the product's own times the scales of its input channels."""
    scales = smoothing(product, plan)
    return product.weight * scales[:, None] if scales.size else product.weight


def _quantized(product: Product, plan: QuantizationPlan, largest: float, scale_type: np.dtype[Any]) -> Quantized:
    """The weight in codes, those of the plan where it has some; ``largest`` is what the one scale must reach."""
    grid, weight = GRIDS[plan.scheme], _weight(product, plan)
    scale = _held(np.asarray(largest / grid.largest), scale_type)
    if not grid.per_channel:
        return Quantized(np.clip(weight / scale, -grid.largest, grid.largest).astype(grid.dtype), scale, None)
    if product.name in plan.codes:
        codes, scales = signed(product, plan)
        return Quantized(codes, scale, _held(scales / scale, scale_type))
    shares = _held(np.abs(weight).max(axis=0) / grid.largest / scale, scale_type)
    codes = np.clip(np.rint(weight / (scale * shares)), -grid.largest, grid.largest).astype(grid.dtype)
    return Quantized(codes, scale, shares)


def _held(scales: NDArray[Any], scale_type: np.dtype[Any]) -> NDArray[np.float32]:
    """``scales`` rounded to what ``scale_type`` holds, none of them to nothing."""
    least = np.nextafter(np.zeros((), scale_type), np.ones((), scale_type))
    found: NDArray[np.float32] = np.maximum(scales.astype(scale_type), least).astype(np.float32)
    return found


def _typed(node: ir.Node, dtype: ir.DataType, shape: ir.Shape | None) -> ir.Value:
    """The output of ``node``, which takes this type and shape."""
    value = node.outputs[0]
    value.dtype, value.shape = dtype, shape
    return value
