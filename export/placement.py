"""Which integer kernels of ONNX Runtime compute a graph's products, and where their inputs are quantized.

A tensor is quantized to unsigned 8 bits once for all products that read it: with constants where its range is known,
and by its own range otherwise. Each product is one ``MatMulIntegerToFloat`` (com.microsoft): unsigned activations times
signed weights with one scale per output channel, bias added, float result. Tables stay in 8 bits and are dequantized
after the look-up. Nothing is left to ONNX Runtime's own fusions to find.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from ..errors import InputError
from ..plan import QuantizationPlan
from . import attention
from .attention import constant, take_place

CONTRIB = "com.microsoft"
LEVELS = 255
"""Steps of an unsigned 8-bit activation."""
LARGEST = 127
"""The largest signed 8-bit weight; -128 is left out, so that the scale is the same on both sides."""

SMOOTH = "/Smooth"
"""How the names of products by which inputs are smoothed end."""

Float = NDArray[np.float32]


@dataclass(frozen=True)
class Product:
    """A MatMul or Gemm with a constant weight [in, out], and the bias [out] that it or the Add after it adds."""

    name: str
    """What the plan calls it."""
    node: ir.Node
    weight: Float
    bias: Float | None
    last: ir.Node
    """The node whose output is the result with the bias in it."""

    @property
    def input(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value


def place(graph: onnx.ModelProto, plan: QuantizationPlan) -> onnx.ModelProto:
    """``graph`` with the products and tables of ``plan`` in 8 bits.

    The plan names nodes, or the modules that they are named after (``module/MatMul``). A planned operator of another
    kind is left as it is. Raises InputError where the plan's ranges, scales or codes do not fit the graph.
    """
    model = ir.from_proto(graph)
    model.opset_imports.setdefault(CONTRIB, 1)
    for alike in siblings(model.graph, plan):
        _place_products(model.graph, alike, plan)
    for node in list(model.graph):
        if planned(node, plan) and node.op_type == "Gather":
            place_table(model.graph, node)
    attention.fuse(model)
    passes.RemoveUnusedNodesPass()(model)
    _hasten_gelus(model.graph)
    return ir.to_proto(model)


def products(graph: ir.Graph, plan: QuantizationPlan) -> list[Product]:
    """The planned products of a graph that have a constant matrix on their right."""
    found = []
    for node in graph:
        name = planned(node, plan)
        if not name or node.op_type not in {"MatMul", "Gemm"}:
            continue
        weight = _constant(node.inputs[1])
        if weight is None or weight.ndim != 2 or (node.attributes.get_int("transA") or 0):
            continue
        bias, last = None, node
        if node.op_type == "Gemm":
            weight = (weight.T if node.attributes.get_int("transB") else weight) * node.attributes.get_float(
                "alpha", 1.0
            )
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                bias = _constant(node.inputs[2])
                if bias is None:
                    continue
                bias = np.broadcast_to(bias * node.attributes.get_float("beta", 1.0), (1, weight.shape[1]))[0]
        elif (after := _bias_after(node, weight.shape[1])) is not None:
            last, bias = after
        found.append(Product(name, node, weight, bias, last))
    return found


def siblings(graph: ir.Graph, plan: QuantizationPlan) -> list[list[Product]]:
    """The planned products, those together that read one input under one smoothing."""
    by_input: dict[tuple[ir.Value, bytes], list[Product]] = {}
    for product in products(graph, plan):
        by_input.setdefault((product.input, smoothing(product, plan).tobytes()), []).append(product)
    return list(by_input.values())


def names(node: str) -> tuple[str, str]:
    """What a plan may call a node: its own name, or the module that it comes from."""
    return node, node.rsplit("/", 1)[0]


def planned(node: ir.Node, plan: QuantizationPlan) -> str:
    """What the plan calls the node, or nothing."""
    return next((name for name in names(node.name or "") if plan.weights.get(name) in {"int8", "fp8"}), "")


def _constant(value: ir.Value | None) -> Float | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy().astype(np.float32, copy=False)


def _bias_after(node: ir.Node, width: int) -> tuple[ir.Node, Float] | None:
    """The only reader of a product's result where it adds a constant vector, and that vector."""
    uses = tuple(node.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    bias = _constant(uses[0].node.inputs[1 - uses[0].idx])
    return None if bias is None or bias.shape != (width,) else (uses[0].node, bias)


def smoothing(product: Product, plan: QuantizationPlan) -> Float:
    """What the input is divided by before it is quantized, [in]; empty where it is not."""
    scales = plan.smooth.get(product.name)
    if scales is None:
        return np.empty(0, np.float32)
    made = scales.numpy().astype(np.float32)
    if made.shape != product.weight.shape[:1] or not (np.isfinite(made).all() and (made > 0).all()):
        raise InputError(
            f"The plan smooths '{product.name}' by {made.size} scales, the least {made.min(initial=np.inf):g}; "
            f"it takes {product.weight.shape[0]} positive ones."
        )
    return made


def _hasten_gelus(graph: ir.Graph) -> None:
    """GELU by tanh where the result is quantized anyway: 1e-3 off at most, a third faster than by erf."""
    for node in graph:
        standard = node.op_type == "Gelu" and node.domain in {"", "ai.onnx"}  # ONNX Runtime's own has no such word
        readers = _readers(node) if standard else set()
        if readers and readers <= {"QuantizeLinear", "DynamicQuantizeLinear"}:
            node.attributes["approximate"] = ir.AttrString("approximate", "tanh")


def _readers(node: ir.Node) -> set[str]:
    """The kinds of what reads a node's result, behind its smoothing."""
    found = {use.node for use in node.outputs[0].uses()}
    behind = {use.node for one in found if (one.name or "").endswith(SMOOTH) for use in one.outputs[0].uses()}
    return {one.op_type for one in behind or found}


def _place_products(graph: ir.Graph, alike: Sequence[Product], plan: QuantizationPlan) -> None:
    """Products of one input, which is quantized once for them all."""
    first, smooth = alike[0], smoothing(alike[0], plan)
    value, label = first.input, first.node.name or first.name  # a module that runs twice has two nodes
    if smooth.size:
        inverse = constant(graph, f"{first.name}.smooth", 1 / smooth)
        divide = ir.node("Mul", [value, inverse], name=f"{label}{SMOOTH}")
        graph.insert_before(first.node, divide)
        value = divide.outputs[0]
    spans = [plan.activations.get(product.name) for product in alike]
    known = [span for span in spans if span is not None]
    if known and len(known) == len(spans):
        scale, zero = unsigned(min(low for low, _ in known), max(high for _, high in known), first.name)
        constants = [constant(graph, f"{first.name}.input_scale", scale)]
        constants.append(constant(graph, f"{first.name}.input_zero_point", zero))
        quantize = ir.node("QuantizeLinear", [value, *constants], name=f"{label}/QuantizeLinear")
        quantized = (quantize.outputs[0], constants[0], constants[1])
    else:
        quantize = ir.node("DynamicQuantizeLinear", [value], num_outputs=3, name=f"{label}/DynamicQuantizeLinear")
        quantized = (quantize.outputs[0], quantize.outputs[1], quantize.outputs[2])
    graph.insert_before(first.node, quantize)
    for product in alike:
        _place_product(graph, product, plan, quantized)


def _place_product(
    graph: ir.Graph, product: Product, plan: QuantizationPlan, quantized: tuple[ir.Value, ir.Value, ir.Value]
) -> None:
    codes, scales = signed(product, plan)
    value, scale, zero = quantized
    label = product.node.name or product.name
    weight = constant(graph, f"{label}.weight_quantized", codes)
    weight_scales = constant(graph, f"{label}.weight_scale", scales)
    bias = None if product.bias is None else constant(graph, f"{label}.bias", product.bias)
    inputs = [value, weight, scale, weight_scales, zero, None, bias]
    made = ir.node("MatMulIntegerToFloat", inputs, domain=CONTRIB, name=label)
    graph.insert_before(product.node, made)
    take_place(graph, product.last, made.outputs[0])


def signed(product: Product, plan: QuantizationPlan) -> tuple[NDArray[np.int8], Float]:
    """The weight's codes [in, out] and scales [out], those of the plan where it has some."""
    given = plan.codes.get(product.name)
    if given is None:
        smooth = smoothing(product, plan)
        weight = product.weight * smooth[:, None] if smooth.size else product.weight
        scales = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny * LEVELS) / LARGEST
        codes = np.clip(np.rint(weight / scales), -LARGEST, LARGEST).astype(np.int8)
        return codes, scales.astype(np.float32)
    fits = given.codes.shape == product.weight.shape[::-1] and given.scales.shape[1] == 1
    if not fits or given.bits > 8 or int(given.zeros.min()) != int(given.zeros.max()):
        raise InputError(
            f"The plan's codes of '{product.name}' are {tuple(given.codes.shape)} with {given.scales.shape[1]} scales "
            f"a row; int8 takes {product.weight.shape[::-1]} with one, and one zero for all."
        )
    codes = given.codes.numpy().astype(np.int16) - given.zeros.numpy().astype(np.int16)
    return np.ascontiguousarray(codes.T).astype(np.int8), given.scales.numpy()[:, 0].astype(np.float32)


