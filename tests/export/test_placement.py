"""Which integer kernels run, and that they compute what numpy does with the same integers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from edgepress.compress.quantize import int8, int8_dynamic
from edgepress.errors import InputError
from edgepress.export import attention, parity
from edgepress.export.backends.onnx import export, write
from edgepress.export.placement import place
from edgepress.plan import Codes, QuantizationPlan
from onnx import TensorProto, helper, numpy_helper

RANDOM = np.random.default_rng(0)


def graph(kind: str, weight: Any, bias: Any) -> onnx.ModelProto:
    """One product called "product" of a tensor [rows, in], as an export or as anybody's Gemm."""
    if kind == "MatMul":
        nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "product"), helper.make_node("Add", ["h", "b"], ["y"])]
    else:
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "product", transB=1, alpha=0.5, beta=2.0)]
        weight, bias = weight.T / 0.5, bias / 2
    made = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 5])],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in (("w", weight), ("b", bias))],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto, x: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]


def integers(x: Any, weight: Any, bias: Any, low: float, high: float) -> Any:
    """The product in whole numbers: unsigned activations, signed weights with a scale for each column."""
    scale = np.float32((high - low) / 255)
    zero = np.rint(-low / scale)
    codes = np.clip(np.rint(x / scale) + zero, 0, 255)
    scales = np.abs(weight).max(axis=0) / 127
    return ((codes - zero) @ np.rint(weight / scales)) * scale * scales + bias


@pytest.fixture
def numbers() -> tuple[Any, Any, Any]:
    x, weight, bias = RANDOM.normal(0.5, 1, (7, 24)), RANDOM.normal(0, 1, (24, 5)), RANDOM.normal(0, 1, 5)
    return x.astype(np.float32), weight.astype(np.float32), bias.astype(np.float32)


@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
def test_a_product_in_a_known_range_and_in_its_own(kind: str, numbers: Any) -> None:
    x, weight, bias = numbers
    plain = graph(kind, weight, bias)
    known = place(plain, QuantizationPlan("int8", {"product": "int8"}, {"product": (-1.5, 2.0)}))
    np.testing.assert_allclose(run(known, x), integers(x, weight, bias, -1.5, 2.0), atol=1e-4)
    own = place(plain, QuantizationPlan("int8-dynamic", {"product": "int8"}))
    np.testing.assert_allclose(run(own, x), integers(x, weight, bias, float(x.min()), float(x.max())), atol=1e-4)
    for placed in (known, own):
        assert not {"MatMul", "Gemm"} & {node.op_type for node in placed.graph.node}


def test_smoothing_moves_an_outlying_channel_into_the_weight(numbers: Any) -> None:
    x, weight, bias = numbers
    x = x * np.where(np.arange(24) == 3, 60, 1).astype(np.float32)
    scales = np.abs(x).max(axis=0)
    plan = QuantizationPlan(
        "int8", {"product": "int8"}, {"product": (-1.0, 1.0)}, smooth={"product": torch.from_numpy(scales)}
    )
    got = run(place(graph("MatMul", weight, bias), plan), x)
    np.testing.assert_allclose(got, integers(x / scales, weight * scales[:, None], bias, -1.0, 1.0), atol=2e-3)


def test_codes_of_the_plan_are_used_as_they_are(numbers: Any) -> None:
    x, weight, bias = numbers
    codes = torch.from_numpy(RANDOM.integers(0, 256, (5, 24)).astype(np.uint8))
    given = Codes(8, 24, codes, torch.full((5, 1), 0.01), torch.full((5, 1), 128, dtype=torch.uint8))
    plan = QuantizationPlan("int8", {"product": "int8"}, {"product": (-2.0, 4.0)}, codes={"product": given})
    placed = place(graph("MatMul", weight, bias), plan)
    scale, zero = np.float32(6 / 255), 85.0
    whole = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    np.testing.assert_allclose(run(placed, x), whole @ given.weight().numpy().T * scale + bias, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activations": {"product": (1.0, float("inf"))}}, "cannot be quantized over the range"),
        ({"smooth": {"product": torch.ones(3)}}, "it takes 24 positive ones"),
        ({"smooth": {"product": torch.zeros(24)}}, "it takes 24 positive ones"),
    ],
)
def test_plans_that_do_not_fit(change: Any, message: str, numbers: Any) -> None:
    with pytest.raises(InputError, match=message):
        place(graph("MatMul", *numbers[1:]), QuantizationPlan("int8", {"product": "int8"}, **change))


