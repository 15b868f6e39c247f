"""A resized graph is the size of the graph that the pruned model exports to, and runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from edgepress.compress import quantize as quantizers
from edgepress.export import resize
from edgepress.export.backends import onnx as backend
from edgepress.models import surgery
from edgepress.plan import PruningPlan
from onnx import numpy_helper

pytestmark = pytest.mark.chain


def _built(name: str) -> Any:
    """One of the models of tests/models/conftest.py, in float32."""
    path = Path(__file__).parent.parent / "models" / "conftest.py"
    spec = importlib.util.spec_from_file_location("edgepress_test_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.build(name)
    return made.with_module(made.module.float(), made.structure, made.plan)


def _exported(workload: Any, kind: str, kept: int, folder: Path, scheme: str = "fp32") -> onnx.ModelProto:
    plan = PruningPlan.of(u for site in workload.structure.of_kind(kind)[:2] for u in site.units[kept:])
    pruned = surgery.prune(workload, plan)
    graph = backend.export(pruned)
    if scheme == "fp32":
        return graph
    backend.quantize_graph(graph, quantizers.quantize(pruned, scheme), folder / "small.onnx")
    return onnx.load(folder / "small.onnx")


def _sizes(graph: onnx.ModelProto) -> list[Any]:
    """Of each initializer its shape, and of those that are shapes themselves their values."""
    return [
        numpy_helper.to_array(tensor).tolist() if tensor.data_type == onnx.TensorProto.INT64 else list(tensor.dims)
        for tensor in graph.graph.initializer
    ]


def _check(workload: Any, kind: str, kept: int, folder: Path, scheme: str = "fp32") -> onnx.ModelProto:
    count = workload.structure.of_kind(kind)[0].count
    whole, fewer = (_exported(workload, kind, k, folder, scheme) for k in (count, count - 1))
    change = resize.between(whole, fewer, count)
    assert change is not None
    change.apply(whole, kept)
    assert _sizes(whole) == _sizes(_exported(workload, kind, kept, folder, scheme))
    return whole


@pytest.mark.parametrize("scheme", ["fp32", "int8-dynamic"])
@pytest.mark.parametrize(("kind", "kept"), [("head", 1), ("ffn", 37)])
def test_a_text_encoder(workload: Any, tmp_path: Path, kind: str, kept: int, scheme: str) -> None:
    graph = _check(workload, kind, kept, tmp_path, scheme)
    del graph.graph.value_info[:]
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {name: workload.example[name].numpy() for name in workload.example}
    (answer,) = session.run(None, feeds)
    assert answer.shape == (1, 2)
    assert np.isfinite(answer).all()


def test_an_image_encoder(tmp_path: Path) -> None:
    _check(_built("vit"), "ffn", 5, tmp_path)


def test_graphs_that_differ_in_more_than_sizes_are_not_taken(workload: Any, tmp_path: Path) -> None:
    whole = backend.export(workload)
    assert resize.between(whole, _exported(workload, "ffn", 0, tmp_path), 128) is None
    assert resize.between(whole, _exported(workload, "block", 0, tmp_path), 1) is None
