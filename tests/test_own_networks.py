"""A user's own network, recurrent or convolutional, with arrays as rows: judged, scored, pruned, exported, measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import pytest
import torch
from edgepress import cli
from edgepress.errors import InputError, UsageError
from edgepress.models import metrics
from PIL import Image

pytestmark = pytest.mark.chain

NETWORKS = """
import torch
from torch import nn


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.recurrent = layer(6, 16, num_layers=2, batch_first=True, bidirectional=True)
        self.hidden = nn.Linear(32, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x):
        states, _ = self.recurrent(x)
        return self.head(torch.relu(self.hidden(states.mean(dim=1))))


def lstm():
    torch.manual_seed(0)
    return Recurrent(nn.LSTM), torch.zeros(1, 10, 6)


def gru():
    torch.manual_seed(0)
    return Recurrent(nn.GRU), torch.zeros(1, 10, 6)


def cnn():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 3)), torch.zeros(1, 1, 12, 12)


def wide():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 96, 3), nn.ReLU(), nn.Conv2d(96, 96, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(96, 3)), torch.zeros(1, 1, 12, 12)


def number():
    torch.manual_seed(0)
    return Number(), torch.zeros(1, 6)


class Number(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x):
        return self.layers(x)


def words():
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, 2)), torch.zeros(1, 6, dtype=torch.long)


def colours():
    layers = [nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    return nn.Sequential(*layers), torch.zeros(1, 3, 8, 9)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the networks and rows of both shapes; the class of a row is where its mean lies."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_networks.py").write_text(NETWORKS)
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 300)
    for name, shape in (("sequences", (10, 6)), ("images", (1, 12, 12))):
        values = random.normal(size=(300, *shape)) + labels.reshape(-1, *[1] * len(shape)) - 1
        key = "x" if name == "sequences" else "image"
        np.savez(folder / f"{name}.npz", allow_pickle=False, **{key: values.astype(np.float32), "label": labels})
    return folder


@pytest.fixture
def own(place: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(place))
    return lambda name, rows: ep.load(f"own_networks:{name}", str(place / f"{rows}.npz"))