def optimised(path: Path, place_: Path, disabled: tuple[str, ...]) -> list[onnx.NodeProto]:
    """The nodes that ONNX Runtime runs after all its rewrites."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(place_ / "optimised.onnx"), 3
    onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"], disabled_optimizers=list(disabled))
    return list(onnx.load(place_ / "optimised.onnx").graph.node)


@pytest.mark.parametrize("method", [int8, int8_dynamic])
def test_the_kernels_that_run_in_an_encoder(workload: Any, method: Any, tmp_path: Path) -> None:
    plan = method.quantize(workload)
    artifact = write(workload, plan, tmp_path / "small")
    products = [name for name in plan.weights if ".layer." in name]
    layers = len({name.split(".layer.")[1].split(".")[0] for name in products})
    nodes = optimised(artifact.model_file, tmp_path, artifact.manifest.session.disabled_optimizers)
    kinds = Counter(node.op_type for node in nodes)
    # A product of its own input may be fused with the pass that finds the input's range.
    assert kinds["MatMulIntegerToFloat"] + kinds["DynamicQuantizeMatMul"] == len(products) == 6 * layers
    assert kinds["QuantizeLinear"] + kinds["DynamicQuantizeLinear"] + kinds["DynamicQuantizeMatMul"] == 4 * layers
    assert kinds["Attention"] == layers
    assert not {"MatMulInteger", "QLinearMatMul", "SkipLayerNormalization"} & kinds.keys()
    assert kinds["DequantizeLinear"] == kinds["MatMul"] == kinds["FusedMatMul"] == 0


@pytest.mark.parametrize("smoothed", [False, True])
def test_gelu_by_tanh_where_its_result_is_quantized(workload: Any, smoothed: bool) -> None:
    plan = int8.quantize(workload, smooth="none")
    readers = [name for name in plan.weights if name.endswith("output.dense") and ".attention." not in name]
    width = workload.module.get_submodule(readers[0]).in_features
    placed = place(
        export(workload), replace(plan, smooth=dict.fromkeys(readers, torch.full((width,), 2.0)) if smoothed else {})
    )
    gelus = [node for node in placed.graph.node if node.op_type == "Gelu"]
    assert len(gelus) == len(readers)
    assert all([a.s for a in node.attribute if a.name == "approximate"] == [b"tanh"] for node in gelus)
    left = place(export(workload), QuantizationPlan("fp32"))
    assert not any(a.s == b"tanh" for node in left.graph.node if node.op_type == "Gelu" for a in node.attribute)


def test_fused_attention_heeds_the_mask(workload: Any) -> None:
    """What stands under padding must not reach the answer."""
    feeds = parity.feeds(workload, {"batch": 2, "sequence": 16})
    feeds["attention_mask"][:, 9:] = 0
    other = {**feeds, "input_ids": feeds["input_ids"].copy()}
    other["input_ids"][:, 9:] = 7
    placed = place(export(workload), QuantizationPlan("fp32"))
    assert Counter(node.op_type for node in placed.graph.node)["Softmax"] == 0
    session = onnxruntime.InferenceSession(placed.SerializeToString())
    with torch.no_grad():
        wanted = workload.forward({name: torch.from_numpy(array) for name, array in feeds.items()}).numpy()
    for inputs in (feeds, other):
        np.testing.assert_allclose(session.run(None, inputs)[0], wanted, atol=1e-4)


HEADS = """<ir_version: 10, opset_import: ["" : 20]>
heads (float[2,32,16] x) => (float[2,32,16] y) {{
    apart = Constant<value = int64[4] {{{apart}}}> ()
    together = Constant<value = int64[3] {{2, 32, 16}}> ()
    parts = Reshape (x, apart)
    query = Transpose<perm = [0, 2, 1, 3]> (parts)
    key = Transpose<perm = [0, 2, 3, 1]> (parts)
    scores = MatMul (query, key)
    shares = Softmax<axis = -1> (scores)
    mixed = MatMul (shares, query)
    turned = Transpose<perm = [0, 2, 1, 3]> (mixed)
    y = Reshape (turned, together)
}}"""


@pytest.mark.parametrize(("apart", "fused"), [("2, 32, 2, 8", 1), ("0, 0, 2, 8", 1), ("8, 8, 2, 8", 0)])
def test_attention_within_windows_is_not_that_over_all(apart: str, fused: int) -> None:
    graph = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(HEADS.format(apart=apart)))
    model = ir.from_proto(graph)
    assert attention.fuse(model) == fused
    feeds = {"x": np.random.default_rng(0).normal(size=(2, 32, 16)).astype(np.float32)}
    before, after = (
        onnxruntime.InferenceSession(one.SerializeToString()).run(None, feeds)[0] for one in (graph, ir.to_proto(model))
    )
    np.testing.assert_allclose(before, after, atol=1e-5)


def test_a_gelu_of_onnx_runtime_stays_what_it_is() -> None:
    """It has no approximation; a graph with one would not load."""
    text = """<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
    two (float[N,8] x, float[8,16] up, float[16,8] down) => (float[N,8] y) {
        wide = MatMul (x, up)
        hidden = com.microsoft.Gelu (wide)
        y = MatMul (hidden, down)
    }"""
    graph = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    for name, value in (("up", random.normal(size=(8, 16))), ("down", random.normal(size=(16, 8)))):
        graph.graph.initializer.append(onnx.numpy_helper.from_array(value.astype(np.float32), name))
    del graph.graph.input[1:]
    for node, name in zip(graph.graph.node, ("up", "act", "down"), strict=True):
        node.name = name
    placed = place(
        onnx.shape_inference.infer_shapes(graph), QuantizationPlan("int8-dynamic", {"up": "int8", "down": "int8"})
    )
    feeds = {"x": random.normal(size=(4, 8)).astype(np.float32)}
    wanted = onnxruntime.InferenceSession(graph.SerializeToString()).run(None, feeds)[0]
    found = onnxruntime.InferenceSession(placed.SerializeToString()).run(None, feeds)[0]
    assert np.abs(wanted - found).max() < 0.05 * np.abs(wanted).max()


def test_rows_of_a_table_have_their_own_scales(workload: Any) -> None:
    table = workload.module.get_submodule("bert.embeddings.word_embeddings").weight.detach().numpy()
    plan = QuantizationPlan("int8-dynamic", {"bert.embeddings.word_embeddings": "int8"})
    placed = place(export(workload), plan)
    held = {item.name: numpy_helper.to_array(item) for item in placed.graph.initializer}
    (codes,) = (array for name, array in held.items() if name.endswith("word_embeddings.weight.codes"))
    (scales,) = (array for name, array in held.items() if name.endswith("word_embeddings.weight.scales"))
    assert codes.dtype == np.int8
    assert (np.abs(codes * scales - table) <= scales / 2 * 1.001).all()
    assert not any(array.shape == table.shape and array.dtype == np.float32 for array in held.values())
