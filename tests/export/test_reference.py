"""An artifact is held to what it answered where it was proven, and served, in processes without PyTorch."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import onnx
import pytest
import torch
from edgepress.errors import InputError, ParityError
from edgepress.export import generate, reference, session
from edgepress.export.artifact import Artifact, open_artifact, seal
from edgepress.export.backends import onnx as backend
from edgepress.plan import QuantizationPlan
from onnx import numpy_helper

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is not installed here")
sys.meta_path.insert(0, Blocked())
"""


def _run(code: str, *args: Any, blocked: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """``code`` in a process in which the packages ``blocked`` cannot be imported."""
    argv = [sys.executable, "-c", BLOCK.format(blocked=set(blocked)) + code, *map(str, args)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def _verified(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "from edgepress.cli import main\nmain()"
    heavy = (
        "torch",
        "transformers",
        "onnx",
        "onnxscript",
        "scipy",
        "sklearn",
        "pandas",
        "safetensors",
        "torch_pruning",
    )
    return _run(code, "export", "--verify", folder, "--json", blocked=heavy)


@pytest.fixture(scope="module", params=["fp32", "int8"])
def artifact(request: pytest.FixtureRequest, workload: Any, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    scheme = request.param
    options = {"rows": 16, "smooth": "none"} if scheme == "int8" else {}
    plan = ep.quantize(workload, scheme, **options) if scheme != "fp32" else QuantizationPlan("fp32")
    return backend.write(workload, plan, tmp_path_factory.mktemp(scheme) / "artifact")


@pytest.fixture
def copied(artifact: Artifact, tmp_path: Path) -> Path:
    shutil.copytree(artifact.folder, tmp_path / "copy")
    return tmp_path / "copy"


def _resealed(folder: Path) -> Artifact:
    seal(folder, open_artifact_loosely(folder), {})
    return open_artifact(folder)


def open_artifact_loosely(folder: Path) -> Any:
    from edgepress.export.artifact import Manifest

    return Manifest.model_validate(json.loads((folder / "manifest.json").read_text()))


def test_it_is_verified_without_pytorch(artifact: Artifact) -> None:
    done = _verified(artifact.folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["cases"] == reference.CASES
    assert found["files"] == len(artifact.manifest.files)
    assert found["cosine"] > 0.9999
    assert (artifact.folder / reference.FILE).stat().st_size < 100_000


def test_another_weight_is_noticed_though_every_checksum_is_right(copied: Path) -> None:
    graph = onnx.load(copied / "model.onnx")
    for weight in graph.graph.initializer:
        array = numpy_helper.to_array(weight)
        if array.ndim == 2 and "embeddings" not in weight.name:
            weight.CopyFrom(numpy_helper.from_array((array / 2).astype(array.dtype), weight.name))
    onnx.save(graph, copied / "model.onnx")
    with pytest.raises(InputError, match="is damaged"):
        open_artifact(copied)
    with pytest.raises(ParityError, match="does not compute here what it computed where it was proven"):
        reference.verify(_resealed(copied))
    done = _verified(copied)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_without_references_only_the_files_are_checked(copied: Path) -> None:
    (copied / reference.FILE).unlink()
    assert reference.verify(_resealed(copied)) == reference.Verified(0)


def test_references_that_are_no_references(copied: Path) -> None:
    path = copied / reference.FILE
    whole = path.read_bytes()
    for spoilt in (b"", whole[: len(whole) // 2], b"PK not a zip"):
        path.write_bytes(spoilt)
        with pytest.raises(InputError, match="cannot be read"):
            reference.verify(_resealed(copied))
    np.savez(path, **{"0.input.input_ids": np.array([{}], dtype=object)})
    with pytest.raises(InputError, match="cannot be read"):
        reference.verify(_resealed(copied))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("0.input.input_ids.npy", bytes(reference.MOST_UNPACKED + 1))
    with pytest.raises(InputError, match="far more than references do"):
        reference.verify(_resealed(copied))


def test_references_of_another_model(copied: Path) -> None:
    path = copied / reference.FILE
    with np.load(path) as stored:
        whole = dict(stored)
    wrong: list[dict[str, Any]] = [
        {name: array for name, array in whole.items() if ".input." not in name},
        {**whole, "0.input.input_ids": whole["0.input.input_ids"].astype(np.float32)},
        {**whole, "0.input.surprise": whole["0.input.input_ids"]},
    ]
    for arrays in wrong:
        np.savez(path, **arrays)
        with pytest.raises(InputError, match="holds inputs that are not those of"):
            reference.verify(_resealed(copied))
    np.savez(path, **{**whole, "0.values.0": whole["0.values.0"] * np.nan})
    with pytest.raises(InputError, match="not numbers"):
        reference.verify(_resealed(copied))
    np.savez(path, **{**whole, "0.input.input_ids": whole["0.input.input_ids"] + (1 << 40)})
    with pytest.raises(ParityError, match="does not run here"):
        reference.verify(_resealed(copied))


def test_a_reference_that_claims_to_be_enormous(copied: Path) -> None:
    header = io.BytesIO()
    claim = {"descr": "<f4", "fortran_order": False, "shape": (1 << 44,)}
    np.lib.format.write_array_header_1_0(header, claim)  # type: ignore[no-untyped-call]
    with zipfile.ZipFile(copied / reference.FILE, "w") as packed:
        packed.writestr("0.input.input_ids.npy", header.getvalue())
    with pytest.raises(InputError, match="cannot be read"):
        reference.verify(_resealed(copied))


def test_one_runtime_alone_is_enough() -> None:
    done = _run("import edgepress.export.reference", blocked=("torch", "onnx", "onnxruntime"))
    assert done.returncode == 0, done.stderr
    assert generate.PAST == session.PAST


def test_long_answers_are_kept_in_part() -> None:
    big = np.arange(3 * 7 * 50_000, dtype=np.float32).reshape(3, 7, -1)
    recorder = reference.Recorder(lambda _: [big])
    for rows in (1, 2, 3, 4):
        recorder.run({"input_ids": np.ones((rows, 5), np.int64)})
    recorder.run({"pixel_values": np.ones((9, 3, 224, 224), np.float32)})
    kept = recorder._arrays
    assert sum(name.endswith("input_ids") for name in kept) == reference.CASES
    assert "pixel_values" not in str(list(kept))
    assert len(kept["0.values.0"]) <= reference.VALUES
    assert kept["0.values.0"][-1] > 0.99 * big.max()


def test_the_serving_example_gives_the_module_s_answers(artifact: Artifact, workload: Any, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "serving.md").read_text(encoding="utf-8"), flags=re.S)
    texts = ["a wonderful film", "dull, and far too long; nobody should sit through it"]
    done = _run(code, artifact.folder, *texts, blocked=("torch", "transformers", "edgepress", "onnx"))
    assert done.returncode == 0, done.stderr
    told = [line.split("\t") for line in done.stdout.splitlines()]
    assert [text for _, _, text in told] == texts
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(artifact.folder)
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        wanted = workload.forward(inputs).softmax(dim=-1)
    tolerance = 0.05 if artifact.precision == "int8" else 1e-3
    for (label, share, _), row in zip(told, wanted, strict=True):
        assert float(share) == pytest.approx(float(row[artifact.manifest.labels.index(label)]), abs=tolerance)
