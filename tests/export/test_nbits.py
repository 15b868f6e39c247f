"""Weights in blocks of few bits in the file: ONNX Runtime computes what their codes stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from edgepress.compress.quantize import METHODS, blocks, int4, int8_weight
from edgepress.errors import InputError
from edgepress.export import nbits, parity
from edgepress.export.backends.onnx import open_session, write
from edgepress.models.dequantize import dequantized
from edgepress.plan import Codes, QuantizationPlan
from onnx import TensorProto, helper, numpy_helper

pytestmark = pytest.mark.chain


def dequantize(numbers: Any, scales: Any, zeros: Any, columns: int, bits: int, block: int) -> Any:
    """[out, columns] from a product's own inputs, as ONNX Runtime documents them, number by number."""

    def number(data: Any, place: int) -> int:
        return int(data[place]) if bits == 8 else (int(data[place // 2]) >> (4 * (place % 2))) & 15

    found = np.zeros((len(scales), columns), dtype=np.float32)
    for row, column in np.ndindex(found.shape):
        part = column // block
        zero = number(zeros[row], part) if zeros is not None else 2 ** (bits - 1)
        found[row, column] = scales[row, part] * (number(numbers[row, part], column % block) - zero)
    return found


def graph(weight: torch.Tensor, *, gemm: bool, alpha: float = 1.0) -> onnx.ModelProto:
    """A product of x and the weight [out, in], and a look-up in it as a table."""
    rows, columns = weight.shape
    if gemm:
        product = helper.make_node("Gemm", ["x", "w", "bias"], ["y"], "linear/Gemm", transB=1, alpha=alpha)
    else:
        product = helper.make_node("MatMul", ["x", "turned"], ["y"], "linear/MatMul")
    nodes = [
        helper.make_node("Transpose", ["w"], ["turned"], "linear/Transpose", perm=[1, 0]),
        product,
        helper.make_node("Gather", ["w", "ids"], ["z"], "table/Gather"),
    ]
    made = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", columns]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, ["a", "b"]),
        ],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", rows]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, ["a", "b", columns]),
        ],
        [
            numpy_helper.from_array(weight.numpy(), "w"),
            numpy_helper.from_array(np.arange(rows, dtype=np.float32), "bias"),
        ],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def both(codes: Codes) -> QuantizationPlan:
    return QuantizationPlan("int4", {"linear": "int4", "table": "int4"}, codes={"linear": codes, "table": codes})


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("gemm", [False, True])
@pytest.mark.parametrize(("rows", "columns", "block"), [(24, 64, 32), (7, 40, 16), (16, 100, 32), (12, 256, 128)])
def test_against_dequantization(bits: int, symmetric: bool, gemm: bool, rows: int, columns: int, block: int) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=random)
    codes = blocks.to_nearest(weight, bits=bits, block=block, symmetric=symmetric)
    model = graph(weight, gemm=gemm)
    nbits.rewrite(model, both(codes))
    onnx.checker.check_model(model)
    held = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    product = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    assert "w" not in held
    assert all(node.op_type != "Transpose" for node in model.graph.node)
    parts = [held.get(name) for name in (*product.input[1:4], "", "")[:3]]
    wanted = dequantize(*parts, columns, bits, block)
    np.testing.assert_allclose(wanted, codes.weight().numpy(), rtol=1e-6)
    assert symmetric == (parts[2] is None)
    x, ids = torch.randn(9, columns, generator=random).numpy(), np.array([[0, rows - 1, 3]])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, z = session.run(None, {"x": x, "ids": ids})
    exact = x @ wanted.T + (np.arange(rows) if gemm else 0)
    # inputs are rounded to 8 bits a block: of the order of 1/255 of their range for each product, at random
    off = np.abs(y - exact).max() / np.abs(x).max() / np.linalg.norm(wanted, axis=1).max()
    assert off < 4 / 255
    np.testing.assert_allclose(z, wanted[ids], rtol=1e-6)


