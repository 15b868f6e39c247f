"""Engines are really built, ahead of time and without a GPU, and the list of their layers is what was asked for."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from edgepress.compress.prune.sparsity import sparsify
from edgepress.compress.quantize import fp8
from edgepress.errors import InputError, UnavailableError, UsageError
from edgepress.export import engine as engines
from edgepress.export import layers, parity, qdq, typed
from edgepress.export.artifact import open_artifact
from edgepress.export.backends import onnx as onnx_backend
from edgepress.export.backends import tensorrt
from edgepress.models import surgery
from edgepress.plan import PruningPlan, QuantizationPlan, Unit
from ml_dtypes import float8_e4m3fn
from onnx import TensorProto, helper, numpy_helper

trt = pytest.importorskip("tensorrt_rtx")
pytestmark = [pytest.mark.chain, pytest.mark.filterwarnings("ignore")]

FAST = {"int8": {"rows": 16, "smooth": "none", "correct_bias": False}, "fp8": {"rows": 16}}
"""Plans that leave the module's weights as they are, so that one export serves all precisions."""
SCHEMES = ("fp16", "bf16", "int8", "fp8")
HOPPER = engines.present() == 90
on_this_gpu = pytest.mark.skipif(HOPPER, reason="TensorRT-RTX does not run on Hopper")
CAPABILITIES = ("sm80", "sm86", "sm89", "sm120")


def plan(workload: Any, scheme: str) -> QuantizationPlan:
    return ep.quantize(workload, scheme, **FAST.get(scheme, {}))


@pytest.fixture(scope="module")
def graph_of() -> Any:
    """Writes the typed graph of a workload to a folder; its float graph is exported once."""
    exported: dict[int, tuple[Any, onnx.ModelProto]] = {}

    def write(workload: Any, scheme: str, folder: Path) -> Path:
        if id(workload) not in exported:
            exported[id(workload)] = workload, onnx_backend.export(workload)
        path = folder / f"{scheme}.onnx"
        onnx.save(tensorrt.typed_graph(exported[id(workload)][1], plan(workload, scheme)), path)
        return path

    return write


def build(path: Path, workload: Any, capability: str, **options: Any) -> engines.Engine:
    return engines.build(path, tensorrt.ranges(workload, {}), capability=capability, **options)


def check(engine: engines.Engine, path: Path, workload: Any, scheme: str) -> None:
    """Attention is fused in every block; products of the blocks are in ``scheme``; norms and softmax are not narrow."""
    graph = onnx.load(path)
    blocks = sum(stack.count for stack in workload.structure.stacks)
    assert sum(layer.is_attention for layer in engine.layers) == blocks
    wanted = layers.products(graph)
    inside = {name for name in wanted if name.startswith(tuple(stack.path for stack in workload.structure.stacks))}
    assert inside
    assert {wanted[name] for name in inside} == {scheme}
    assert sum(layers.check(engine.layers, wanted).values()) == len(wanted)
    protected = [node for node in ir.from_proto(graph).graph if node.op_type in typed.PROTECTED | typed.WIDE]
    types = {value.dtype for node in protected for value in node.inputs if value is not None}
    assert types - {ir.DataType.INT64} == {ir.DataType.FLOAT}
    for node in protected:
        if node.op_type == "LayerNormalization":
            holding = [layer for layer in engine.layers if node.name in layer.nodes]
            assert any("fp32" in (*layer.inputs, *layer.constants) for layer in holding), node.name


@pytest.fixture(scope="module")
def pruned(workload: Any) -> Any:
    units = [Unit("head", 0, 0), Unit("block", 2, 0), *(Unit("ffn", 0, i) for i in range(100)), Unit("ffn", 1, 7)]
    return surgery.prune(workload, PruningPlan.of(units))