def unsigned(low: float, high: float, name: str) -> tuple[Float, NDArray[np.uint8]]:
    """Scale and zero point of a range, widened to hold 0, which must be exact."""
    low, high = min(low, 0.0), max(high, 0.0)
    if not (np.isfinite([low, high]).all() and low < high):
        raise InputError(f"The input of '{name}' cannot be quantized over the range {low:g} to {high:g}.")
    scale = np.float32((high - low) / LEVELS)
    return np.asarray(scale), np.asarray(np.clip(np.rint(-low / scale), 0, LEVELS), np.uint8)


def place_table(graph: ir.Graph, node: ir.Node) -> None:
    """A look-up of rows in 8 bits, each row with its own scale; nothing where they are not rows of a constant."""
    table, name = _constant(node.inputs[0]), node.inputs[0].name if node.inputs[0] is not None else ""
    if table is None or table.ndim != 2 or node.attributes.get_int("axis", 0) != 0:
        return
    scales = np.maximum(np.abs(table).max(axis=1, keepdims=True), np.finfo(np.float32).tiny * LEVELS) / LARGEST
    codes = np.clip(np.rint(table / scales), -LARGEST, LARGEST).astype(np.int8)
    looked, scale = (
        ir.node("Gather", [constant(graph, f"{name}.{part}", array), node.inputs[1]], name=f"{node.name}/{part}")
        for part, array in (("codes", codes), ("scales", scales.astype(np.float32)))
    )
    cast = ir.node("Cast", [looked.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{node.name}/Cast")
    back = ir.node("Mul", [cast.outputs[0], scale.outputs[0]], name=f"{node.name}/Mul")
    graph.insert_before(node, [looked, scale, cast, back])
    take_place(graph, node, back.outputs[0])