@pytest.mark.parametrize("whole", [False, True])
def test_a_module_that_runs_twice(whole: bool) -> None:
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    codes = blocks.to_nearest(weight, bits=4, block=16, symmetric=False)
    model = graph(weight, gemm=False)
    for node in list(model.graph.node)[1:]:
        again = onnx.NodeProto()
        again.CopyFrom(node)
        again.name, again.output[0] = f"{node.name}_2", f"{node.output[0]}2"
        model.graph.node.append(again)
        value = next(one for one in model.graph.output if one.name == node.output[0])
        model.graph.output.add().CopyFrom(value)
        model.graph.output[-1].name = again.output[0]
    nbits.rewrite(model, both(codes), whole=whole)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": np.ones((2, 40), np.float32), "ids": np.array([[0, 3]])})
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_array_equal(found[1], found[3])


def test_what_does_not_fit_is_refused() -> None:
    weight = torch.ones(8, 32)
    codes = blocks.to_nearest(weight, bits=4, block=32, symmetric=False)
    with pytest.raises(InputError, match="scaled or transposed"):
        nbits.rewrite(graph(weight, gemm=True, alpha=2.0), both(codes))
    with pytest.raises(InputError, match="'other', which is not a product"):
        nbits.rewrite(graph(weight, gemm=True), QuantizationPlan("int4", {"other": "int4"}, codes={"other": codes}))
    with pytest.raises(InputError, match="no codes"):
        nbits.rewrite(graph(weight, gemm=True), QuantizationPlan("int4", {"linear": "int4"}))


@pytest.fixture(scope="module")
def decoder() -> Any:
    return ep.load("zoo:llama-stdlib")


@pytest.fixture(scope="module")
def exported(decoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ep.export(decoder, tmp_path_factory.mktemp("nbits") / "fp32")


@pytest.mark.parametrize("method", ["awq", "rtn"])
def test_the_file_computes_what_the_plan_stands_for(decoder: Any, exported: Any, tmp_path: Path, method: str) -> None:
    """With AWQ's scales in the norms, which the float artifact does not have, or without."""
    plan = int4.quantize(decoder, method=method, head=True, rows=8)
    small = write(decoder, plan, tmp_path / "int4", base=exported)
    feeds = parity.feeds(decoder, {"batch": 4, "sequence": 64})
    with open_session(small) as session, torch.inference_mode():
        (found,) = session.run(feeds)
        inputs = {name: torch.from_numpy(array) for name, array in feeds.items()}
        wanted, whole = (one.forward(inputs).numpy() for one in (dequantized(decoder, plan), decoder))
    assert bool(plan.state) == (method == "awq")
    assert np.linalg.norm(found - wanted) < 0.5 * np.linalg.norm(wanted - whole)
    assert small.manifest.operators["MatMulNBits"] == len(plan.weights) - 1
    assert small.size_bytes < 0.22 * exported.size_bytes


def test_a_tied_table_and_head_are_in_the_file_once(decoder: Any, exported: Any, tmp_path: Path) -> None:
    small = write(decoder, int8_weight.quantize(decoder, head=True), tmp_path / "int8", base=exported)
    assert small.manifest.operators["GatherBlockQuantized"] == 1
    numbers = sum(parameter.numel() for parameter in decoder.module.parameters())
    assert small.size_bytes < 1.25 * numbers  # a byte a weight, five for every block, and the graph


@pytest.mark.parametrize("word", [name.replace("_", "-") for name in METHODS if name != "fp8"])  # which is TensorRT's
def test_every_scheme_reaches_a_file(word: str, workload: Any, sound: Any, tmp_path: Path) -> None:
    artifact = ep.export(workload, tmp_path / word, ep.quantize(workload, word))
    assert artifact.precision == word
    sound(artifact.model_file)
    assert artifact.manifest.quantized
    assert artifact.manifest.parity.cosine > 0.95
