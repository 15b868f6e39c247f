"""ONNX files that edgepress did not write: quantized, compared with the float file, or refused in one sentence."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from edgepress import foreign
from edgepress.models.functions import separate_attention
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import nn

WORDS = 2000


class Encoder(nn.Module):
    """Two inputs, two outputs, a table, and channels of very unequal size before the second layer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0, norm_first=True)
        self.table, self.head = nn.Embedding(WORDS, 64), nn.Linear(64, 3)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        separate_attention(self)
        with torch.no_grad():
            self.layers.layers[1].norm2.weight[::16] *= 50  # type: ignore[index, union-attr]

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.layers(self.table(ids) * scale[:, None, None])
        return self.head(states[:, 0]), states


def convolutional() -> nn.Module:
    norm, pool = nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1)
    layers = (nn.Conv2d(3, 16, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), pool)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``old.onnx`` by TorchScript in operator set 14, ``new.onnx`` by torch.export with its weights beside it,
    ``cnn.onnx`` for one image at a time, and rows for them."""
    place = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    random, net = np.random.default_rng(0), Encoder().eval()
    example: Any = (torch.randint(0, WORDS, (2, 16)), torch.ones(2))
    names: Any = {"input_names": ["ids", "scale"], "output_names": ["logits", "states"]}
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        free = {"ids": {0: "batch", 1: "length"}, "scale": {0: "batch"}}
        torch.onnx.export(net, example, place / "old.onnx", opset_version=14, dynamic_axes=free, dynamo=False, **names)
        shapes = ({0: batch, 1: length}, {0: batch})
        torch.onnx.export(net, example, place / "new.onnx", dynamic_shapes=shapes, dynamo=True, verbose=False, **names)
        images = torch.randn(1, 3, 16, 16)
        torch.onnx.export(convolutional().eval(), (images,), place / "cnn.onnx", input_names=["x"], dynamo=False)
    np.savez(place / "rows.npz", ids=random.integers(0, WORDS, (20, 16)), scale=np.ones(20), label=np.zeros(20))
    np.savez(place / "images.npz", x=random.standard_normal((12, 3, 16, 16)).astype(np.float32))
    return place


def _cosines(one: Path, other: Path, feeds: dict[str, NDArray[Any]]) -> list[float]:
    """Of each output, over batches as they are compared: a range that is found as rows come is a batch's own."""
    answers = []
    for session in (onnxruntime.InferenceSession(path) for path in (one, other)):
        starts = range(0, len(next(iter(feeds.values()))), foreign.BATCH)
        parts = [session.run(None, {k: v[start : start + foreign.BATCH] for k, v in feeds.items()}) for start in starts]
        answers.append([np.concatenate(output).ravel() for output in zip(*parts, strict=True)])
    return [float(a @ b / np.sqrt((a @ a) * (b @ b))) for a, b in zip(*answers, strict=True)]


@pytest.mark.parametrize("name", ["old", "new"])
@pytest.mark.parametrize("scheme", foreign.SCHEMES)
def test_a_graph_by_plain_torch(here: Any, folder: Path, tmp_path: Path, name: str, scheme: str) -> None:
    source, out = folder / f"{name}.onnx", tmp_path / "out.onnx"
    args = ("quantize", source, "--scheme", scheme, "--data", folder / "rows.npz", "-o", out, "--json")
    done = here(*args)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["quantized"]) == 2 * 6 + 1
    assert len(found["in_float"]) == 1  # the head is too small to gain anything
    assert found["size_bytes"] == out.stat().st_size < 0.4 * onnx.load(source).ByteSize()
    assert list(tmp_path.iterdir()) == [out]
    rows = np.load(folder / "rows.npz")
    feeds = {"ids": rows["ids"], "scale": rows["scale"].astype(np.float32)}
    wanted = _cosines(source, out, feeds)
    told = found["parity"]["outputs"]
    assert [told[output]["cosine"] for output in ("logits", "states")] == pytest.approx(wanted, abs=1e-5)
    assert min(wanted) > 0.999
    assert found["parity"]["rows"] == 20
    kinds = Counter(node.op_type for node in onnx.load(out).graph.node)
    assert kinds["MatMulNBits" if scheme == "int8-weight" else "MatMulIntegerToFloat"] == 12
    assert kinds["DynamicQuantizeLinear"] == (8 if scheme == "int8-dynamic" else 0)
    assert kinds["QuantizeLinear"] == (8 if scheme == "int8" else 0)
    other = {"ids": rows["ids"][:3, :5], "scale": np.ones(3, np.float32)}
    assert min(_cosines(source, out, other)) > 0.99, "the free axes are free still"


def test_smoothing_pays_where_channels_are_unequal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cosine() -> float:
        found = foreign.quantize(folder / "old.onnx", tmp_path / "o.onnx", "int8", data=folder / "rows.npz")
        return found.parity["states"].cosine

    smoothed = cosine()
    monkeypatch.setattr(foreign, "best", lambda sample, *_, **__: (torch.ones_like(sample.largest), 0.0))
    assert 1 - smoothed < 0.5 * (1 - cosine())


