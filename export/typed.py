"""Half precision written into a float graph: what is computed in it, and what stays in float32.

A strongly typed engine computes each operator in the type of its inputs, so the graph decides. Products, convolutions
and tables are narrow. Normalisation and softmax are computed in float32, also where an exporter has spelled them out as
a power, a mean and a root. Anything else follows its inputs: it is narrow where all of them are, and every constant
that it reads fits. So the additive mask, made of whole numbers with the least float in it, stays wide.

Source: Micikevicius et al. 2018 (arXiv 1710.03740), section 3.3; TensorRT documentation, "Strongly Typed Networks".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from ml_dtypes import finfo
from onnx_ir.passes import common as passes

from ..errors import InputError
from . import large

TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
NARROW = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "DequantizeLinear"}
"""Always computed in the narrow type, as is a Gather from a table; of a DequantizeLinear this is said of its scale."""
PROTECTED = {
    "LayerNormalization",
    "RMSNormalization",
    "InstanceNormalization",
    "GroupNormalization",
    "Softmax",
    "Sin",
    "Cos",
}
"""Computed in float32; what comes out is of the size of one and is narrowed at once."""
WIDE = {
    "Pow",
    "Sqrt",
    "Reciprocal",
    "Exp",
    "Log",
    "LogSoftmax",
    "ReduceMean",
    "ReduceSum",
    "ReduceL2",
    "ReduceSumSquare",
}
"""Computed in float32, and so is what reads them, up to the next product: the parts of a normalisation."""
FLOAT_ARGUMENTS = {"Resize", "Range"}
"""Operators with arguments that are float32 whatever the type of their data."""


def narrow(graph: onnx.ModelProto, scheme: str) -> onnx.ModelProto:
    """``graph`` computed in ``scheme``, "fp16" or "bf16"; its inputs and outputs keep their types.

    Raises InputError, naming the operator, where a weight of a product is beyond the type's range.
    """
    model = large.inferred(graph)
    writer = _Writer(model.graph, TYPES[scheme])
    for node in list(model.graph):
        writer.visit(node)
    for place, output in enumerate(model.graph.outputs):
        if output.dtype == writer.dtype:
            model.graph.outputs[place] = _renamed(output, writer.cast(output, ir.DataType.FLOAT))
    passes.RemoveUnusedNodesPass()(model)
    return ir.to_proto(model)


def emulated(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A bfloat16 graph for a runtime that can only cast to it: what is cast is rounded, all is computed in float32."""
    model = ir.from_proto(graph)
    for value in list(model.graph.initializers.values()):
        if value.dtype == ir.DataType.BFLOAT16 and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
    for node in list(model.graph):
        if node.op_type == "Cast" and node.attributes.get_int("to") == ir.DataType.BFLOAT16:
            back = ir.node("Cast", [node.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{node.name}/Back")
            node.outputs[0].replace_all_uses_with(back.outputs[0])
            back.replace_input_with(0, node.outputs[0])
            model.graph.insert_after(node, back)
    made = ir.to_proto(model)
    del made.graph.value_info[:]
    return made


class _Writer:
    """The pass over the nodes in their order; a value's own ``dtype`` says what it has become."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self.graph, self.dtype = graph, dtype
        self.largest = float(finfo(dtype.numpy()).max)  # type: ignore[no-untyped-call]
        self.cast_to: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def visit(self, node: ir.Node) -> None:
        if node.op_type == "Cast" or node.op_type in FLOAT_ARGUMENTS:
            return
        floats = [
            value for value in node.inputs if value is not None and value.dtype in {ir.DataType.FLOAT, self.dtype}
        ]
        if not floats:
            return
        computed = self._type(node, floats)
        for place, value in enumerate(node.inputs):
            if value in floats and value is not None and value.dtype != computed:
                node.replace_input_with(place, self.cast(value, computed, node))
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT:
                output.dtype = computed
        if node.op_type in PROTECTED:
            self._narrow_output(node)

    def _type(self, node: ir.Node, floats: Sequence[ir.Value]) -> ir.DataType:
        if node.op_type in NARROW:
            return self.dtype
        if (
            node.op_type == "Gather"
        ):  # of anything but a table, a mask with the least float in it for one, it only picks
            wide = ir.convenience.get_const_tensor(floats[0]) is None and floats[0].dtype == ir.DataType.FLOAT
            return ir.DataType.FLOAT if wide else self.dtype
        if node.op_type in PROTECTED | WIDE:
            return ir.DataType.FLOAT
        constants = [value for value in floats if ir.convenience.get_const_tensor(value) is not None]
        others = [value for value in floats if value not in constants]
        fits = all(self._fits(value) for value in constants)
        return self.dtype if others and fits and all(v.dtype == self.dtype for v in others) else ir.DataType.FLOAT

    def _fits(self, value: ir.Value) -> bool:
        tensor = ir.convenience.get_const_tensor(value)
        assert tensor is not None
        return float(np.abs(tensor.numpy().astype(np.float32)).max(initial=0)) <= self.largest

    def cast(self, value: ir.Value, dtype: ir.DataType, before: ir.Node | None = None) -> ir.Value:
        """``value`` in ``dtype``, made once: a constant is stored in it, anything else cast where it is made."""
        if (value, dtype) in self.cast_to:
            return self.cast_to[value, dtype]
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            if dtype == self.dtype and not self._fits(value):
                name = before.name if before is not None else value.name
                raise InputError(
                    f"A weight of '{name}' is beyond the range of {dtype.name.lower()}, {self.largest:.4g}."
                )
            array = tensor.numpy().astype(dtype.numpy())
            made = ir.val(f"{value.name}.{dtype.name.lower()}", const_value=ir.tensor(array, dtype))
            self.graph.register_initializer(made)
        else:
            node = ir.node("Cast", [value], {"to": dtype}, name=f"{value.name}/Cast")
            made = node.outputs[0]
            made.name, made.dtype, made.shape = f"{value.name}.{dtype.name.lower()}", dtype, value.shape
            producer = value.producer()
            if producer is not None:
                self.graph.insert_after(producer, node)
            else:
                self.graph.insert_before(self.graph[0], node)
        self.cast_to[value, dtype] = made
        return made

    def _narrow_output(self, node: ir.Node) -> None:
        """Whoever reads the first output of ``node`` reads it narrow."""
        wide = node.outputs[0]
        uses = list(wide.uses())
        made = self.cast(wide, self.dtype)
        for use in uses:
            use.node.replace_input_with(use.idx, made)


def _renamed(old: ir.Value, new: ir.Value) -> ir.Value:
    """``new`` under the name of ``old``, which takes another."""
    new.name, old.name = old.name, f"{old.name}.narrow"
    return new
