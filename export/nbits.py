"""Weights in blocks of few bits, as ONNX Runtime's own operators take them.

A product with a planned weight becomes ``com.microsoft::MatMulNBits``, a look-up in a planned table
``com.microsoft::GatherBlockQuantized``. Source: github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ..errors import InputError
from ..plan import Codes, QuantizationPlan
from .placement import names

DOMAIN = "com.microsoft"
ACCURACY_LEVEL = 4
"""Inputs of products are rounded to 8 bits a block as they come, which is what has fast kernels on a CPU."""

Bytes = NDArray[np.uint8]


def rewrite(graph: onnx.ModelProto, plan: QuantizationPlan, *, whole: bool = False) -> None:
    """Put the plan's codes in the place of the weights of ``graph``, which is in float; they name nodes or modules.

    A table that is also a product's weight is in the graph once, in another shape for the look-up. With ``whole`` each
    is a constant of its own, and inputs of products are padded to whole blocks: else OpenVINO does not read the codes.
    Raises InputError where the plan names a module that has no product or table in the graph, or gives no codes for it.
    """
    constants = {one.name for one in graph.graph.initializer}
    turned = {node.output[0] for node in graph.graph.node if node.op_type == "Transpose" and node.input[0] in constants}
    without = sorted(plan.weights.keys() - plan.codes.keys())
    if without:
        raise InputError(
            f"The plan stores '{without[0]}' in {plan.weights[without[0]]} but has no codes of its weight."
        )
    nodes, added, done = [], _Constants(), set()
    for node in graph.graph.node:
        name = next((name for name in names(node.name) if name in plan.codes), "")
        codes, made = plan.codes.get(name), None
        if codes is not None and node.op_type in {"MatMul", "Gemm"} and node.input[1] in constants | turned:
            made = _product(node, name, codes, added, whole=whole)
        elif codes is not None and node.op_type == "Gather" and node.input[0] in constants:
            made = _look_up(node, name, codes, added, whole=whole)
        if made:
            done.add(name)
        nodes += made or [node]
    missing = sorted(plan.codes.keys() - done)
    if missing:
        raise InputError(f"The plan quantizes '{missing[0]}', which is not a product or a table in this graph.")
    read = {name for node in nodes for name in node.input}
    nodes = [node for node in nodes if node.output[0] not in turned - read]
    read = {name for node in nodes for name in node.input}
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    kept = [one for one in graph.graph.initializer if one.name in read]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend([*kept, *added.tensors])
    if not any(one.domain == DOMAIN for one in graph.opset_import):
        graph.opset_import.append(helper.make_opsetid(DOMAIN, 1))


class _Constants:
    """Initializers to add; equal ones once, so that a tied table and head share theirs."""

    def __init__(self) -> None:
        self.tensors: list[onnx.TensorProto] = []
        self._names: dict[tuple[Any, ...], str] = {}

    def add(self, name: str, array: NDArray[Any]) -> str:
        key = (array.tobytes(), array.shape, array.dtype)
        if key not in self._names:
            self._names[key] = name
            self.tensors.append(numpy_helper.from_array(array, name))
        return self._names[key]


def packed(codes: Codes) -> tuple[Bytes, NDArray[np.float32], Bytes]:
    """The codes [out, blocks, bytes], scales [out, blocks] and zero points [out, bytes] as the operators hold them: of
    two 4-bit numbers in a byte the first in its lower half. Columns that fill up the last block are zeros."""
    scales, zeros = codes.scales.numpy(), codes.zeros.numpy()
    rows, count = scales.shape
    full = np.repeat(zeros, codes.block, axis=1)
    full[:, : codes.codes.shape[1]] = codes.codes.numpy()
    return _bytes(full.reshape(rows, count, codes.block), codes.bits), scales, _bytes(zeros, codes.bits)


def _bytes(numbers: Bytes, bits: int) -> Bytes:
    if bits == 8:
        return numbers
    even = np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, numbers.shape[-1] % 2)])
    joined: Bytes = np.bitwise_or(even[..., ::2], even[..., 1::2] << 4, dtype=np.uint8)
    return joined


def _product(node: onnx.NodeProto, name: str, codes: Codes, added: _Constants, *, whole: bool) -> list[onnx.NodeProto]:
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    if attributes.get("alpha", 1.0) != 1 or attributes.get("beta", 1.0) != 1 or attributes.get("transA", 0):
        raise InputError(f"The product of '{name}' is scaled or transposed in this graph, so it cannot be quantized.")
    numbers, scales, zeros = packed(codes)
    inputs = [node.input[0], added.add(f"{name}.codes", numbers), added.add(f"{name}.scales", scales)]
    symmetric = bool((codes.zeros == 2 ** (codes.bits - 1)).all())
    inputs.append("" if symmetric else added.add(f"{name}.zeros", zeros))
    if len(node.input) > 2:
        inputs += ["", node.input[2]]
    while not inputs[-1]:
        inputs.pop()
    rows, columns = codes.codes.shape
    made, missing = [], -columns % codes.block if whole else 0
    if missing:  # of a block that is not full OpenVINO makes floats; what is padded meets codes that stand for zeros
        amounts = added.add(f"{name}.pads", np.array([0, missing], dtype=np.int64))
        axes = added.add(f"{name}.axes", np.array([-1], dtype=np.int64))
        padded = f"{node.output[0]}.padded"  # a module that runs twice has two nodes
        made.append(helper.make_node("Pad", [inputs[0], amounts, "", axes], [padded], f"{node.name}/Pad"))
        inputs[0] = padded
    form: dict[str, Any] = {"K": columns + missing, "N": rows, "bits": codes.bits, "block_size": codes.block}
    made.append(
        helper.make_node(
            "MatMulNBits", inputs, node.output, node.name, domain=DOMAIN, accuracy_level=ACCURACY_LEVEL, **form
        )
    )
    return made


def _look_up(node: onnx.NodeProto, name: str, codes: Codes, added: _Constants, *, whole: bool) -> list[onnx.NodeProto]:
    """The look-up in the bytes that a product takes, so that a tied head has the same; where its blocks are filled up,
    or with ``whole``, in the columns that are real."""
    numbers, scales, zeros = packed(codes)
    rows, columns = codes.codes.shape
    inputs = [node.input[1], added.add(f"{name}.scales", scales), added.add(f"{name}.zeros", zeros)]
    form: dict[str, Any] = {"bits": codes.bits, "block_size": codes.block, "gather_axis": 0, "quantize_axis": 1}
    made = []
    if columns % codes.block or whole:
        table = added.add(
            f"{name}.codes", np.ascontiguousarray(numbers.reshape(rows, -1)[:, : columns * codes.bits // 8])
        )
    else:
        shape, table = added.add(f"{name}.shape", np.array([rows, -1], dtype=np.int64)), f"{node.output[0]}.table"
        held = added.add(f"{name}.codes", numbers)
        made.append(helper.make_node("Reshape", [held, shape], [table], f"{node.name}/Reshape"))
    look_up = helper.make_node("GatherBlockQuantized", [table, *inputs], node.output, node.name, domain=DOMAIN, **form)
    return [*made, look_up]