def test_without_rows_the_outputs_are_compared_on_noise(here: Any, folder: Path, tmp_path: Path) -> None:
    done = here("quantize", folder / "old.onnx", "--scheme", "int8-dynamic", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "random inputs" in done.stdout
    assert "parity     states: cosine 0.99" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["old-int8-dynamic.onnx"]


def test_convolutions(here: Any, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    done = here("quantize", folder / "cnn.onnx", "--scheme", "int8", "--data", folder / "images.npz", "-o", out)
    assert done.returncode == 0, done.stderr
    assert "no other product" in done.stdout
    weights = [one for one in onnx.load(out).graph.initializer if one.data_type == TensorProto.INT8 and one.dims]
    assert sorted(len(one.dims) for one in weights)[-2:] == [4, 4]
    feeds = {"x": np.load(folder / "images.npz")["x"][:1]}
    assert min(_cosines(folder / "cnn.onnx", out, feeds)) > 0.99
    done = here("quantize", folder / "cnn.onnx", "--scheme", "int8-dynamic", "-o", tmp_path / "no.onnx")
    assert done.returncode == 2
    assert "kernels for int8 alone" in done.stderr
    assert list(tmp_path.iterdir()) == [out]


def test_a_bias_with_an_axis_too_many_beside_convolutions(tmp_path: Path) -> None:
    """Gemm lets a bias be [1, out], which ONNX Runtime's tool cannot take as it is."""
    random = np.random.default_rng(0)
    shapes = {"k": [8, 3, 3, 3], "w": [8, 4], "b": [1, 4]}
    weights = [onnx.numpy_helper.from_array(random.standard_normal(shapes[n]).astype(np.float32), n) for n in shapes]
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "b"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 4])
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "x.onnx")
    rows = _rows(tmp_path / "rows.npz", x=random.standard_normal((16, 3, 8, 8)).astype(np.float32))
    found = foreign.quantize(tmp_path / "x.onnx", tmp_path / "out.onnx", "int8", data=rows)
    assert len(found.quantized) == 2
    assert found.parity["y"].cosine > 0.999


def _written(path: Path, nodes: list[Any], opset: int = 18) -> Path:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 64]) for name in ("x", "y")]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [64, 64], np.ones(64 * 64, np.float32))
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), path)
    return path


def test_nodes_without_names_and_with_the_same(tmp_path: Path) -> None:
    """A name is made for each; one that is another's module is not taken for it."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["b"], name="m/MatMul"),
        helper.make_node("MatMul", ["b", "w"], ["c"], name="m"),
        helper.make_node("MatMul", ["c", "w"], ["y"], name="m/MatMul"),
    ]
    source = _written(tmp_path / "x.onnx", nodes)
    rows = tmp_path / "rows.npz"
    np.savez(rows, x=np.random.default_rng(0).random((9, 64)).astype(np.float32))
    found = foreign.quantize(source, tmp_path / "out.onnx", "int8", data=rows)
    assert len(found.quantized) == 4
    assert found.parity["y"].cosine > 0.9999


def _rows(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder, place: (folder / "missing.onnx", None), "cannot be read as an ONNX model"),
        (lambda folder, place: (_cut(folder, place), None), "cannot be read as an ONNX model"),
        (lambda folder, place: (_alone(folder, place), None), "cannot be read as an ONNX model"),
        (lambda folder, place: (_written(place / "e.onnx", []), None), "cannot be read as an ONNX model"),
        (
            lambda folder, place: (_written(place / "r.onnx", [helper.make_node("Relu", ["x"], ["y"])]), None),
            "no product with constant weights",
        ),
        (lambda folder, place: (folder / "old.onnx", folder / "missing.npz"), "cannot be read as an .npz file"),
        (lambda folder, place: (folder / "old.onnx", folder / "old.onnx"), "cannot be read as an .npz file"),
        (
            lambda folder, place: (folder / "old.onnx", _rows(place / "a.npz", scale=np.ones(3))),
            "lacks the input 'ids' of the graph (it holds: scale)",
        ),
        (
            lambda folder, place: (folder / "old.onnx", _rows(place / "b.npz", ids=np.ones((3, 4)), scale=np.ones(3))),
            "'ids' in",
        ),
        (
            lambda folder, place: (
                folder / "old.onnx",
                _rows(place / "c.npz", ids=np.ones((3, 4), int), scale=np.ones(4)),
            ),
            "different numbers of rows",
        ),
        (
            lambda folder, place: (folder / "cnn.onnx", _rows(place / "d.npz", x=np.ones((2, 3, 8, 8), np.float32))),
            "the graph takes float32 [1, 3, 16, 16]",
        ),
    ],
)
def test_bad_files(here: Any, folder: Path, tmp_path: Path, make: Any, message: str) -> None:
    source, data = make(folder, tmp_path)
    args = ("--data", data) if data else ()
    done = here("quantize", source, *args, "-o", tmp_path / "out.onnx")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert [line for line in done.stderr.splitlines() if line and line != "quantize …"] == [
        next(line for line in done.stderr.splitlines() if line.startswith("edgepress: "))
    ]
    assert not (tmp_path / "out.onnx").exists()


def _cut(folder: Path, place: Path) -> Path:
    (place / "cut.onnx").write_bytes((folder / "old.onnx").read_bytes()[:5000])
    return place / "cut.onnx"


def _alone(folder: Path, place: Path) -> Path:
    """Without the file that holds its weights."""
    (place / "alone.onnx").write_bytes((folder / "new.onnx").read_bytes())
    return place / "alone.onnx"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--scheme", "int8"), "give an .npz file with the arrays ids, scale"),
        (("--scheme", "int4"), "cannot be quantized to 'int4'"),
        (("--max-drop", "1%"), "alone"),
        (("-o", "folder"), "not another file that ends in .onnx"),
    ],
)
def test_bad_use(here: Any, folder: Path, tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    done = here("quantize", folder / "old.onnx", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
