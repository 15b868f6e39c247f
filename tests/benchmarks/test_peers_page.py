"""The page beside peers is what the results say, and the harness that makes the results works and goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgepress.benchmarks.peers import environments, page, run
from edgepress.benchmarks.peers.quantization import Kept
from edgepress.benchmarks.peers.tools.job import Job, Made, slug


def test_the_page_is_what_the_results_give() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run python benchmarks/peers/page.py"


def test_every_result_of_peers_is_on_the_page() -> None:
    listed = {section["file"] for section in json.loads((page.RESULTS / "peers.json").read_text())["sections"]}
    assert {path.name for path in page.RESULTS.glob("*-peers-*.json*")} <= listed


def document(speeds: dict[str, tuple[str, str, float, float]]) -> dict[str, Any]:
    """A result of one cell, of tool, runtime, cosine and speedup by name; every interval is 1 % wide at either side."""
    told = [
        {"name": name, "tool": tool, "runtime": runtime, "size_bytes": 1, "cosine": cosine, "drop": 0.0}
        for name, (tool, runtime, cosine, _) in speeds.items()
    ]
    rows = [
        {
            "name": name,
            "threads": 1,
            "batch": 1,
            "sequence": 32,
            "p50": 10 / speed,
            "speedup": {"value": speed, "low": speed * 0.99, "high": speed * 1.01},
        }
        for name, (*_, speed) in speeds.items()
    ]
    machine = {"cpu": "a CPU", "flags": [], "cpus": 1, "load_1min": 0.0, "packages": {}}
    return {"contenders": told, "rows": rows, "environment": machine}


GOAL = {"title": "the goal", "tools": ["onnxruntime"], "runtime": "onnx", "cosine": 0.997, "ratio": 1.3}


@pytest.mark.parametrize(
    ("peer", "cell"),
    [
        (("nncf", "openvino", 0.99, 2.0), "| NNCF | 1.50 |"),
        (("nncf", "openvino", 0.99, 3.02), "| NNCF | 0.99, even |"),
        (("nncf", "openvino", 0.99, 4.0), "| NNCF | **0.75, lost** |"),
        (("nncf", "openvino", 0.999, 1.0), "| NNCF | **lost**: none of ours keeps as much |"),
        (("onnxruntime", "onnx", 0.95, 3.0), "| ONNX Runtime's tools | 1.33 |"),
        (("torchao", "torch", 0.95, 4.5), "| torchao | **0.89, lost** |"),
        (("torchao", "torch", 0.95, 3.5), "| torchao | 1.14 |"),  # beside any runtime of ours
    ],
)
def test_a_lost_cell_is_marked_and_needs_a_reason(
    tmp_path: Path, peer: tuple[str, str, float, float], cell: str
) -> None:
    ours = {
        "edgepress int8": ("edgepress", "onnx", 0.997, 4.0),
        "edgepress int8, OpenVINO": ("edgepress", "openvino", 0.997, 3.0),
    }
    path = tmp_path / "result.json"
    path.write_text(json.dumps(document({**ours, "theirs": peer})), encoding="utf-8")
    if "lost" in cell:
        with pytest.raises(ValueError, match="does not say why"):
            page.quantization(path, {})
    text = "\n".join(page.quantization(path, {"why": {peer[0]: "It is so."}}))
    assert cell in text
    assert ("It is so." in text) == ("lost" in cell)
    assert "**edgepress int8**" in text


def test_a_goal_that_is_missed_is_said(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    speeds = {"ours": ("edgepress", "onnx", 0.998, 4.0), "theirs": ("onnxruntime", "onnx", 0.9, 3.5)}
    path.write_text(json.dumps(document(speeds)), encoding="utf-8")
    with pytest.raises(ValueError, match="the goal"):
        page.quantization(path, {"goals": [GOAL]})
    text = "\n".join(page.quantization(path, {"goals": [GOAL], "why": {"the goal": "Kernels."}}))
    assert "| the goal | *1.14*, short |" in text


def test_a_peer_that_loses_fewer_points_is_marked(tmp_path: Path) -> None:
    def row(contender: str, drop: float, speedup: float = 2.0) -> dict[str, Any]:
        quality = {"all": {"drop": drop, "drop_low": drop - 1, "drop_high": drop + 1}}
        facts = {"contender": contender, "setting": "s", "wanted": 2.0, "seed": 0, "recover": 0, "params": 1}
        speed = {"value": speedup, "low": speedup, "high": speedup}
        return {**facts, "quality": quality, "speedup": speed, "seconds": {"finish": 1.0}}

    machine = {"cpu": "a CPU", "flags": [], "cpus": 1, "load_1min": 0.0, "packages": {}}
    original = {"quality": {"all": {"metric": "accuracy", "value": 80.0, "n": 10}}}
    head = {"study": {"target": "cpu:1"}, "original": original, "environment": machine}
    lines = [head, row("edgepress", 3.0), row("better", 2.0), row("slow", 1.0, 1.5), row("worse", 4.0)]
    path = tmp_path / "study.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    text = "\n".join(page.pruning(path, {"why": {"better": "It is so."}}))
    assert "| better | s | 1 | 2.00 [2.00, 2.00] | **2.00 [1.00, 3.00], lost** |" in text
    assert "(too slow) | 1.00 [0.00, 2.00] |" in text
    assert text.count("lost**") == 1
    with pytest.raises(ValueError, match="loses to better"):
        page.pruning(path, {})


# ---- the harness


def test_a_tool_that_fails_is_a_line_of_the_result(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"rows": 2, "inputs": ["input_ids"]}), encoding="utf-8")
    np.savez(tmp_path / "rows.npz", **{f"{row}/input_ids": np.full((1, 3 + row), row) for row in range(2)})  # type: ignore[arg-type]
    job = Job(tmp_path, tmp_path / "out")
    assert [row["input_ids"].tolist() for row in job.rows(4)] == [[[0, 0, 0, 0]], [[1, 1, 1, 1]]]
    made = Made(job, [], {})

    def write(path: Path) -> None:
        raise RuntimeError("It cannot be.\nAt all.")

    made.make("A tool, static", "onnx", write)
    made.make("A tool, dynamic", "openvino", lambda path: path.write_text("x"))
    assert made.failed == {"A tool, static": "It cannot be."}
    assert [one["model"] for one in made.contenders] == [f"{slug('A tool, dynamic')}/model.xml"]


def test_a_figure_is_measured_once(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "kept")
    assert kept.get("time 1 1x32", lambda: {"p50": 2.0}) == {"p50": 2.0}
    assert Kept(tmp_path / "kept").get("time 1 1x32", lambda: pytest.fail("measured again")) == {"p50": 2.0}


def test_every_peer_has_its_tool() -> None:
    tools = {path.stem for path in (Path(run.__file__).parent / "tools").glob("*.py")} - {"job"}
    assert set(environments.PEERS) == tools


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_comparison_runs_and_goes_on(tmp_path: Path) -> None:
    """With one peer, in environments made for it; the second time there is nothing left to do."""
    out = tmp_path / "result.json"
    command = [sys.executable, run.__file__, "quantization", "--quick", "--model", "zoo:vit-fashion", "--shapes", "1"]
    command += ["--threads", "1", "--peers", "onnxruntime", "--cache", str(tmp_path / "cache"), "-o", str(out)]
    subprocess.run(command, check=True, timeout=1500)
    found = json.loads(out.read_text(encoding="utf-8"))
    names = {one["name"] for one in found["contenders"]}
    assert {"float", "edgepress int8", "edgepress int8, OpenVINO", "ORT dynamic, traced, per channel"} <= names
    assert {row["name"] for row in found["rows"]} == names
    assert found["environments"]["onnxruntime"]["onnxruntime"] == found["environments"]["edgepress"]["onnxruntime"]
    out.unlink()
    again = subprocess.run(command, check=True, timeout=300, stderr=subprocess.PIPE, text=True)
    assert "installing" not in again.stderr
    assert "makes its files" not in again.stderr
    assert json.loads(out.read_text(encoding="utf-8")) == found