@pytest.mark.parametrize(("name", "rows"), [("lstm", "sequences"), ("gru", "sequences"), ("cnn", "images")])
def test_the_chain(own: Any, name: str, rows: str, sound: Any, tmp_path: Path) -> None:
    workload = own(name, rows)
    workload.data.check_disjoint()
    assert workload.data.metric == "accuracy"
    assert workload.skeleton.labels == ("0", "1", "2")
    pruned = ep.prune(workload, ep.score(workload, "fisher", rows=64), ratio=0.5)
    assert pruned.params < workload.params
    pruned = ep.recover(pruned, workload, steps=5).workload
    plan = ep.quantize(pruned, "int8-dynamic")
    floats, integers = ep.export(pruned, tmp_path / "fp32"), ep.export(pruned, tmp_path / "int8", plan)
    for artifact, least in ((floats, 0.999999), (integers, 0.99)):
        assert artifact.manifest.parity is not None
        assert artifact.manifest.parity.cosine > least
        assert [shape[0] for shape in artifact.manifest.parity.shapes] == [1, 3, 32]
        sound(artifact.model_file)
    operators = integers.manifest.operators
    assert operators.get("DynamicQuantizeLSTM", 0) == (2 if name == "lstm" else 0)
    assert operators.get("GRU", 0) == (2 if name == "gru" else 0)
    measured = ep.benchmark([floats, integers], target="cpu:1", batch=2, min_queries=30, min_seconds=1)
    assert [m.sequence for m in measured] == [0, 0]
    quality = metrics.of_module(workload)
    assert quality.n == len(workload.data.evaluation) == 120


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((40, 9, 6)), "label": np.arange(40) % 3}, r"shape \[9, 6\], the model takes \[10, 6\]"),
        ({"x": np.arange(2400.0).reshape(40, 10, 6), "label": np.arange(40) % 5}, "class 4, and the model tells 3"),
        ({"x": np.arange(2400.0).reshape(40, 10, 6), "label": np.arange(40) % 2 - 1}, "class -1, and the model tells"),
        ({"x": np.zeros((40, 6, 10)), "label": np.arange(40) % 3}, r"shape \[6, 10\], the model takes \[10, 6\]"),
        ({"x": np.full((40, 10, 6), np.nan), "label": np.arange(40) % 3}, "it holds NaN"),
        ({"y": np.zeros((40, 10, 6)), "label": np.arange(40) % 3}, "no column 'x'"),
    ],
)
def test_rows_that_do_not_fit(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    monkeypatch.syspath_prepend(str(place))
    np.savez(tmp_path / "rows.npz", **arrays)
    with pytest.raises(InputError, match=message):
        ep.load("own_networks:lstm", str(tmp_path / "rows.npz"))


def test_images_reach_a_network_as_it_takes_them(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From folders of classes, and from arrays with channels last; classes are counted in the alphabet's order."""
    monkeypatch.syspath_prepend(str(place))
    random = np.random.default_rng(0)
    labels = np.arange(40) % 2
    pictures = random.integers(0, 100, (40, 8, 9, 3), dtype=np.uint8)
    pictures[np.arange(40), :, :, 2 * labels] += 150  # red ones and blue ones
    np.savez(tmp_path / "rows.npz", image=pictures, label=labels)
    for row, picture in enumerate(pictures):
        path = tmp_path / "classes" / ("a red", "blue")[labels[row]] / f"{row}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    for rows in ("rows.npz", "classes"):
        workload = ep.load("own_networks:colours", str(tmp_path / rows))
        (batch,) = workload.data.evaluation.batches(40)
        image = next(iter(batch.inputs.values()))
        assert image.shape[1:] == (3, 8, 9)
        assert torch.equal(image.mean(dim=(2, 3)).argmax(dim=1), 2 * batch.labels)
        assert image.max() <= 1
    with pytest.raises(InputError, match=r"shape \[8, 9\], the model takes \[1, 12, 12\]"):
        ep.load("own_networks:cnn", str(tmp_path / "classes"))


def test_a_network_with_nothing_to_remove(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(place))
    for command, out in ((cli.prune, "pruned"), (cli.score, "scores.json")):
        with pytest.raises(InputError, match="Nothing in words can be removed: the 2 channels that"):
            command("own_networks:words", out=tmp_path / out)
        assert not (tmp_path / out).exists()


def test_a_network_that_fails_on_its_rows(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(place))
    tokens = np.random.default_rng(0).integers(9, 99, (40, 6))
    np.savez(tmp_path / "rows.npz", input=tokens, label=np.arange(40) % 2)
    with pytest.raises(InputError, match=r"rows\.npz: words fails on a row with IndexError"):
        ep.load("own_networks:words", str(tmp_path / "rows.npz"))


def test_numbers_and_no_labels(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(place))
    x = np.random.default_rng(0).normal(size=(60, 10, 6)).astype(np.float32)
    np.savez(tmp_path / "numbers.npz", x=x, label=x.mean(axis=(1, 2)))
    np.savez(tmp_path / "none.npz", x=x)
    assert ep.load("own_networks:lstm", str(tmp_path / "numbers.npz")).data.metric == "spearman"
    without = ep.load("own_networks:lstm", str(tmp_path / "none.npz"))
    assert without.data.metric == "cosine"
    assert metrics.of_module(without.judged_by("kl")).value == 0
    losses = without.losses(next(without.data.calibration.batches(4)))
    assert torch.isfinite(losses).all()
    assert losses.requires_grad


def test_one_number_and_no_labels(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A network that answers a number is held to its numbers: an angle would find any other the same."""
    monkeypatch.syspath_prepend(str(place))
    np.savez(tmp_path / "none.npz", x=np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32))
    workload = ep.load("own_networks:number", str(tmp_path / "none.npz"))
    assert workload.data.metric == "number-agreement"
    changed = ep.prune(workload, ep.score(workload, "magnitude"), ratio=0.5)
    with torch.no_grad():
        x = torch.from_numpy(np.stack(list(workload.data.evaluation.inputs["x"])))
        theirs, ours = workload.module(x)[:, 0], changed.module(x)[:, 0]
    found = metrics.of_modules(changed, workload)
    explained = 1 - (ours - theirs).square().sum() / (theirs - theirs.mean()).square().sum()
    assert found["value"] == pytest.approx(100 * float(explained), rel=1e-5)
    assert found["drop"] > 1
    with pytest.raises(UsageError, match="no labels for 'own_networks:number'; they can be judged by number-agree"):
        workload.judged_by("own_networks:number")


def test_a_recurrent_network_is_not_trained_with_rounding(
    here: Any, place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(place))
    x = np.random.default_rng(0).normal(size=(60, 10, 6)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=x, label=np.arange(60) % 3)
    source = ("quantize", "own_networks:lstm", "--data", tmp_path / "rows.npz", "--scheme", "int8-dynamic")
    ended = here(*source, "--steps", 3, "-o", tmp_path / "out")
    assert ended.returncode == 2, ended.stderr
    assert "where a layer is recurrent" in ended.stderr
    assert "AttributeError" not in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.npz"]


LEVELS = {"cnn": "speedup: 1.2", "wide": "speedup: 1.2", "shares": "channel: 0.5"}


@pytest.mark.parametrize("case", LEVELS)
def test_compress_from_the_command_line(edgepress: Any, place: Path, tmp_path: Path, case: str) -> None:
    recipe, run = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(
        f"target: cpu:1\nlimits: {{max_drop: 60}}\nlevels: [{{{LEVELS[case]}}}]\nrecover: {{steps: 5}}\n"
        "measure: {min_queries: 100, min_seconds: 1}\n"
    )
    model, data = f"own_networks:{'wide' if case == 'wide' else 'cnn'}", place / "images.npz"
    done = edgepress("compress", model, "--data", data, "--recipe", recipe, "-o", run, "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["original"]["quality"]["metric"] == "accuracy"
    assert (run / "report.html").is_file()
    (cut,) = (run / "stages").glob("*-prune-1-*")
    plan = json.loads((cut / "checkpoint" / "edgepress.json").read_text())["plan"]
    # A network of a few microseconds may cost what its operators cost, however few their channels.
    nothing_gained = [entry for entry in outcome["refused"] if "no removal makes it" in entry["reason"]]
    assert bool(plan) == bool(list((run / "stages").glob("*-recover-1-*"))) == (not nothing_gained)
    if case != "cnn":
        assert plan["channel"]
    if case == "wide":
        summary = json.loads((run / "summary.json").read_text())
        assert summary["removed"] == plan
        assert summary["speed"]["speedup"]["value"] >= summary["speed"]["wanted"] == 1.2
        assert "Fitted to 1.2x" in (run / "report.html").read_text()
    compared = edgepress("compare", run)
    assert compared.returncode == 0, compared.stderr
