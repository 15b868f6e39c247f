"""Weights stored in half precision in a float graph: each is cast to float32 where it is read.

A runtime folds the cast of a constant as it loads the file. A table is cast after the look-up, so it stays small.
"""

from __future__ import annotations

import numpy as np
import onnx
from ml_dtypes import bfloat16
from onnx import TensorProto, helper, numpy_helper

from ..errors import InputError
from ..plan import QuantizationPlan

TYPES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(bfloat16)}


def store(graph: onnx.ModelProto, plan: QuantizationPlan) -> None:
    """Store the constants that ``plan``'s modules read in its type; single numbers, such as an epsilon, stay.

    Raises InputError where a number becomes infinite.
    """
    dtype = TYPES[plan.scheme]
    constants = {one.name: one for one in graph.graph.initializer if one.data_type == TensorProto.FLOAT}
    many = {name for name, one in constants.items() if np.prod(one.dims) > 1}
    stored: dict[str, str] = {}
    for node in graph.graph.node:
        module = node.name.rsplit("/", 1)[0]
        if module in plan.weights:
            stored |= dict.fromkeys(many.intersection(node.input), module)
    for name, module in stored.items():
        with np.errstate(over="ignore"):
            narrow = numpy_helper.to_array(constants[name]).astype(dtype)
        if not np.isfinite(narrow.astype(np.float32)).all():
            raise InputError(f"A weight of '{module}' is beyond the range of {plan.scheme}.")
        constants[name].CopyFrom(numpy_helper.from_array(narrow, name))
    known = [one for one in graph.graph.value_info if one.name not in stored]  # the exporter notes types of constants
    del graph.graph.value_info[:]
    graph.graph.value_info.extend(known)
    casts: dict[str, onnx.NodeProto] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.graph.node:
        nodes.append(node)
        if node.op_type == "Gather" and node.input[0] in stored:
            found, narrow_found = node.output[0], f"{node.output[0]}.{plan.scheme}"
            node.output[0] = narrow_found
            nodes.append(helper.make_node("Cast", [narrow_found], [found], f"{node.name}/Cast", to=TensorProto.FLOAT))
            continue
        for place, name in enumerate(node.input):
            if name in stored:
                wide = f"{name}.fp32"
                casts[name] = helper.make_node("Cast", [name], [wide], f"{name}/Cast", to=TensorProto.FLOAT)
                node.input[place] = wide
    del graph.graph.node[:]
    graph.graph.node.extend([*casts.values(), *nodes])
