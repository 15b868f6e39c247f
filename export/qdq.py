"""Explicit quantization: the planned products of a graph read QuantizeLinear and DequantizeLinear pairs.

A runtime that is strongly typed computes a product in 8 bits where both of its inputs come out of a DequantizeLinear.
TensorRT wants zero points of 0, so ranges are made symmetric: activations with one scale, weights with one for each
output channel in INT8, and in FP8 with one for all weights that read the same input. A kernel multiplies one scale in
float32 as it adds up; one for each channel comes after its result was rounded to half precision, whose range FP8's
codes, four times INT8's, would exceed. Weights are stored in 8 bits. Tables, and products that are not planned, stay
in float.

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
from .attention import constant, take_place
from .placement import Float, Product, products, signed, smoothing

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


def place(graph: onnx.ModelProto, plan: QuantizationPlan, scale_type: np.dtype[Any]) -> onnx.ModelProto:
    """``graph`` with the products of ``plan`` between quantized inputs, in float32 otherwise.

    Scales are float32 that ``scale_type`` holds exactly, so that the graph may be narrowed to it afterwards. Raises
    InputError where a range, a scale or a code of the plan does not fit the graph.
    """
    model = ir.from_proto(onnx.shape_inference.infer_shapes(graph))
    model.opset_imports[""] = max(OPSET, model.opset_imports[""])
    by_input: dict[tuple[ir.Value, bytes], list[Product]] = {}
    for product in products(model.graph, plan):
        by_input.setdefault((product.input, smoothing(product, plan).tobytes()), []).append(product)
    for siblings in by_input.values():
        _place(model.graph, siblings, plan, scale_type)
    passes.RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


def _place(graph: ir.Graph, siblings: Sequence[Product], plan: QuantizationPlan, scale_type: np.dtype[Any]) -> None:
    """Products of one input, which is quantized once for them all."""
    first, scales, grid = siblings[0], smoothing(siblings[0], plan), GRIDS[plan.scheme]
    value = first.input
    if scales.size:
        divide = ir.node(
            "Mul", [value, constant(graph, f"{first.name}.smooth", 1 / scales)], name=f"{first.name}/Smooth"
        )
        graph.insert_before(first.node, divide)
        value = _typed(divide, ir.DataType.FLOAT, first.input.shape)
    ends = [abs(end) for product in siblings for end in plan.activations.get(product.name, (np.inf,))]
    if not 0 < max(ends) < np.inf:
        raise InputError(f"The input of '{first.name}' cannot be quantized over a range that ends at {max(ends):g}.")
    input_scale = constant(graph, f"{first.name}.input_scale", _held(np.asarray(max(ends) / grid.largest), scale_type))
    zero = constant(graph, f"{plan.scheme}.zero", np.zeros((), grid.dtype))
    quantize = ir.node("QuantizeLinear", [value, input_scale, zero], name=f"{first.name}.input/QuantizeLinear")
    code = _typed(quantize, ir.DataType.from_numpy(grid.dtype), value.shape)
    back = ir.node("DequantizeLinear", [code, input_scale, zero], name=f"{first.name}.input/DequantizeLinear")
    graph.insert_before(first.node, [quantize, back])
    read = _typed(back, ir.DataType.FLOAT, value.shape)
    largest = None if grid.per_channel else np.asarray(max(np.abs(_weight(one, plan)).max() for one in siblings))
    for product in siblings:
        _place_product(graph, product, read, *_codes(product, plan, largest, scale_type))


def _place_product(
    graph: ir.Graph, product: Product, value: ir.Value, codes: NDArray[Any], scales: NDArray[np.float32]
) -> None:
    label, out = product.node.name or product.name, product.node.outputs[0]
    inputs = [
        constant(graph, f"{label}.weight_codes", codes),
        constant(graph, f"{label}.weight_scale", scales),
        constant(graph, f"weight_zeros{list(scales.shape)}", np.zeros(scales.shape, codes.dtype)),
    ]
    weight = ir.node("DequantizeLinear", inputs, {"axis": 1}, name=f"{label}/DequantizeLinear")
    made = ir.node("MatMul", [value, _typed(weight, ir.DataType.FLOAT, inputs[0].shape)], name=label)
    graph.insert_before(product.node, [weight, made])
    result = _typed(made, ir.DataType.FLOAT, out.shape)
    if product.bias is not None:
        add = ir.node("Add", [result, constant(graph, f"{label}.bias", product.bias)], name=f"{label}/Bias")
        graph.insert_before(product.last, add)
        result = add.outputs[0]
    take_place(graph, product.last, result)


def _weight(product: Product, plan: QuantizationPlan) -> Float:
    """The weight [in, out] that is rounded: the product's own times the scales of its input channels."""
    scales = smoothing(product, plan)
    return product.weight * scales[:, None] if scales.size else product.weight


def _codes(
    product: Product, plan: QuantizationPlan, largest: NDArray[Any] | None, scale_type: np.dtype[Any]
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """The weight's codes [in, out] and scales, those of the plan where it has some.

    One scale where it is told the ``largest`` weight that it must reach, else one for each output channel, [out].
    """
    if product.name in plan.codes:
        codes, scales = signed(product, plan)
        return codes, _held(scales, scale_type)
    grid, weight = GRIDS[plan.scheme], _weight(product, plan)
    scales = _held(np.asarray(np.abs(weight).max(axis=0) if largest is None else largest) / grid.largest, scale_type)
    codes = np.clip(weight / scales, -grid.largest, grid.largest)
    return (np.rint(codes) if plan.scheme == "int8" else codes).astype(grid.dtype), scales


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
