"""The exported file computes what the module does, at every shape that it declares, and says so truthfully."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import onnx
import pytest
import torch
from edgepress.errors import InputError, UsageError
from edgepress.export import backends, large, parity
from edgepress.export.artifact import open_artifact
from edgepress.export.backends import onnx as backend
from edgepress.export.backends.onnx import open_session, write
from edgepress.models import surgery
from edgepress.plan import PruningPlan, QuantizationPlan, Unit


@pytest.fixture(scope="module")
def pruned(workload: Any) -> Any:
    units = [Unit("head", 0, 0), Unit("ffn", 1, 7), Unit("block", 2, 0), *(Unit("ffn", 0, i) for i in range(100))]
    return surgery.prune(workload, PruningPlan.of(units))


@pytest.fixture(scope="module")
def exported(pruned: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ep.export(pruned, tmp_path_factory.mktemp("export") / "fp32")


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (1, 64), (5, 13), (32, 64)])
def test_any_declared_shape_and_mask(pruned: Any, exported: Any, batch: int, sequence: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(5, 2000, (batch, sequence), generator=generator)
    mask = (torch.rand(batch, sequence, generator=generator) < 0.7).long()
    mask[:, 0] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.inference_mode():
        wanted = pruned.forward(inputs).numpy()
    with open_session(exported) as session:
        (got,) = session.run({name: tensor.numpy() for name, tensor in inputs.items()})
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_the_manifest_tells_the_truth(pruned: Any, exported: Any) -> None:
    manifest = exported.manifest
    graph = onnx.load(exported.model_file).graph
    assert manifest.params == pruned.params
    assert sum(manifest.operators.values()) == len(graph.node)
    assert manifest.parity.max_abs < 1e-4
    assert [1, 1] in [list(shape) for shape in manifest.parity.shapes]
    assert [32, 64] in [list(shape) for shape in manifest.parity.shapes]
    assert exported.size_bytes == exported.model_file.stat().st_size
    assert (exported.folder / "tokenizer.json").is_file()


def test_nodes_are_named_after_their_modules_and_hold_no_paths(exported: Any) -> None:
    text = exported.model_file.read_bytes()
    names = [node.name for node in onnx.load(exported.model_file).graph.node]
    assert "bert.encoder.layer.0.attention.self.query/MatMul" in names
    assert len(set(names)) == len(names)
    assert str(Path(ep.__file__).parent).encode() not in text
    assert b"site-packages" not in text


def test_dynamic_int8(pruned: Any, exported: Any, tmp_path: Path) -> None:
    plan = ep.quantize(pruned, "int8-dynamic", embeddings=True)
    small = ep.export(pruned, tmp_path / "int8", plan)
    assert small.precision == "int8-dynamic"
    assert small.manifest.operators["MatMulIntegerToFloat"] == len([n for n in plan.weights if ".layer." in n])
    assert small.manifest.parity.cosine > 0.95
    assert small.size_bytes < 0.45 * exported.size_bytes
    with open_session(small) as session:
        feeds = parity.feeds(pruned, {"batch": 4, "sequence": 32})
        assert {name: array.shape for name, array in feeds.items()} == dict.fromkeys(feeds, (4, 32))
        assert session.run(feeds)[0].shape == (4, 2)


@pytest.mark.parametrize(("opset", "scheme"), [(18, "fp32"), (25, "fp32"), (25, "int8-dynamic"), (18, "int8-weight")])
def test_the_operator_set_that_was_asked_for(pruned: Any, sound: Any, opset: int, scheme: str, tmp_path: Path) -> None:
    assert opset in {backend.OPSETS[0], backend.OPSETS[-1]}
    plan = None if scheme == "fp32" else ep.quantize(pruned, scheme)
    artifact = open_artifact(ep.export(pruned, tmp_path / "x", plan, opset=opset).folder)
    assert artifact.manifest.opset == opset
    assert {one.version for one in onnx.load(artifact.model_file).opset_import if not one.domain} == {opset}
    assert artifact.manifest.parity is not None
    assert artifact.manifest.parity.cosine > (0.9999 if scheme == "fp32" else 0.95)
    sound(artifact.model_file)


def test_operator_sets_that_cannot_be_written(pruned: Any, exported: Any, here: Any, tmp_path: Path) -> None:
    assert exported.manifest.opset in backend.OPSETS
    for opset in (17, 26):
        with pytest.raises(UsageError, match=f"Operator set {opset} cannot be written; 18 to 25 can"):
            ep.export(pruned, tmp_path / "x", opset=opset)
    with pytest.raises(UsageError, match="in int8-dynamic needs operator set 23 at least, not 20"):
        ep.export(pruned, tmp_path / "x", ep.quantize(pruned, "int8-dynamic"), opset=20)
    assert not list(tmp_path.iterdir())
    elsewhere = here("export", "zoo:cnn-mnist", "--to", "openvino", "--opset", "20", "-o", tmp_path / "x")
    assert elsewhere.returncode == 2
    assert "--opset is of --to onnx, not of --to openvino" in elsewhere.stderr


def test_large_weights_lie_beside_the_graph(
    pruned: Any, sound: Any, here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large, "LARGEST", 50_000)
    plan = ep.quantize(pruned, "int8-dynamic")
    base = ep.export(pruned, tmp_path / "fp32")
    for artifact in (base, write(pruned, plan, tmp_path / "int8-dynamic", base=base)):
        assert {"model.onnx", "model.data"} <= set(artifact.manifest.files)
        sizes = [(artifact.folder / name).stat().st_size for name in ("model.onnx", "model.data")]
        assert artifact.size_bytes == sum(sizes)
        assert sizes[1] > 2 * sizes[0]
        sound(artifact.model_file)
        assert here("export", "--verify", artifact.folder).returncode == 0
    data = bytearray((base.folder / "model.data").read_bytes())
    data[len(data) // 2] ^= 1
    (base.folder / "model.data").write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"model\.data is damaged"):
        open_artifact(base.folder)


def test_a_file_that_computes_something_else_is_refused_and_leaves_nothing(
    workload: Any, exported: Any, tmp_path: Path
) -> None:
    other = ep.prune(workload, ep.score(workload, "random"), ratio=0.3)
    with pytest.raises(parity.ParityError, match="at most"):
        write(other, QuantizationPlan("fp32"), tmp_path / "wrong", base=exported)
    assert not list(tmp_path.iterdir())


def test_a_plan_for_another_model_is_refused(pruned: Any, exported: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"layer\.7"):
        write(pruned, QuantizationPlan("int8-dynamic", {"bert.layer.7": "int8"}), tmp_path / "x", base=exported)


AXIS = {"name": "sequence", "min": 1, "max": 4}


@pytest.fixture
def copied(exported: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in exported.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_every_byte_is_checked(copied: Path) -> None:
    data = bytearray((copied / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copied / "model.onnx").write_bytes(bytes(data))
    with pytest.raises(InputError, match="damaged"):
        open_artifact(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": {"../../etc/passwd": "0", "model.onnx": "0"}}, "not a plain file name|damaged"),
        ({"model_file": "other.onnx"}, "no checksum"),
        ({"format": 9}, "format"),
        ({"surprise": 1}, "surprise"),
        ({"inputs": {"x": {"dtype": "floaty", "shape": [1], "axes": {}}}}, "dtype"),
        ({"inputs": {"x": {"dtype": "int64", "shape": [1, -4], "axes": {}}}}, "shape"),
        ({"inputs": {"x": {"dtype": "int64", "shape": [1, 1 << 45], "axes": {}}}}, "is no input"),
        ({"inputs": {"x": {"dtype": "int64", "shape": [1, 4], "axes": {"7": AXIS}}}}, "no axis '7'"),
        ({"inputs": {"x": {"dtype": "int64", "shape": [1, 4], "axes": {"q": AXIS}}}}, "no axis 'q'"),
        ({"inputs": {"x": {"dtype": "int64", "shape": [1, 4], "axes": {"1": {**AXIS, "min": 9}}}}}, "ends at 4"),
    ],
)
def test_hostile_manifests(copied: Path, change: dict[str, Any], message: str) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(InputError, match=message):
        open_artifact(copied)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 10_000, "\x00", '{"a": '])
def test_manifests_that_are_no_json(copied: Path, text: str) -> None:
    (copied / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="not valid"):
        open_artifact(copied)


def test_weights_that_no_checksum_covers(copied: Path) -> None:
    (copied / "model.data").write_bytes(b"other weights")
    with pytest.raises(InputError, match=r"no checksum for 'model\.data'"):
        open_artifact(copied)


def test_missing_folders_and_files(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no artifact folder"):
        open_artifact(tmp_path / "nowhere")
    (copied / "model.onnx").unlink()
    with pytest.raises(InputError, match="lacks the file"):
        open_artifact(copied)


def test_runtimes_that_there_are_not() -> None:
    with pytest.raises(UsageError, match="onnx"):
        backends.get("caffe")


def test_every_backend_file_is_listed() -> None:
    folder = Path(backends.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(backends.BACKENDS)