@pytest.fixture(scope="module")
def pruned_minilm(minilm: Any) -> Any:
    units = [*(Unit("head", layer, layer) for layer in range(5)), Unit("block", 5, 0)]
    return surgery.prune(minilm, PruningPlan.of([*units, *(Unit("ffn", 1, i) for i in range(700))]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_bert_for_each_capability(workload: Any, scheme: str, graph_of: Any, tmp_path: Path) -> None:
    path = graph_of(workload, scheme, tmp_path)
    for capability in CAPABILITIES[2:] if scheme == "fp8" else CAPABILITIES:
        engine = build(path, workload, capability)
        assert engine.capability == capability
        check(engine, path, workload, scheme)
        merged = {f"bert.encoder.layer.1.attention.self.{name}/MatMul" for name in ("query", "key", "value")}
        if capability != "sm120":  # there they run side by side
            assert any(merged <= layer.nodes for layer in engine.layers)


@pytest.fixture(scope="module")
def llama() -> Any:
    """A decoder with grouped queries, one group, some channels and most blocks of which are gone."""
    units = [Unit("kv", 0, 0), *(Unit("ffn", 1, i) for i in range(40)), *(Unit("block", i, 0) for i in range(2, 6))]
    return surgery.prune(ep.load("zoo:llama-stdlib"), PruningPlan.of(units))


@pytest.fixture(scope="module")
def vit() -> Any:
    """An image encoder, a head and some channels of which are gone."""
    units = [Unit("head", 0, 0), *(Unit("ffn", 1, i) for i in range(40))]
    return surgery.prune(ep.load("zoo:vit-fashion"), PruningPlan.of(units))


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *(("pruned", scheme) for scheme in SCHEMES),
        ("minilm", "fp16"),
        ("minilm", "int8"),
        ("pruned_minilm", "bf16"),
        ("pruned_minilm", "fp8"),
        ("vit", "fp16"),
        ("vit", "int8"),
        ("llama", "bf16"),
        ("llama", "fp8"),
    ],
)
def test_models_whole_and_pruned(
    name: str, scheme: str, graph_of: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    workload = request.getfixturevalue(name)
    path = graph_of(workload, scheme, tmp_path)
    check(build(path, workload, "sm89"), path, workload, scheme)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["minilm", "pruned_minilm", "vit", "llama", "zoo:dinov2-fashion", "zoo:smollm2-135m"])
