"""What departs first is named: a graph is spoilt at one operator, and bisection finds that one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import onnx
import pytest
from edgepress.errors import ParityError
from edgepress.export import encoder_decoder, locate, parity
from edgepress.export.backends import onnx as backend
from edgepress.plan import QuantizationPlan
from onnx import numpy_helper

pytestmark = pytest.mark.chain

LAYER = "bert.encoder.layer.1.intermediate.dense"


def _spoil(graph: onnx.ModelProto, node: onnx.NodeProto, change: Callable[[Any], Any]) -> str:
    """Change the constant that ``node`` reads; returns its name."""
    constants = {one.name: one for one in graph.graph.initializer}
    (name,) = [name for name in node.input if name in constants and len(constants[name].dims) == 2][:1]
    array = numpy_helper.to_array(constants[name])
    constants[name].CopyFrom(numpy_helper.from_array(change(array).astype(array.dtype), name))
    return node.name


def _node(graph: onnx.ModelProto, layer: str) -> onnx.NodeProto:
    return next(node for node in graph.graph.node if node.name.startswith(layer) and "MatMul" in node.op_type)


@pytest.fixture(scope="module")
def case(workload: Any) -> locate.Case:
    feeds = parity.feeds(workload, {"batch": 2, "sequence": 17})
    return locate.Case(feeds, lambda: parity.answers(workload, feeds))


def test_nothing_is_found_where_nothing_departs(workload: Any, case: locate.Case) -> None:
    graph = backend.export(workload)
    assert locate.from_module(graph, workload, case, 1e-3) is None
    assert locate.from_graph(graph, graph, case.feeds, 1e-3) is None


@pytest.mark.parametrize("layer", ["bert.encoder.layer.0.attention.self.query", LAYER, "classifier"])
def test_the_layer_of_another_weight_is_found_in_a_float_graph(workload: Any, case: locate.Case, layer: str) -> None:
    graph = backend.export(workload)
    node = next(node for node in graph.graph.node if node.name.startswith(f"{layer}/") and len(node.input) > 1)
    _spoil(graph, node, lambda weight: weight * 1.5)
    found = locate.from_module(graph, workload, case, 1e-3)
    assert found is not None
    assert found.operator.rsplit("/", 1)[0] == layer
    assert found.before < 1e-4 < found.error


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8"])
def test_the_operator_of_other_codes_is_found_in_a_graph_in_few_bits(
    workload: Any, case: locate.Case, scheme: str, tmp_path: Path
) -> None:
    base = ep.export(workload, tmp_path / "fp32")
    options = {"rows": 16, "smooth": "none", "correct_bias": False} if scheme == "int8" else {}
    written = backend.write(workload, ep.quantize(workload, scheme, **options), tmp_path / scheme, base=base)
    graph = onnx.load(written.model_file)
    constants = {one.name for one in graph.graph.initializer if len(one.dims) == 2}
    reads = [node for node in graph.graph.node if node.name.startswith(LAYER) and constants & set(node.input)]
    _spoil(graph, reads[0], np.flipud)
    found = locate.from_graph(graph, onnx.load(base.model_file), case.feeds, 0.03)
    assert found is not None
    assert found.operator.startswith(LAYER)
    assert found.before < 0.03 < found.error


def test_the_error_of_an_export_names_the_operator(
    workload: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = backend.export

    def spoilt(given: Any, *options: Any) -> onnx.ModelProto:
        graph = exported(given)
        _spoil(graph, _node(graph, LAYER), np.negative)
        return graph

    monkeypatch.setattr(backend, "export", spoilt)
    with pytest.raises(ParityError, match=rf"is allowed\. It begins at '{LAYER}/\w+', whose output is .* away"):
        backend.write(workload, QuantizationPlan("fp32"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # a decoder is traced with its past
def test_the_error_of_a_step_after_a_past_names_the_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=120, num_hidden_layers=3, max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    workload = ep.load(str(tmp_path / "llama"))
    layer, exported = "model.layers.1.mlp.down_proj", backend.export

    def spoilt(given: Any, *options: Any) -> onnx.ModelProto:
        graph = exported(given, *options)
        _spoil(graph, _node(graph, layer), np.negative)
        return graph

    monkeypatch.setattr(backend, "export", spoilt)
    with pytest.raises(ParityError, match=rf"is allowed\. It begins at '{layer}/\w+', whose output is .* away"):
        ep.export(workload, tmp_path / "step", cache=24)
    assert not (tmp_path / "step").exists()


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_error_of_a_part_of_an_encoder_decoder_names_the_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    T5ForConditionalGeneration(T5Config(vocab_size=120, **sizes)).save_pretrained(tmp_path / "t5")
    workload = ep.load(str(tmp_path / "t5"))
    layer = {"encoder": "encoder.block.1.layer.1", "decoder": "decoder.block.1.layer.2"}[part] + ".DenseReluDense.wo"
    exported = backend.export

    def spoilt(given: Any, *options: Any) -> onnx.ModelProto:
        graph = exported(given, *options)
        for node in graph.graph.node:
            if node.name.startswith(f"{layer}/"):
                _spoil(graph, node, np.negative)
        return graph

    monkeypatch.setattr(backend, "export", spoilt)
    with pytest.raises(ParityError, match=rf"is allowed\. It begins at '{layer}/\w+', whose output is .* away"):
        encoder_decoder.write(workload, 24, tmp_path / "parts", ep.export)
    assert not (tmp_path / "parts").exists()


def test_the_error_of_openvino_s_own_file_names_the_operator(
    workload: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    from edgepress.export.backends import openvino

    made = openvino.written

    def spoilt(graph: onnx.ModelProto, plan: QuantizationPlan) -> onnx.ModelProto:
        graph = made(graph, plan)
        _spoil(graph, _node(graph, LAYER), np.negative)
        return graph

    monkeypatch.setattr(openvino, "written", spoilt)
    with pytest.raises(ParityError, match=rf"is allowed\. It begins at '{LAYER}/\w+', whose output is .* away"):
        openvino.write(workload, QuantizationPlan("fp32"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
