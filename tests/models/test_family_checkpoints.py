"""Every family: saved, reloaded in a fresh process, trained a step, saved, pruned again, reloaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from edgepress.compress.prune.allocate import uniform
from edgepress.errors import UsageError
from edgepress.models import checkpoint, surgery
from edgepress.models.data import Data
from edgepress.plan import PruningPlan

Saved = dict[str, tuple[Any, Path]]

FRESH = """
import sys
from pathlib import Path
import torch
from edgepress.models import checkpoint
from edgepress.models.data import Data

for folder in map(Path, sys.argv[1:]):
    workload = checkpoint.read(folder, Data.empty())
    inputs = torch.load(folder.with_suffix(".inputs"), weights_only=True)
    with torch.inference_mode():
        torch.save(workload.forward(inputs), folder.with_suffix(".outputs"))
"""
PLAIN = """
import json
import sys

import torch
import transformers

assert "edgepress" not in sys.modules
for folder in sys.argv[1:]:
    architecture = json.load(open(folder + "/config.json"))["architectures"][0]
    model, info = getattr(transformers, architecture).from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    with torch.inference_mode():
        outputs = model.eval()(**torch.load(folder + ".inputs", weights_only=True))
    torch.save(outputs["logits" if "logits" in outputs else "logits_per_image"], folder + ".outputs")
assert "edgepress" not in sys.modules
"""


def _uneven(model: Any, layers: slice) -> PruningPlan:
    """Another number of units in every layer, and one whole block where there are three."""
    units = []
    for site in model.structure.sites[layers]:
        if site.kind not in {"block", "kv"}:
            units += site.units[: min(1 + site.layer % 2, site.count - 1)]
    for stack in model.structure.stacks:
        if stack.count > 2 and not stack.shared:
            units.append(model.structure.site("block", stack.start).units[0])
    return PruningPlan.of(units)


def _train_one_step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.module.parameters(), lr=1e-3)
    loss = model.forward(model.example).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, small_model: Any, model_names: list[str]) -> Saved:
    """Every model pruned, saved, read, trained, saved, read, pruned again and saved: the workload and its folder."""
    root = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for number, name in enumerate(model_names):
        model = surgery.prune(small_model(name), _uneven(small_model(name), slice(None)))
        model = checkpoint.read(checkpoint.save(model, root / f"{number}-first"), Data.empty())
        _train_one_step(model)
        model = checkpoint.read(checkpoint.save(model, root / f"{number}-second"), Data.empty())
        model = surgery.prune(model, _uneven(model, slice(0, 2)))
        folder = checkpoint.save(model, root / f"{number}-third")
        torch.save(dict(model.example), folder.with_suffix(".inputs"))
        found[name] = (model, folder)
    return found


def _run(script: str, folders: list[Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_fresh_process_gives_the_same_bits(saved: Saved) -> None:
    _run(FRESH, [folder for _, folder in saved.values()])
    for name, (model, folder) in saved.items():
        with torch.inference_mode():
            ours = model.forward(model.example)
        assert torch.equal(ours, torch.load(folder.with_suffix(".outputs"), weights_only=True)), name


def test_the_folder_holds_no_pickle(saved: Saved) -> None:
    for _, folder in saved.values():
        assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors"}


def test_tied_weights_stay_one(saved: Saved) -> None:
    for name, output, embedding in (
        ("gpt2", "lm_head", "transformer.wte"),
        ("llama", "lm_head", "model.embed_tokens"),
        ("bart", "lm_head", "model.shared"),
    ):
        module = checkpoint.read(saved[name][1], Data.empty()).module
        assert module.get_submodule(output).weight is module.get_submodule(embedding).weight, name


UNIFORM = {
    "bert": {"ffn": 0.5, "block": 0.5},
    "distilbert": {"ffn": 0.5, "block": 0.5},
    "vit": {"head": 0.5, "ffn": 0.5, "block": 0.5},
    "deberta-v2": {"ffn": 0.5},
    "clip": {"ffn": 0.5},
    "dinov2": {"ffn": 0.5, "head": 0.5},
    "gpt2": {"ffn": 0.5, "block": 0.34},
    "llama": {"kv": 0.34, "ffn": 0.5, "block": 0.5},
    "qwen2": {"ffn": 0.5, "block": 0.5},
    "qwen3": {"kv": 0.34, "ffn": 0.5},
    "gemma": {"kv": 0.34, "ffn": 0.5},
    "t5": {"ffn": 0.5, "block": 0.34},
    "bart": {"ffn": 0.5, "block": 0.5},
    "whisper": {"ffn": 0.5, "block": 0.5},
}


def test_uniform_loads_without_edgepress(small_model: Any, tmp_path: Path) -> None:
    pruned, folders = {}, []
    for name, ratio in UNIFORM.items():
        model = small_model(name)
        values = torch.rand(model.structure.num_units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        pruned[name] = surgery.prune(model, uniform(model.structure, values, ratio))
        folders.append(checkpoint.save(pruned[name], tmp_path / name, plain=True))
        torch.save(dict(model.example), f"{folders[-1]}.inputs")
    _run(PLAIN, folders)
    for (name, model), folder in zip(pruned.items(), folders, strict=True):
        assert model.params < small_model(name).params
        theirs = torch.load(f"{folder}.outputs", weights_only=True)
        with torch.inference_mode():
            ours = model.forward(model.example)
        assert (ours - theirs).abs().max() < 1e-5, name  # some constants are float32 in one and float64 in the other
        again = checkpoint.read(folder, Data.empty())
        with torch.inference_mode():
            # the library computes some norms in float32, the small models in conftest.py in float64
            assert (again.forward(model.example) - ours).abs().max() < 1e-5, name


def test_what_no_configuration_can_say_is_refused(small_model: Any, tmp_path: Path) -> None:
    for name, plan, message in (
        ("bert", "head", "head counts"),
        ("swin", "ffn", "ffn counts"),
        ("llama", "uneven", "differ"),
    ):
        model = small_model(name)
        units = (
            model.structure.sites[0].units[:2]
            if plan == "uneven"
            else [unit for site in model.structure.of_kind(plan) for unit in site.units[: site.count // 2]]
        )
        pruned = surgery.prune(model, PruningPlan.of(units))
        with pytest.raises(UsageError, match=message):
            checkpoint.save(pruned, tmp_path / name, plain=True)
        assert not (tmp_path / name).exists()
