"""The main job on a user's own model and rows; killed anywhere, it goes on to the same end."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import edgepress as ep
import pytest
from edgepress.errors import UsageError
from edgepress.export.artifact import open_artifact
from edgepress.recipe import SCHEMES

pytestmark = pytest.mark.chain


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _files(run: Path) -> dict[tuple[str, str], str]:
    """The digest of every model that a stage of ``run`` wrote, by stage and file name."""
    models = [*run.glob("stages/*/*/model.onnx"), *run.glob("stages/*/*/model.safetensors")]
    return {(path.parts[-3], path.name): _digest(path) for path in models}


def test_the_run_folder_holds_everything(finished_run: Path, workload: Any) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    artifact = open_artifact(finished_run / "artifact")
    assert summary["chosen"] == artifact.name
    assert artifact.manifest.params < workload.params
    for name in (
        "recipe.yaml",
        "measurements.jsonl",
        "report.html",
        "report.md",
        f"{summary['checkpoint']}/edgepress.json",
    ):
        assert (finished_run / name).is_file(), name
    assert summary["original"]["quality"]["drop"] is None
    assert [row["name"] for row in summary["results"]][-1] == "pruned 1 int8-dynamic" or summary["refused"]
    assert not list(finished_run.rglob(".*"))


def test_a_rerun_uses_every_stage_again(
    edgepress: Any, finished_run: Path, model_folder: Path, reviews_csv: Path, small_recipe: Path
) -> None:
    before = _digest(finished_run / "artifact/model.onnx")
    done = edgepress("compress", "--resume", "-o", finished_run, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document) == {"original", "results", "chosen", "refused"}
    assert set(document["original"]) >= {
        *("name", "artifact", "target", "precision", "params", "macs", "size_bytes", "load_ms", "peak_rss_bytes"),
        *("latency_ms", "speedup", "quality"),
    }
    assert all(stage["reused"] for stage in json.loads((finished_run / "summary.json").read_text())["stages"])
    assert _digest(finished_run / "artifact/model.onnx") == before


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "stage",
    ["recover-1", "measure", *(pytest.param(s, marks=SLOW) for s in ("baseline", "prune-1", "export-1", "quantize-1"))],
)
def test_killed_and_resumed(
    finished_run: Path,
    edgepress: Any,
    model_folder: Path,
    reviews_csv: Path,
    small_recipe: Path,
    tmp_path: Path,
    stage: str,
) -> None:
    out = tmp_path / "run"
    args = [model_folder, "--data", reviews_csv, "--columns", "text=review,label=stars", "--recipe", small_recipe]
    command = [sys.executable, "-m", "edgepress", "compress", *map(str, args), "-o", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 240
    while not list((out / "stages").glob(f".*-{stage}-*")):  # the stage is being written
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "summary.json").exists()
    assert not list((out / "stages").glob(f"[0-9]*-{stage}-*"))
    done = edgepress("compress", "--resume", "-o", out)
    assert done.returncode == 0, done.stderr
    ours, theirs = _files(out), _files(finished_run)
    shared = ours.keys() & theirs.keys()  # what the gate refused, which is a matter of measured times, may differ
    assert {name.split("-", 1)[1].rsplit("-", 1)[0] for name, _ in shared} >= {"baseline", "prune-1", "recover-1"}
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}
    assert _digest(out / "artifact/model.onnx") in theirs.values()
    stages = json.loads((out / "summary.json").read_text())["stages"]
    assert any(entry["reused"] for entry in stages) or stage == "baseline"
    assert not list(out.rglob(".*"))


def test_a_constraint_that_cannot_be_met(
    here: Any, model_folder: Path, reviews_csv: Path, small_recipe: Path, tmp_path: Path
) -> None:
    """Without levels or a scheme of the recipe's own, half of the speed wanted is tried first, and both schemes."""
    recipe = tmp_path / "recipe.yaml"
    lines = small_recipe.read_text().splitlines()
    recipe.write_text("\n".join(line for line in lines if not line.startswith(("levels", "quantize"))))
    args = ("--data", reviews_csv, "--columns", "text=review,label=stars", "--recipe", recipe)
    done = here("compress", model_folder, *args, "--speedup", "1000x", "-o", tmp_path / "run")
    assert done.returncode == 3
    assert "at least 1000x was asked" in done.stderr
    assert "Traceback" not in done.stderr
    assert open_artifact(tmp_path / "run/artifact").size_bytes
    assert "level 1: pruned to" in done.stderr
    assert all(f"{scheme} only: " in done.stderr for scheme in SCHEMES["onnx"])
    assert "not met" in (tmp_path / "run/report.md").read_text()


@pytest.mark.parametrize("level", ["ffn: 0.5", pytest.param("speedup: 1.1", marks=SLOW)])
def test_openvino_is_a_target(
    here: Any, model_folder: Path, reviews_csv: Path, finished_run: Path, tmp_path: Path, level: str
) -> None:
    """Its table of latencies, the fit to a speed and every artifact are OpenVINO's own."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "max_length: 64\ntarget: cpu:openvino:1\nlimits: {max_drop: 60}\n"
        f"levels: [{{{level}}}]\nrecover: {{steps: 0}}\nmeasure: {{sequence: 64, min_queries: 100, min_seconds: 1}}\n"
    )
    args = ("--data", reviews_csv, "--columns", "text=review,label=stars", "--recipe", recipe)
    done = here("compress", model_folder, *args, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert all(f"{scheme} only: " in done.stderr for scheme in SCHEMES["openvino"])
    assert ("x measured" in done.stderr) == level.startswith("speedup")
    manifests = list((tmp_path / "run/stages").rglob("manifest.json"))
    assert len(manifests) >= 3
    assert {open_artifact(path.parent).manifest.runtime for path in manifests} == {"openvino"}
    with pytest.raises(UsageError, match="is for onnx; the target 'cpu:openvino:1' is not"):
        ep.benchmark([open_artifact(finished_run / "artifact")], target="cpu:openvino:1")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (("compress", "--recipe", "recipe.yaml"), "The openvino runtime cannot write the scheme 'int8-dynamic'"),
        (("prune", "--speedup", "2x", "--precision", "fp8"), "The openvino runtime cannot write the scheme 'fp8'"),
        (("quantize", "--max-drop", "1%"), "measured in ONNX Runtime, not on 'cpu:openvino'"),
    ],
)
def test_what_openvino_cannot_do_is_said_before_anything_is_loaded(
    here: Any, args: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("quantize: {scheme: int8-dynamic}\n")
    done = here(args[0], "there/is/no/model", *args[1:], "--target", "cpu:openvino")
    assert done.returncode == 2
    assert why in done.stderr


def test_the_gate_refuses_what_costs_too_much(here: Any, model_folder: Path, reviews_csv: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "harsh.yaml"
    recipe.write_text(
        "max_length: 64\nlevels: [{head: 0.75, ffn: 0.9, block: 0.67}]\nrecover: {reconstruct: false, steps: 0}\n"
        "measure: {sequence: 64, min_queries: 100, min_seconds: 1}\n"
    )
    args = ("--data", reviews_csv, "--columns", "text=review,label=stars", "--recipe", recipe, "--json")
    done = here("compress", model_folder, *args, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    refused = json.loads(done.stdout)["refused"]
    assert [entry["stage"] for entry in refused][-1] == "export-1"
    assert "1.00 are allowed" in refused[-1]["reason"]
    assert refused[-1]["drop"] > 1
