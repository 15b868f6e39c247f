"""Pruning beyond units, on the command line: factored layers, merged tokens, zeros that keep shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from edgepress.models.inspect import inspect


def test_factored_and_thinned(here: Any, model_folder: Path, reviews_csv: Path, tmp_path: Path) -> None:
    rows = ("--data", reviews_csv, "--columns", "text=review,label=stars")
    asked = ("--low-rank", "0.6", "--sparsity", "2:4", "--json")
    done = here("prune", model_folder, *rows, *asked, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["plan"] == {}
    assert document["ranks"]
    assert document["macs_after"] < 0.75 * document["macs_before"]
    assert all(
        share == pytest.approx(0.5, abs=0.01) or name.endswith("up") for name, share in document["zeros"].items()
    )
    again = here("export", tmp_path / "out", *rows, "-o", tmp_path / "fp32", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["quality"]["value"] == pytest.approx(document["quality"]["value"], abs=0.5)


def test_merged(here: Any, tmp_path: Path) -> None:
    done = here("prune", "zoo:vit-fashion", "--merge-tokens", "1", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "1 tokens a block" in done.stdout
    meta = json.loads((tmp_path / "out" / "edgepress.json").read_text())
    assert set(meta["merged_tokens"]) == {1}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--sparsity", "4:2"), "sparsity"),
        (("--low-rank", "1.5"), "above 0 and below 1"),
        (("--merge-tokens", "2", "--uniform"), "No configuration can say"),
        (("--sparsity", "0.5", "--recover", "distill"), "give one of them"),
        (("--merge-tokens", "2"), "ViT, DeiT and DINOv2 only"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(
    here: Any, model_folder: Path, reviews_csv: Path, tmp_path: Path, asked: tuple[str, ...], message: str
) -> None:
    rows = ("--data", reviews_csv, "--columns", "text=review,label=stars")
    done = here("prune", model_folder, *rows, *asked, "-o", tmp_path / "out")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.strip().count("\n") < 3
    assert not (tmp_path / "out").exists()


def test_inspect_sees_them(workload: Any) -> None:
    from edgepress.compress.prune.low_rank import factorise

    small = factorise(workload, {f"bert.encoder.layer.{i}.attention.output.dense": 6 for i in range(3)}, rows=32)
    found = inspect(small, rows=32)
    assert found["macs"] == small.macs
    assert {row["hidden_size"] for row in found["blocks"]} == {64}
