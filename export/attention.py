"""Attention as one operator.

Exported attention is two products around a softmax, with four transposes and the arithmetic of their shapes. ONNX
Runtime's CPU kernel of the standard operator ``Attention`` (opset 23) reads queries, keys and values as the linear
layers leave them and adds the mask on the way. Where the pattern is not found, the graph stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

OPSET = 23
"""The first with the operator."""
LEAST = 18
"""The first from which on a graph means the same in that one."""


@dataclass(frozen=True)
class Heads:
    """A tensor [batch, length, heads * size] that is about to be read as [batch, heads, length, size]."""

    value: ir.Value
    heads: int
    size: int


def fuse(model: ir.Model) -> int:
    """Put one ``Attention`` in place of each softmax attention over heads; returns how many there were.

    A graph in an operator set before ``LEAST`` stays as it is: by some operators that means something else.
    """
    if model.opset_imports.get("", OPSET) < LEAST:
        return 0
    wide: dict[ir.Value, ir.Value] = {}
    fused = sum(_fuse(model.graph, node, wide) for node in list(model.graph) if node.op_type == "Softmax")
    if fused:
        model.opset_imports[""] = max(OPSET, model.opset_imports[""])
    return fused


def _fuse(graph: ir.Graph, softmax: ir.Node, wide: dict[ir.Value, ir.Value]) -> bool:
    """``wide`` holds the masks made so far that have a row for each query, by the mask that they were made from."""
    product, merged = _only_reader(softmax, "MatMul"), None
    if product is not None and product.inputs[0] is softmax.outputs[0]:
        merged = _merged(product)
    if product is None or merged is None or softmax.attributes.get_int("axis", -1) not in {-1, 3}:
        return False
    scaled, mask = _without_mask(softmax.inputs[0])
    scores, scale = _without_scale(scaled)
    if scores is None or scores.op_type != "MatMul":
        return False
    query, value = _heads(scores.inputs[0]), _heads(product.inputs[1])
    key = _heads(scores.inputs[1], (0, 2, 3, 1)) or _heads(_before_transpose(scores.inputs[1], (0, 1, 3, 2)))
    if query is None or key is None or value is None or key.heads != value.heads or query.heads != key.heads:
        return False
    if not _same_sizes(query.value.shape, merged.outputs[0].shape):
        return False
    if mask is not None:
        if mask.shape is None or len(mask.shape) != 4:
            return False
        if mask.shape[2] == 1:
            mask = wide.get(mask) or wide.setdefault(mask, _widened(graph, mask, query, scores))
    made = ir.node(
        "Attention",
        [query.value, key.value, value.value, *([] if mask is None else [mask])],
        {"q_num_heads": query.heads, "kv_num_heads": key.heads, "scale": scale},
        name=(softmax.name or "").removesuffix("Softmax") + "Attention",
    )
    graph.insert_before(softmax, made)
    take_place(graph, merged, made.outputs[0])
    return True


def take_place(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """``value`` is read wherever the output of ``node`` was, under the same name."""
    old = node.outputs[0]
    value.name, value.shape, value.type = old.name, old.shape, old.type
    old.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def constant(graph: ir.Graph, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ir.Value:
    """An initializer, made once for a name."""
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]


def _only_reader(node: ir.Node, op_type: str) -> ir.Node | None:
    uses = node.outputs[0].uses()
    readers = {use.node for use in uses}
    if len(readers) != 1 or node.outputs[0].is_graph_output():
        return None
    (reader,) = readers
    return reader if reader.op_type == op_type else None


def _merged(product: ir.Node) -> ir.Node | None:
    """The Reshape after which the heads' results stand side by side, [batch, length, heads * size]."""
    transpose = _only_reader(product, "Transpose")
    if transpose is None or tuple(transpose.attributes.get_ints("perm", ())) != (0, 2, 1, 3):
        return None
    reshape = _only_reader(transpose, "Reshape")
    shape = None if reshape is None else reshape.outputs[0].shape
    return reshape if shape is not None and len(shape) == 3 else None


def _without_mask(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """Scores and what is added to them."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Add":
        return value, None
    products = [at for at in (0, 1) if _without_scale(node.inputs[at])[0] is not None]
    return (node.inputs[products[0]], node.inputs[1 - products[0]]) if len(products) == 1 else (None, None)


def _without_scale(value: ir.Value | None) -> tuple[ir.Node | None, float]:
    """The MatMul behind scores, and the constant that its result is multiplied by."""
    node = None if value is None else value.producer()
    if node is None or node.op_type not in {"Mul", "Div", "MatMul"}:
        return None, 1.0
    if node.op_type == "MatMul":
        return node, 1.0
    tensor = None if node.inputs[1] is None else ir.convenience.get_const_tensor(node.inputs[1])
    before = None if node.inputs[0] is None else node.inputs[0].producer()
    if tensor is None or tensor.size != 1 or before is None or before.op_type != "MatMul":
        return None, 1.0
    factor = float(tensor.numpy().item())
    return before, factor if node.op_type == "Mul" else 1 / factor


def _heads(value: ir.Value | None, perm: tuple[int, ...] = (0, 2, 1, 3)) -> Heads | None:
    reshaped = _before_transpose(value, perm)
    node = None if reshaped is None else reshaped.producer()
    if reshaped is None or node is None or node.op_type != "Reshape" or reshaped.shape is None:
        return None
    flat, shape = node.inputs[0], reshaped.shape
    if flat is None or flat.shape is None or len(flat.shape) != 3 or len(shape) != 4:
        return None
    heads, size = shape[2], shape[3]
    if not isinstance(heads, int) or not isinstance(size, int) or flat.shape[2] != heads * size:
        return None
    return Heads(flat, heads, size) if _same_rows(node) else None


def _same_rows(reshape: ir.Node) -> bool:
    """Whether a Reshape leaves batch and length as they are; windows, for one, become rows of their own."""
    target = None if reshape.inputs[1] is None else ir.convenience.get_const_tensor(reshape.inputs[1])
    if target is not None and not reshape.attributes.get_int("allowzero", 0) and not target.numpy()[:2].any():
        return True
    return reshape.inputs[0] is not None and _same_sizes(reshape.inputs[0].shape, reshape.outputs[0].shape)


def _same_sizes(one: ir.Shape | None, other: ir.Shape | None) -> bool:
    """Whether two shapes are known to begin with the same two sizes."""
    if one is None or other is None:
        return False
    pairs = [(one[axis], other[axis]) for axis in (0, 1)]
    return all(a == b and not (isinstance(a, ir.SymbolicDim) and a.value is None) for a, b in pairs)


def _before_transpose(value: ir.Value | None, perm: tuple[int, ...]) -> ir.Value | None:
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Transpose" or tuple(node.attributes.get_ints("perm", ())) != perm:
        return None
    return node.inputs[0]


def _widened(graph: ir.Graph, mask: ir.Value, query: Heads, before: ir.Node) -> ir.Value:
    """``mask`` [batch, heads, 1, keys] with a row for each query, as the operator wants it."""
    ones = constant(graph, "attention.ones", np.ones(2, np.int64))
    one = constant(graph, "attention.one", np.ones(1, np.int64))
    length = ir.node("Shape", [query.value], {"start": 1, "end": 2})
    shape = ir.node("Concat", [ones, length.outputs[0], one], {"axis": 0})
    wide = ir.node("Expand", [mask, shape.outputs[0]])
    graph.insert_before(before, [length, shape, wide])
    return wide.outputs[0]
