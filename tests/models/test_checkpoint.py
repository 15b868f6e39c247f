"""A pruned model comes back bit for bit, in another process, without pickle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from edgepress.errors import InputError
from edgepress.models import checkpoint, surgery
from edgepress.plan import PruningPlan, Unit
from safetensors.torch import load_file, save_file

PLAN = PruningPlan.of(
    [Unit("head", 0, 0), Unit("head", 0, 3), Unit("ffn", 0, 7), Unit("block", 1, 0)]
    + [Unit("ffn", 2, i) for i in range(100)]
)
FRESH = """
import sys, torch
import edgepress as ep
w = ep.load(sys.argv[1], sys.argv[2], columns={"text": "review", "label": "stars"})
inputs = dict(next(w.data.calibration.batches(8)).inputs)
with torch.inference_mode():
    torch.save({"logits": w.forward(inputs), **inputs}, sys.argv[3])
"""


@pytest.fixture
def saved(workload: Any, tmp_path: Path) -> Path:
    return checkpoint.save(surgery.prune(workload, PLAN), tmp_path / "checkpoint")


def test_a_fresh_process_gives_the_same_bits(workload: Any, saved: Path, reviews_csv: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    subprocess.run([sys.executable, "-c", FRESH, saved, reviews_csv, out], check=True)
    seen = torch.load(out, weights_only=True)
    logits = seen.pop("logits")
    with torch.inference_mode():
        assert torch.equal(surgery.prune(workload, PLAN).forward(seen), logits)


def test_it_holds_no_pickle(saved: Path) -> None:
    assert {path.suffix for path in saved.iterdir()} <= {".json", ".safetensors", ".txt"}


def test_prune_again_after_reload(workload: Any, saved: Path, tmp_path: Path) -> None:
    again = surgery.prune(checkpoint.read(saved, workload.data), PruningPlan.of([Unit("head", 1, 0)]))
    back = checkpoint.read(checkpoint.save(again, tmp_path / "second"), workload.data)
    assert [site.count for site in back.structure.of_kind("head")] == [2, 3]
    assert all(torch.equal(a, b) for a, b in zip(again.module.parameters(), back.module.parameters(), strict=True))


def test_it_can_be_trained_on(workload: Any, saved: Path) -> None:
    model = checkpoint.read(saved, workload.data)
    batch = next(model.data.calibration.batches(8))
    loss = torch.nn.functional.cross_entropy(model.forward(batch.inputs), batch.labels)
    loss.backward()
    assert all(p.grad is not None for name, p in model.module.named_parameters() if "encoder.layer" in name)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def _poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def _other_plan(folder: Path) -> None:
    meta = json.loads((folder / "edgepress.json").read_text())
    (folder / "edgepress.json").write_text(json.dumps({**meta, "plan": {}}))


def _other_class(folder: Path) -> None:
    meta = json.loads((folder / "edgepress.json").read_text())
    (folder / "edgepress.json").write_text(json.dumps({**meta, "architecture": "os.system"}))


def _bad_tie(folder: Path) -> None:
    meta = json.loads((folder / "edgepress.json").read_text())
    (folder / "edgepress.json").write_text(
        json.dumps({**meta, "tied": {"bert.pooler.dense.bias": ["classifier.bias"]}})
    )


def _foreign_tie(folder: Path) -> None:
    meta = json.loads((folder / "edgepress.json").read_text())
    (folder / "edgepress.json").write_text(json.dumps({**meta, "tied": {"forward": "classifier.bias"}}))


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _not_json(folder: Path) -> None:
    (folder / "edgepress.json").write_text("{")


def _with(file: str, **fields: Any) -> Any:
    def damage(folder: Path) -> None:
        found = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**found, **fields}))

    return damage


NO_MODEL = "config.json does not describe a bert model: "


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "safetensors"),
        (_poison, "NaN or infinite"),
        (_other_plan, "has no tensor|the plan asks"),
        (_other_class, "not supported"),
        (_bad_tie, "cannot be the same parameter"),
        (_foreign_tie, "cannot be the same parameter"),
        (_no_config, "config.json cannot be read"),
        (_not_json, "not valid JSON"),
        (_with("config.json", num_attention_heads=7), f"{NO_MODEL}.*not a multiple"),
        (_with("config.json", num_attention_heads=0), f"{NO_MODEL}ZeroDivisionError"),
        (_with("config.json", chunk_size_feed_forward=5), f"{NO_MODEL}.*multiple of the chunk size"),
        (_with("config.json", num_hidden_layers="two"), f"{NO_MODEL}.*num_hidden_layers"),
        (_with("config.json", hidden_act="nope"), f"{NO_MODEL}KeyError: 'nope'"),
        (_with("config.json", max_position_embeddings=-3), f"{NO_MODEL}.*negative dimension"),
        (_with("config.json", vocab_size=2), NO_MODEL),
        (_with("edgepress.json", max_length=-1), "edgepress.json is damaged: -1 is not a number of tokens"),
        (_with("edgepress.json", max_length=1 << 40), "not one of the 128 positions"),
    ],
)
def test_damage_is_one_sentence(workload: Any, saved: Path, tmp_path: Path, damage: Any, message: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    damage(folder)
    with pytest.raises((InputError, Exception), match=message) as caught:
        checkpoint.read(folder, workload.data)
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]
    assert "\n" not in str(caught.value)
