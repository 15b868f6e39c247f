"""Where the time of a run goes, as ONNX Runtime and OpenVINO tell it of real artifacts, and what is shown of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import edgepress as ep
import onnx
import pytest
from edgepress.benchmarks import load, profile, profilers, runner
from edgepress.benchmarks.measurement import Measurement
from edgepress.errors import UnavailableError
from edgepress.export.artifact import Artifact
from edgepress.export.backends import openvino as openvino_backend

QUICK: dict[str, Any] = {"target": "cpu:1", "sequence": 16, "min_queries": 60, "memory": False}
BLOCKS = {f"bert.encoder.layer.{number}" for number in range(3)}


@pytest.fixture(scope="module")
def measured(artifacts: list[Artifact]) -> list[Measurement]:
    return load.benchmark(artifacts, profile=True, **QUICK)


def test_the_time_of_a_run_is_shared_out(measured: list[Measurement]) -> None:
    for item in measured:
        found = profile.read(item)
        assert found.runs == load.PROFILED_RUNS
        assert {node.layer for node in found.nodes} >= BLOCKS
        told = found.to_json()
        assert 0 <= told["unaccounted"]["share"] < 0.9
        for parts in (told["types"], told["layers"], told["nodes"]):
            assert sum(part["share"] for part in parts) + told["unaccounted"]["share"] == pytest.approx(1)
            assert sum(part["ms"] for part in parts) + told["unaccounted"]["ms"] == pytest.approx(told["run_ms"])
        assert [part["ms"] for part in told["types"]] == sorted((part["ms"] for part in told["types"]), reverse=True)
        assert all(node.calls == 1 for node in found.nodes)
    assert Measurement.from_json(json.loads(json.dumps(measured[0].to_json()))).profile == measured[0].profile


def test_the_kernels_are_those_of_the_precision(measured: list[Measurement]) -> None:
    """18 products with weights in the three blocks; what ran is the graph as ONNX Runtime has optimised it."""
    in_float, in_integers = (profile.read(item) for item in measured)

    def products(found: profile.Profile) -> list[profile.Node]:
        return [node for node in found.nodes if "integer product" in node.kernel]

    assert products(in_float) == []
    assert len(products(in_integers)) >= 18
    assert {node.layer for node in products(in_integers)} >= BLOCKS
    assert all(node.op in profilers.MLAS_INTEGER for node in products(in_integers))
    assert any(node.op == "MatMul" and node.kernel == "CPU float to float" for node in in_float.nodes)


def test_openvino_tells_its_kernels(workload: Any, artifacts: list[Artifact], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    plan = ep.quantize(workload, "int8")
    written = openvino_backend.write(workload, plan, tmp_path / "openvino", base=artifacts[0])
    (item,) = load.benchmark([written], profile=True, **QUICK)
    found = profile.read(item)
    assert found.runs == load.PROFILED_RUNS
    products = [node for node in found.nodes if node.op == "FullyConnected"]
    assert products
    assert {node.layer for node in products} & BLOCKS
    assert all(node.kernel for node in found.nodes)
    assert sum(one["share"] for one in found.types()) <= 1 + 1e-9


def test_a_loop_is_told_without_what_runs_in_it(tmp_path: Path) -> None:
    """A loop of five products in a graph with a sixth: ONNX Runtime's trace counts the five twice."""
    helper, kind = onnx.helper, onnx.TensorProto
    tensor = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["next"], name="inner/MatMul"),
            helper.make_node("Identity", ["go"], ["on"], name="inner/Identity"),
        ],
        "body",
        [tensor("i", kind.INT64, []), tensor("go", kind.BOOL, []), tensor("state", kind.FLOAT, [300, 300])],
        [tensor("on", kind.BOOL, []), tensor("next", kind.FLOAT, [300, 300])],
    )
    import numpy as np

    numbers = [("w", np.full((300, 300), 1e-3, np.float32)), ("five", np.array(5)), ("yes", np.array(True))]
    graph = helper.make_graph(
        [
            helper.make_node("Loop", ["five", "yes", "x"], ["looped"], name="outer/Loop", body=body),
            helper.make_node("MatMul", ["looped", "w"], ["y"], name="outer/MatMul"),
        ],
        "graph",
        [tensor("x", kind.FLOAT, [300, 300])],
        [tensor("y", kind.FLOAT, [300, 300])],
        [onnx.numpy_helper.from_array(array, name) for name, array in numbers],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "m.onnx")
    np.savez(tmp_path / "feeds.npz", x=np.ones((300, 300), np.float32))
    artifact = {"runtime": "onnx", "model": str(tmp_path / "m.onnx"), "feeds": str(tmp_path / "feeds.npz")}
    told = runner.profile(
        {"threads": 1, "runs": 20, "artifacts": [{**artifact, "inputs": ["x"], "disabled_optimizers": []}]}
    )
    nodes = {(node["op"], node["calls"]): node["ns"] for node in told["nodes"]}
    assert nodes.keys() >= {("Loop", 20), ("MatMul", 20), ("MatMul", 100)}
    assert nodes["Loop", 20] < nodes["MatMul", 100] > nodes["MatMul", 20]
    assert sum(nodes.values()) <= told["ns"]


