"""On an NVIDIA GPU: scoring, reconstruction and recovery give there what they give on a CPU, and the bench measures.

``EDGEPRESS_DEVICE=cpu pytest -m gpu`` runs the same lines on the CPU, to find what is wrong before a GPU does.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import pytest
import torch
from edgepress.benchmarks import targets
from edgepress.compress.prune.reconstruct import reconstruct
from edgepress.compress.score import METHODS
from edgepress.errors import UnavailableError
from edgepress.models import checkpoint, metrics
from edgepress.plan import QuantizationPlan

DEVICE = os.environ.get("EDGEPRESS_DEVICE", "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
]


@contextmanager
def exact() -> Iterator[None]:
    """Products in float32, and not in TF32, which rounds their inputs to ten bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def there(workload: Any) -> Any:
    """A copy of ``workload`` whose module is on the device."""
    return replace(workload, module=copy.deepcopy(workload.module).to(DEVICE))


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_the_cpu(workload: Any, method: str) -> None:
    with exact():
        ours, theirs = (ep.score(one, method, rows=32).values for one in (there(workload), workload))
    assert ours.device.type == "cpu"
    assert float((ours - theirs).abs().max()) < 1e-2 * float(theirs.abs().max())


def test_a_model_on_the_device_is_cut_and_solved_as_on_the_cpu(workload: Any) -> None:
    scores = ep.score(workload, "masked_taylor", rows=64)
    with exact():
        ours, theirs = (reconstruct(one, ep.prune(one, scores, ratio=0.5)) for one in (there(workload), workload))
        (batch,) = workload.data.calibration.take(32).batches(32)
        with torch.no_grad():
            found, wanted = ours.forward(batch.inputs), theirs.forward(batch.inputs)
    assert found.device.type == DEVICE
    assert ours.plan == theirs.plan
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-2 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_recovery_falls_and_its_checkpoint_answers_alike_on_the_cpu(
    workload: Any, tmp_path: Path, precision: Any
) -> None:
    pruned = ep.prune(workload, ep.score(workload, "random"), ratio=0.6)
    found = ep.recover(pruned, workload, steps=60, batch=16, lr=1e-3, precision=precision)
    losses = [entry["loss"] for entry in found.trace]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])

    assert {parameter.dtype for parameter in found.workload.module.parameters()} == {torch.float32}
    again = checkpoint.read(checkpoint.save(found.workload, tmp_path / "kept"), workload.data)
    (batch,) = workload.data.evaluation.take(32).batches(32)
    with torch.no_grad(), exact():
        onboard = there(found.workload).forward(batch.inputs).cpu()
        assert torch.equal(again.forward(batch.inputs), found.workload.forward(batch.inputs))
        torch.testing.assert_close(again.forward(batch.inputs), onboard, atol=1e-3 * float(onboard.abs().max()), rtol=0)


def test_recovery_by_default_trains_in_bfloat16_where_the_gpu_has_it(workload: Any) -> None:
    pruned = ep.prune(workload, ep.score(workload, "random"), ratio=0.6)
    kwargs: dict[str, Any] = {"steps": 5, "batch": 16}
    traces = {
        precision: [entry["loss"] for entry in ep.recover(pruned, workload, precision=precision, **kwargs).trace]
        for precision in ("auto", "bf16", "fp32")
    }
    able = DEVICE == "cuda" and torch.cuda.is_bf16_supported()
    assert traces["auto"] == pytest.approx(traces["bf16" if able else "fp32"], rel=1e-3)
    assert traces["bf16"] != pytest.approx(traces["fp32"], rel=1e-6)


def test_quality_on_the_device_is_that_of_the_cpu(workload: Any) -> None:
    with exact():
        ours, theirs = (metrics.of_module(one) for one in (there(workload), workload))
    assert ours.value == pytest.approx(theirs.value, abs=100 / theirs.n)  # a row on the boundary may fall either way


# ---- targets of the bench

WORDS = ("cuda", "cuda:tensorrt", "torch:cuda", "torch:cuda:graph", "torch:cuda:compile", "torch:cuda:fp16")


@pytest.mark.parametrize("word", WORDS if DEVICE == "cuda" else ("cpu:1", "torch:1", "torch:bf16:1"))
def test_the_bench_runs_and_judges_on_the_gpu(
    here: Any, workload: Any, model_folder: Path, reviews_csv: Path, tmp_path: Path, word: str
) -> None:
    """A model and its artifact side by side; the artifact is held there to what it answered on the CPU."""
    lacks = _lacking("onnx", "tensorrt" if word == "cuda:tensorrt" else "")
    if lacks:
        pytest.skip(lacks)
    ep.export(workload, tmp_path / "fp32")
    data = ("--data", reviews_csv, "--columns", "text=review,label=stars")
    options = ("--target", word, "--seq", 16, "--queries", 50, "--json")
    done = here("bench", model_folder, tmp_path / "fp32", *options, *data)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    original, exported = document["rows"]
    assert original["runtime"].startswith("torch cuda" if DEVICE == "cuda" else "torch")
    assert exported["runtime"].startswith("onnx cuda" if DEVICE == "cuda" else "onnx")
    assert exported["speedup"]["value"] > 0
    assert abs(exported["quality"]["drop"]) <= 3 * 100 / exported["quality"]["n"]  # rows on the boundary
    assert DEVICE == "cpu" or document["environment"]["gpu"]["name"]


@pytest.mark.skipif(DEVICE == "cpu", reason="engines run on GPUs alone")
@pytest.mark.parametrize("scheme", ["fp32", "fp16"])
def test_the_bench_runs_engines(here: Any, workload: Any, tmp_path: Path, scheme: str) -> None:
    from edgepress.export.backends import tensorrt

    if lacks := _lacking("tensorrt"):
        pytest.skip(lacks)
    plan = QuantizationPlan("fp32") if scheme == "fp32" else ep.quantize(workload, scheme)
    engine = tensorrt.write(workload, plan, tmp_path / "engine")
    try:
        with tensorrt.open_session(engine):
            pass
    except UnavailableError as error:
        pytest.skip(str(error))  # TensorRT-RTX does not know every GPU
    done = here("bench", engine.folder, "--target", "tensorrt", "--seq", 16, "--queries", 50, "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["runtime"], row["target"], row["precision"]) == ("tensorrt", "tensorrt", scheme)
    assert row["latency_ms"]["n"] == 50


def _lacking(runtime: str, form: str = "") -> str:
    lacks = targets.missing.here(runtime, DEVICE, form)
    return targets.missing.sentence(lacks) if lacks else ""
