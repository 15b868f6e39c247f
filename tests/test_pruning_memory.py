"""Pruning a model takes a bounded multiple of the memory that the model takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).parent.parent / "benchmarks/studies/pruning_memory.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_stage_takes_more_than_two_and_a_half_times_the_model(tmp_path: Path) -> None:
    subprocess.run([sys.executable, STUDY, "-o", tmp_path / "memory.json"], check=True)
    stages = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))["stages"]
    assert set(stages) == {"score", "losses", "removal", "reconstruct"}
    assert max(stage["ratio"] for stage in stages.values()) <= 2.5, stages