def test_the_zoo_for_each_capability(
    name: str, scheme: str, graph_of: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    workload = ep.load(name) if ":" in name else request.getfixturevalue(name)
    path = graph_of(workload, scheme, tmp_path)
    for capability in CAPABILITIES[2:] if scheme == "fp8" else CAPABILITIES:
        check(build(path, workload, capability), path, workload, scheme)


@pytest.fixture(scope="module")
def base(pruned: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ep.export(pruned, tmp_path_factory.mktemp("float") / "onnx")


@pytest.fixture(scope="module")
def written(pruned: Any, base: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("engine") / "int8"
    return tensorrt.write(pruned, plan(pruned, "int8"), folder, base=base, capability="sm86")


def test_the_artifact_tells_what_is_in_it(pruned: Any, written: Any) -> None:
    manifest = open_artifact(written.folder).manifest
    assert (manifest.runtime, manifest.model_file, manifest.precision) == ("tensorrt", "model.engine", "int8")
    assert written.size_bytes == (written.folder / "model.engine").stat().st_size
    assert manifest.engine.capability == "sm86"
    assert manifest.engine.products == {
        "int8": 12,
        "fp16": 2,
    }  # six layers in each of two blocks; pooler and classifier
    assert manifest.engine.attention == 2
    assert len(manifest.quantized) == 12
    assert manifest.parity.cosine > 0.99
    assert [32, 64] in [list(shape) for shape in manifest.parity.shapes]


@pytest.mark.parametrize(("scheme", "least"), [("fp16", 1 - 1e-5), ("bf16", 1 - 1e-3), ("fp8", 0.99)])
def test_the_graph_of_an_engine_computes_what_the_module_does(
    pruned: Any, base: Any, scheme: str, least: float, tmp_path: Path
) -> None:
    artifact = tensorrt.write(pruned, plan(pruned, scheme), tmp_path / scheme, base=base, capability="sm89")
    assert artifact.manifest.parity.cosine > least


def test_two_builds_are_alike_and_the_timing_cache_is_kept(written: Any, pruned: Any, tmp_path: Path) -> None:
    source, cache = written.folder / "source.onnx", tmp_path / "timing.cache"
    first = build(source, pruned, "sm86", timing_cache=cache)
    held = cache.read_bytes()
    second = build(source, pruned, "sm86", timing_cache=cache)
    assert held == cache.read_bytes() != b""
    for engine in (first, second):
        products = layers.check(engine.layers, layers.products(onnx.load(source)))
        assert (len(engine.layers), products) == (written.manifest.engine.layers, written.manifest.engine.products)


def test_an_engine_for_any_gpu(written: Any, pruned: Any) -> None:
    if engines.present() is None:
        engine = engines.build(written.folder / "source.onnx", tensorrt.ranges(pruned, {}))
        assert engine.capability == "sm80+"


def test_sparse_weights_reach_the_graph(pruned: Any, tmp_path: Path) -> None:
    zeros = sparsify(pruned, "2:4", method="magnitude")
    artifact = tensorrt.write(zeros, plan(zeros, "int8"), tmp_path / "sparse", capability="sm80", sparse=True)
    assert artifact.manifest.engine.sparse == 11  # one of the twelve has 127 inputs, which are no whole groups of four
    assert artifact.manifest.engine.products == {"int8": 12, "fp16": 2}


@pytest.mark.parametrize(
    ("scheme", "options", "error", "message"),
    [
        ("fp8", {"capability": "sm86"}, UnavailableError, "FP8 products need .* 8.9 or newer, which sm86 is not"),
        ("bf16", {"capability": "sm75"}, UnavailableError, "BF16 products need .* 8.0 or newer, which sm75 is not"),
        ("fp16", {"capability": "sm75", "sparse": True}, UnavailableError, "2:4 sparse products need .* 8.0"),
        ("fp16", {"capability": "sm61"}, UnavailableError, "TensorRT needs compute capability 7.5"),
        ("fp16", {"capability": "sm99"}, UnavailableError, "builds for sm75, .*, not for sm99"),
        ("fp16", {"capability": "ada"}, UsageError, "'ada' is not a compute capability"),
        ("fp16", {"capability": "sm80", "sparse": True}, InputError, "No weight of .* follows 2:4"),
        ("fp16", {"capability": "sm80", "tuned": {"length": 3}}, UsageError, "'length' is no axis of .*sequence"),
        ("fp16", {"capability": "sm80", "tuned": {"batch": 99}}, UsageError, "batch 99 is not in its range, 1 to 32"),
        ("int4", {"capability": "sm80"}, UsageError, "cannot write the scheme 'int4'"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    workload: Any, scheme: str, options: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    weights = ep.quantize(workload, "fp16").weights
    with pytest.raises(error, match=message) as raised:
        tensorrt.write(workload, QuantizationPlan(scheme, weights), tmp_path / "engine", **options)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_the_librarys_own_reason_is_given(workload: Any, graph_of: Any, tmp_path: Path) -> None:
    path = graph_of(workload, "fp8", tmp_path)
    with pytest.raises(
        UnavailableError, match=r"cannot build this engine: .*HW-specific datatypes: fp8_e4m3"
    ) as raised:
        build(path, workload, "sm86")
    assert "\n" not in str(raised.value)
    assert "/_src/" not in str(raised.value)


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch, workload: Any, tmp_path: Path) -> None:
    for name in engines.LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)  # what makes an import fail
    with pytest.raises(UnavailableError, match=r"TensorRT is missing: pip install 'edgepress\[tensorrt\]'"):
        tensorrt.write(workload, QuantizationPlan("fp32"), tmp_path / "engine")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_sentence(written: Any, workload: Any, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="needs an NVIDIA GPU"), tensorrt.open_session(written):
        pass
    with pytest.raises(UnavailableError, match="weights on an NVIDIA GPU only"):
        tensorrt.write(workload, QuantizationPlan("fp32"), tmp_path / "engine", stripped=True)


def test_other_artifacts_and_devices_are_refused(written: Any, base: Any, pruned: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="runs on 'cuda'"), tensorrt.open_session(written, device="cpu"):
        pass
    with pytest.raises(InputError, match="not a TensorRT artifact"), tensorrt.open_session(base):
        pass
    with pytest.raises(UsageError, match=r"must be an fp32 onnx artifact; .* is int8 for tensorrt"):
        tensorrt.write(pruned, QuantizationPlan("fp32"), tmp_path / "engine", base=written, capability="sm80")


def test_a_product_in_another_precision_than_asked_for(workload: Any, graph_of: Any, tmp_path: Path) -> None:
    path = graph_of(workload, "fp16", tmp_path)
    engine = build(path, workload, "sm80")
    wanted = layers.products(onnx.load(path))
    first = next(iter(wanted))
    with pytest.raises(layers.PrecisionError, match=f"1 of {len(wanted)} products .* '{first}' in fp16, not in int8"):
        layers.check(engine.layers, {**wanted, first: "int8"})
    with pytest.raises(layers.PrecisionError, match="no layer that is listed"):
        layers.check((), wanted)


def test_the_inspectors_json_of_either_version() -> None:
    """As the documentation of TensorRT 10 and 11 prints it."""
    text = """{"Layers": ["a name alone", {
        "Name": "_gemm_mha_v2_0x1", "LayerType": "kgen",
        "Inputs": [{"Name": "x", "Dimensions": [1, 8], "Format/Datatype": "Row major linear FP16 format"}],
        "Outputs": [{"Name": "y", "Format": "Row major linear format", "Datatype": "Int8"}],
        "Metadata": "[ONNX Layer: a/MatMul]\\u001e[ONNX Layer: a/Softmax]"}]}"""
    (found,) = layers.of_inspector(text)
    assert found.is_attention
    assert (found.inputs, found.constants, found.outputs) == (("fp16",), (), ("int8",))
    assert found.nodes == {"a/MatMul", "a/Softmax"}


def product(weight: Any) -> onnx.ModelProto:
    """x [rows, in] times ``weight``, and one beside it that reads the same."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "one"), helper.make_node("MatMul", ["x", "v"], ["z"], "two")]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", weight.shape[1]]) for name in "yz"]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", weight.shape[0]])]
    constants = [numpy_helper.from_array(array, name) for name, array in (("w", weight), ("v", 2 * weight))]
    made = helper.make_graph(nodes, "product", inputs, outputs, constants)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_codes_and_scales_are_those_of_the_formula(scheme: str) -> None:
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(7, 24)).astype(np.float32), random.normal(size=(24, 5)).astype(np.float32)
    names = ("one", "two")
    made = QuantizationPlan(scheme, dict.fromkeys(names, scheme), {"one": (-1.0, 2.0), "two": (-1.5, 0.5)})
    placed = qdq.place(product(weight), made, np.dtype(np.float16))
    got = onnxruntime.InferenceSession(placed.SerializeToString()).run(None, {"x": x})

    def half(scale: Any) -> Any:
        return np.asarray(scale, np.float16).astype(np.float32)

    def rounded(values: Any, scale: Any) -> Any:
        if scheme == "int8":
            return np.clip(np.rint(values / scale), -128, 127) * scale
        return np.clip(values / scale, -448, 448).astype(float8_e4m3fn).astype(np.float32) * scale

    constants = {one.name: one for one in placed.graph.initializer}
    scales = [constants[node.input[1]] for node in placed.graph.node if node.op_type == "DequantizeLinear"]
    assert [list(one.dims) for one in scales] == 3 * [
        []
    ]  # a vector would be multiplied after a sum of raw codes overflows
    most = 127 if scheme == "int8" else 448
    one_scale = half(np.abs(2 * weight).max() / most)
    for at, array in enumerate((weight, 2 * weight)):
        shares = half(np.abs(array).max(axis=0) / most / one_scale) if scheme == "int8" else np.float32(1)
        wanted = rounded(x, half(2.0 / most)) @ rounded(array, one_scale * shares)
        np.testing.assert_allclose(got[at], wanted, atol=1e-4)


def test_ranges_that_do_not_fit() -> None:
    weight = np.ones((4, 4), np.float32)
    for span in ((0.0, 0.0), (0.0, float("inf"))):
        made = QuantizationPlan("int8", {"one": "int8"}, {"one": span})
        with pytest.raises(InputError, match="'one' cannot be quantized over a range that ends at"):
            qdq.place(product(weight), made, np.dtype(np.float16))
    with pytest.raises(InputError, match="'nothing', which is not a product"):
        tensorrt.typed_graph(product(weight), QuantizationPlan("int8", {"nothing": "int8"}, {"nothing": (0.0, 1.0)}))


def test_a_weight_beyond_the_range_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="weight of 'one' is beyond"):
        typed.narrow(product(np.full((4, 4), 1e5, np.float32)), "fp16")
    typed.narrow(product(np.full((4, 4), 1e5, np.float32)), "bf16")


def test_overflow_in_a_norm_and_in_the_mask_is_kept_out_of_half_precision(
    workload: Any, graph_of: Any, tmp_path: Path
) -> None:
    """Squares beyond 65504 stand in the norm's sum, and the mask adds the least float; both are finite in float32."""
    loud = replace(workload, module=copy.deepcopy(workload.module))
    with torch.no_grad():
        loud.module.bert.embeddings.word_embeddings.weight.mul_(3000.0)
    session = onnxruntime.InferenceSession(graph_of(loud, "fp16", tmp_path))
    feeds = parity.feeds(loud, {"batch": 4, "sequence": 32})
    with torch.no_grad():
        wanted = loud.forward({name: torch.from_numpy(array) for name, array in feeds.items()}).numpy()
    np.testing.assert_allclose(session.run(None, feeds)[0], wanted, atol=0.01 * np.abs(wanted).max())


def test_fp8_chooses_what_int8_does(workload: Any) -> None:
    made = fp8.quantize(workload, rows=8, keep=["bert.encoder.layer.0.output.dense"])
    assert len(made.weights) == 6 * 3 - 1
    assert set(made.activations) == set(made.weights)
    with pytest.raises(UsageError, match="'nope' is to stay"):
        fp8.quantize(workload, keep=["nope"])


@pytest.mark.gpu
@on_this_gpu
@pytest.mark.parametrize("scheme", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("name", ["bert", "vit-fashion", "llama-stdlib"])
def test_an_engine_on_this_gpu(name: str, scheme: str, pruned: Any, tmp_path: Path) -> None:
    """The engine that was built for this GPU, in shapes that its graph was not traced in, against PyTorch."""
    workload = pruned if name == "bert" else ep.load(f"zoo:{name}")
    made = QuantizationPlan("fp32") if scheme == "fp32" else plan(workload, scheme)
    artifact = tensorrt.write(workload, made, tmp_path / "engine")
    with tensorrt.open_session(artifact) as session:
        assert artifact.manifest.parity.reference == "the PyTorch module"  # that of the engine itself, not of its graph
        for batch, sequence in ((1, 1), (2, 31), (5, 64), (2, 31)):
            feeds = parity.feeds(workload, {"batch": batch, "sequence": sequence})
            wanted = workload.forward({k: torch.from_numpy(v) for k, v in feeds.items()}).detach().numpy()
            if scheme == "int8":  # the same codes, by another runtime
                (wanted,) = onnxruntime.InferenceSession(artifact.folder / "source.onnx").run(None, feeds)
            (got,) = session.run(feeds)
            tolerance = parity.TOLERANCE.get(scheme, 0.05) * np.abs(wanted).max()
            np.testing.assert_allclose(got, wanted, atol=float(tolerance))
            launch = session.prepared(feeds)
            for _ in range(3):
                (kept,) = launch()
                np.testing.assert_array_equal(kept.cpu().numpy(), got)
        with pytest.raises(UsageError, match="does not take"):
            session.run({name: np.repeat(array, 40, axis=0) for name, array in feeds.items()})


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="there is no GPU that TensorRT-RTX does not run on")
def test_a_gpu_that_the_library_does_not_know(pruned: Any, base: Any, tmp_path: Path) -> None:
    artifact = tensorrt.write(pruned, plan(pruned, "fp16"), tmp_path / "engine", base=base)
    assert artifact.manifest.engine.capability == "sm80+"
    assert artifact.manifest.parity.cosine > 1 - 1e-5  # of its graph
    unknown = pytest.raises(UnavailableError, match=r"cannot load this engine: .*compute capability 9\.0")
    with unknown as raised, tensorrt.open_session(artifact):
        pass
    assert "\n" not in str(raised.value)


@pytest.mark.gpu
@on_this_gpu
def test_the_inspector_agrees_with_the_log(pruned: Any, graph_of: Any, tmp_path: Path) -> None:
    path = graph_of(pruned, "fp16", tmp_path)
    engine = engines.build(path, tensorrt.ranges(pruned, {}))
    found = engines.inspected(engines.library(), engines.logger(engines.library()), engine.plan)
    assert [(one.name, one.kind) for one in found] == [(one.name, one.kind) for one in engine.layers]
    assert layers.check(found, layers.products(onnx.load(path))) == {"fp16": 14}


@pytest.mark.gpu
@on_this_gpu
def test_a_stripped_engine_gets_its_weights_back(pruned: Any, tmp_path: Path) -> None:
    made = plan(pruned, "fp16")
    whole = tensorrt.write(pruned, made, tmp_path / "whole")
    stripped = tensorrt.write(pruned, made, tmp_path / "stripped", stripped=True)
    assert stripped.size_bytes < whole.size_bytes
    feeds = parity.feeds(pruned, {"batch": 3, "sequence": 20})
    with tensorrt.open_session(whole) as one, tensorrt.open_session(stripped) as other:
        np.testing.assert_allclose(other.run(feeds)[0], one.run(feeds)[0], atol=1e-3)
