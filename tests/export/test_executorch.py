"""ExecuTorch programs are really lowered and run; where ExecuTorch is missing, that is one sentence."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import pytest
import torch
from edgepress.benchmarks import load, profile
from edgepress.errors import InputError, UnavailableError, UsageError
from edgepress.export import reference
from edgepress.export.artifact import Artifact, open_artifact
from edgepress.export.backends import executorch as backend
from edgepress.models import surgery
from edgepress.plan import PruningPlan, QuantizationPlan, Unit

FP32 = QuantizationPlan("fp32")
installed = pytest.mark.skipif(find_spec("executorch") is None, reason="ExecuTorch is not installed")


@pytest.fixture(scope="module")
def pruned(workload: Any) -> Any:
    return surgery.prune(workload, PruningPlan.of([Unit("head", 0, 0), Unit("ffn", 1, 7), Unit("block", 2, 0)]))


@pytest.fixture(scope="module")
def written(pruned: Any, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return backend.write(pruned, FP32, tmp_path_factory.mktemp("executorch") / "fp32")


@installed
def test_an_artifact_is_whole_and_proven(pruned: Any, written: Artifact) -> None:
    manifest = open_artifact(written.folder).manifest
    assert (manifest.runtime, manifest.model_file, manifest.precision) == ("executorch", "model.pte", "fp32")
    assert manifest.parity is not None
    assert manifest.parity.max_rel < 1e-4
    assert {(1, 1), (32, 64)} <= set(manifest.parity.shapes)
    assert manifest.operators["executorch_call_delegate"] >= 12  # the products of two blocks, six each
    assert not any("linear" in name or "mm" in name for name in manifest.operators)
    assert written.size_bytes == written.model_file.stat().st_size > 4 * 0.9 * pruned.params
    assert reference.verify(written).cases > 0


@installed
def test_what_its_operators_take_is_told(written: Artifact) -> None:
    (item,) = load.benchmark([written], target="cpu:1", sequence=16, min_queries=40, memory=False, profile=True)
    found = profile.read(item)
    assert found.runs == load.PROFILED_RUNS
    products = [node for node in found.nodes if node.kernel.startswith("XNNPACK") and node.op == "Fully Connected"]
    assert len(products) >= 12
    assert any(node.kernel == "portable" for node in found.nodes)
    assert 0 < sum(one["share"] for one in found.types()) <= 1 + 1e-9


@installed
@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (1, 64), (5, 13), (32, 64)])
def test_any_declared_shape_and_mask(pruned: Any, written: Artifact, batch: int, sequence: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    mask = (torch.rand(batch, sequence, generator=generator) < 0.7).long()
    mask[:, 0] = 1
    inputs = {"input_ids": torch.randint(5, 2000, (batch, sequence), generator=generator), "attention_mask": mask}
    with torch.inference_mode():
        wanted = pruned.forward(inputs).numpy()
    with backend.open_session(written) as session:
        (got,) = session.run({name: tensor.numpy() for name, tensor in inputs.items()})
    np.testing.assert_allclose(got, wanted, atol=1e-4)


@installed
def test_it_is_measured_beside_onnx(pruned: Any, written: Artifact, tmp_path: Path) -> None:
    taken = ep.benchmark([ep.export(pruned, tmp_path / "onnx"), written], target="cpu:1", sequence=16, min_queries=40)
    assert [len(item.samples) for item in taken] == [40, 40]
    assert all(item.samples.min() > 0 and item.peak_rss_bytes and item.load_ms for item in taken)


@installed
def test_convolutions_take_many_rows(tmp_path: Path) -> None:
    artifact = backend.write(ep.load("zoo:cnn-mnist"), FP32, tmp_path / "x")
    assert artifact.manifest.parity is not None
    assert [shape[0] for shape in artifact.manifest.parity.shapes] == [1, 3, 32]


@installed
def test_wrong_use_is_one_sentence(written: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="runs on 'cpu'"), backend.open_session(written, device="cuda"):
        pass
    (tmp_path / "model.pte").write_bytes(b"no program at all")
    with (
        pytest.raises(InputError, match="ExecuTorch cannot load"),
        backend.open_session(Artifact(tmp_path, written.manifest)),
    ):
        pass


def test_what_it_cannot_write(here: Any, tmp_path: Path) -> None:
    done = here("export", "zoo:cnn-mnist", "--to", "executorch", "--scheme", "int8", "-o", tmp_path / "x")
    assert done.returncode == 2
    assert "The executorch runtime cannot write the scheme 'int8' (it can: fp32)." in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_one_sentence(workload: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(UnavailableError, match=r"ExecuTorch is missing: pip install 'edgepress\[executorch\]'"):
        backend.write(workload, FP32, tmp_path / "x")
    assert not list(tmp_path.iterdir())