def test_what_a_runtime_does_not_tell_is_one_sentence(
    artifacts: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(runner.PROFILERS, "onnx")
    with pytest.raises(
        UnavailableError, match=r"is for onnx, which does not tell what its operators take \(.*openvino"
    ):
        load.benchmark(artifacts[:1], profile=True, **QUICK)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("bert.encoder.layer.10.attention.self.query/MatMul", "bert.encoder.layer.10"),
        ("/bert/encoder/layer.0/attention/self/query/MatMul_quant", "bert.encoder.layer.0"),
        ("model.layers.3.mlp.gate_proj/MatMul", "model.layers.3"),
        ("swin.encoder.layers.1.blocks.5.mlp.fc1/Gemm", "swin.encoder.layers.1.blocks.5"),
        ("encoder.block.2.layer.1.DenseReluDense.wi/MatMul", "encoder.block.2"),
        ("bert.embeddings.word_embeddings/Gather/codes", "bert.embeddings"),
        ("Gather_10245___bert.embeddings/Slice", "bert.embeddings"),
        ("h.0.a/Mul_f32_bf16_h.1.b/Add", "h.1"),
        ("classifier/Gemm", "classifier"),
        ("node_Shape_0", profile.NO_LAYER),
        ("_empty_nn_module_stack_from_metadata_hook/Shape", profile.NO_LAYER),
        ("", profile.NO_LAYER),
        ("/", profile.NO_LAYER),
    ],
)
def test_the_layer_of_an_operator_is_in_its_name(name: str, layer: str) -> None:
    assert profile.layer_of(name) == layer


def made_up(*nodes: tuple[str, str, float], ms: float = 10.0, of: Any = ()) -> Any:
    raw = [{"name": name, "op": op, "kernel": "k<1>", "calls": 2, "ns": 2e6 * taken} for name, op, taken in nodes]
    for node, names in zip(raw, of, strict=False):
        node["of"] = names
    return SimpleNamespace(profile={"runs": 2, "ns": 2e6 * ms, "nodes": raw}, p50=9.0)


def test_a_piece_with_no_name_of_its_own_is_of_the_block_around_it() -> None:
    names = ["b.layer.0/MatMul", "MVN_1", "Multiply_2", "MVN_3", "b.layer.1/MatMul", "MVN_4"]
    of = [[], [], ["Multiply_2", "b.layer.0.norm/LayerNormalization"], [], [], []]
    found = profile.read(made_up(*((name, "X", 1.0) for name in names), of=of))
    none = profile.NO_LAYER
    assert [node.layer for node in found.nodes] == ["b.layer.0"] * 3 + [none, "b.layer.1", none]


class Boxes(HTMLParser):
    """The rectangles of a picture, by what they say when pointed at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, tuple[float, float, float]] = {}
        self._title = False
        self._said = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._title = tag == "title"
        if tag == "rect":
            place = dict(attrs)
            self.found[self._said] = (float(place["x"]), float(place["y"]), float(place["width"]))

    def handle_data(self, data: str) -> None:
        if self._title:
            self._said = data


def test_widths_of_the_picture_are_time() -> None:
    nodes = [("a.0.x/<MatMul>", "MatMul", 4.0), ("a.0.y/Add", "Add", 1.0), ("a.1.x/MatMul", "MatMul", 3.0)]
    picture = profile.flame(profile.read(made_up(*nodes)))
    boxes = Boxes(picture).found
    unit, row = profile.WIDTH / 10, profile.ROW
    assert boxes["one run: 10.000 ms"] == (0, 0, 10 * unit)
    assert boxes["a.0: 5.000 ms, 50.0% of the run"] == (0, row, 5 * unit)
    assert boxes["a.1: 3.000 ms, 30.0% of the run"] == (5 * unit, row, 3 * unit)
    assert boxes["not accounted for: 2.000 ms, 20.0% of the run"] == (8 * unit, row, 2 * unit)
    assert boxes["Add: 1.000 ms, 10.0% of the run"] == (4 * unit, 2 * row, unit)
    assert boxes["a.0.x/<MatMul>: 4.000 ms, 40.0% of the run"] == (0, 3 * row, 4 * unit)
    assert "<MatMul>" not in picture
    assert 'aria-label="Where 10.000 ms of one run go: MatMul 70%, Add 10%"' in picture


def test_the_rest_of_the_types_is_one_line() -> None:
    found = profile.read(made_up(*((f"n{at}", f"op{at}", 1.0) for at in range(6))))
    lines = profile.type_lines(found, 4)
    assert lines[4:] == [["2 others", "", "2", "2.000", "20.0%"], ["not accounted for", "", "", "4.000", "40.0%"]]


def test_bench_shows_a_profile(
    here: Callable[..., Any], artifacts: list[Artifact], tmp_path: Path, open_page: Callable[..., Any]
) -> None:
    words = ["bench", *(one.folder for one in artifacts), "--target", "cpu:1", "--seq", "16", "--queries", "60"]
    done = here(*words, "--profile", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for said in ("peak MB", "energy: ", "not accounted for", "bert.encoder.layer.0", "MLAS integer product"):
        assert said in done.stdout
    page, complaints = open_page(tmp_path / "out" / "profile.html")
    assert complaints == []
    assert page.locator("svg.flame").count() == 2
    assert page.locator("#layers0").inner_text().count("bert.encoder.layer.") == 3
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_bench_gives_a_profile_as_json(here: Callable[..., Any], artifacts: list[Artifact]) -> None:
    words = ["bench", artifacts[0].folder, "--target", "cpu:1", "--seq", "16", "--queries", "60", "--json"]
    told = json.loads(here(*words, "--profile").stdout)
    assert told["rows"][0]["profile"]["types"][0]["share"] > 0
    assert told["environment"]["watch"]["seconds"] > 0
    assert isinstance(told["warnings"], list)
    assert json.loads(here(*words).stdout)["rows"][0]["profile"] is None


def test_a_picture_of_nothing_is_wrong_use(here: Callable[..., Any], artifacts: list[Artifact], tmp_path: Path) -> None:
    done = here("bench", artifacts[0].folder, "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "-o is the folder for the picture of a profile: give --profile too." in done.stderr
    assert not (tmp_path / "out").exists()
