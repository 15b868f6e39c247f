"""An axis that is declared free is free in what is written, or one sentence names it and nothing is written."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgepress as ep
import onnx
import pytest
from edgepress.errors import InputError, ParityError, UnavailableError
from edgepress.export.artifact import Artifact
from edgepress.export.backends.onnx import write
from edgepress.plan import QuantizationPlan

NETWORKS = """
import torch
from torch import nn


class Rows(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = torch.relu(self.hidden(x))
        return self.head(self.rows(y, x.shape[0]))


class Whole(Rows):
    def rows(self, y, n):
        return y.reshape(int(n), 8)


class Mean(Rows):
    def rows(self, y, n):
        return y / len(y)


class Table(Rows):
    def rows(self, y, n):
        return y + torch.zeros(2, 8) if n > 1 else y


class Few(Rows):
    def rows(self, y, n):
        return y if n <= 8 else 2 * y


class Exported(Rows):
    def rows(self, y, n):  # with a path of its own for exporters, which holds for two rows alone
        return y[torch.arange(2)] if torch.compiler.is_exporting() else y


class Two(Rows):
    def rows(self, y, n):
        return y.reshape(2, 8)


class Free(Rows):
    def rows(self, y, n):
        return y.reshape(n, 8)


def whole(kind=Whole):
    torch.manual_seed(0)
    return kind(), torch.zeros(1, 12)


def mean():
    return whole(Mean)


def table():
    return whole(Table)


def few():
    return whole(Few)


def exported():
    return whole(Exported)


def two():
    return whole(Two)


def free():
    return whole(Free)
"""


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "of_rows.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "of_rows", raising=False)
    return lambda name: ep.load(f"of_rows:{name}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("whole", r"axis 0 of its input 'x' is declared free \('batch', 1 to 32\), but .* fixes it at 2"),
        ("mean", r"axis 0 of its input 'x' is declared free \('batch', 1 to 32\), but .* fixes it at 2"),
        ("table", r"axis 0 of its input 'x' is declared free \('batch', 1 to 32\), but .* fixes it at 2"),
        ("few", r"axis 0 of its input 'x' is declared free \('batch', 1 to 32\), but .* up to 8 alone"),
    ],
)
def test_what_the_exporter_would_fix_is_refused(
    own: Callable[[str], Any], name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnavailableError, match=message):
        ep.export(own(name), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_sizes_taken_as_they_are_stay_free(own: Callable[[str], Any], tmp_path: Path) -> None:
    artifact = ep.export(own("free"), tmp_path / "x")
    (given,) = onnx.load(artifact.model_file).graph.input
    assert [size.dim_param or size.dim_value for size in given.type.tensor_type.shape.dim] == ["batch", 12]


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_from_the_command_line(own: Callable[[str], Any], here: Any, runtime: str, tmp_path: Path) -> None:
    if runtime != "onnx":
        pytest.importorskip(runtime)
    own("free")  # so that the networks are found
    done = here("export", "of_rows:whole", "--to", runtime, "-o", tmp_path / "x")
    assert done.returncode == 2, done.stderr
    assert "axis 0 of its input 'x' is declared free ('batch', 1 to 32)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_length_of_a_transformer(workload: Any, tmp_path: Path) -> None:
    module = copy.deepcopy(workload.module)
    module.bert.embeddings.register_forward_hook(lambda _, __, out: out.reshape(out.shape[0], int(out.shape[1]), 64))
    with pytest.raises(
        UnavailableError, match=r"axis 1 of its input 'input_ids' is declared free \('sequence', 1 to 64\).*at 16"
    ):
        ep.export(replace(workload, module=module), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_claims_any_size_and_takes_one(own: Callable[[str], Any], tmp_path: Path) -> None:
    """The graph is traced with two rows, and its axis has a name; only running it tells."""
    with pytest.raises(ParityError, match=r"Axis 0 of its input 'x' \('batch'\) is not free: with 2 it agrees, with 1"):
        ep.export(own("exported"), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_graph_whose_axis_is_a_constant(workload: Any, tmp_path: Path) -> None:
    """Made outside, and handed over as the float graph of the module."""
    base = ep.export(workload, tmp_path / "base")
    graph = onnx.load(base.model_file)
    for given in graph.graph.input:
        given.type.tensor_type.shape.dim[1].dim_value = 16
    fixed = tmp_path / "fixed"
    fixed.mkdir()
    onnx.save(graph, fixed / "model.onnx")
    with pytest.raises(
        ParityError, match=r"does not run: .* Axis 1 of its input '\w+' \('sequence'\) is not free: with 16 it agrees"
    ):
        write(workload, QuantizationPlan("fp32"), tmp_path / "x", base=Artifact(fixed, base.manifest))
    assert not (tmp_path / "x").exists()


def test_a_module_that_fails_on_its_own_row(own: Callable[[str], Any]) -> None:
    with pytest.raises(InputError, match=r"of_rows:two\(\) fails on its own row with RuntimeError: shape '\[2, 8\]'"):
        own("two")
