"""Every entry of the zoo: it is listed, it is as good as it says, it comes back bit for bit, and it can be cut.

Those that need minutes are slow; the first time on a machine they are also downloaded, and some are fitted.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from edgepress.errors import UnavailableError
from edgepress.models import checkpoint, metrics, surgery, workload, zoo
from edgepress.models.structure import Structure
from edgepress.models.zoo.entry import WEIGHTS, Entry
from edgepress.plan import PruningPlan, Unit

RECIPES = Path(__file__).parents[3] / "models" / "zoo" / "recipes"  # not shipped, so not beside the weights everywhere
QUICK = ("llama-stdlib", "vit-fashion", "cnn-mnist")
SHARE = 0.3
"""Of the units of a site that the random plan removes."""


@pytest.fixture(
    scope="module",
    params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in zoo.ZOO],
)
def loaded(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield zoo.load(request.param)


def _entry(loaded: Any) -> Entry:
    entry: Entry = zoo.get(loaded.name).ENTRY
    return entry


def test_every_entry_is_listed() -> None:
    folder = Path(zoo.__file__).parent
    declared = {path.stem for path in folder.glob("*.py") if re.search(r"^ENTRY = ", path.read_text(), re.MULTILINE)}
    assert declared == {name.replace("-", "_") for name in zoo.ZOO}
    assert [row["name"] for row in zoo.listing()] == list(zoo.ZOO)
    assert all(zoo.get(name).ENTRY.name == name for name in zoo.ZOO)


def test_the_listing_says_everything_and_downloads_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, edgepress: Any
) -> None:
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))
    done = edgepress("zoo", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["zoo"]
    assert rows == json.loads(json.dumps(zoo.listing()))
    assert all(row[field] for row in rows for field in ("what", "task", "params", "origin", "licence"))
    assert all(row["quality"]["low"] < row["quality"]["value"] < row["quality"]["high"] for row in rows)
    assert not (tmp_path / "cache").exists()
    table = edgepress("zoo")
    assert all(f"zoo:{name}" in table.stdout for name in zoo.ZOO)


def test_committed_weights_have_a_log_and_are_small() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    trained = {path.parent for path in files if path.name == "model.safetensors"}
    assert {folder.name for folder in trained} <= set(zoo.ZOO)
    for folder in trained:
        log = json.loads((folder / "log.json").read_text())
        recipe = RECIPES / f"{folder.name.replace('-', '_')}.py"
        assert recipe.is_file()
        assert {"recipe", "rows", "versions"} <= set(log)
        steps = log.get("epochs") or log["steps"]
        assert steps[-1]["cpu_seconds"] <= 600
        assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.mark.timeout(1800)  # the first time on a machine a head may have to be fitted
def test_it_is_what_it_says(loaded: Any) -> None:
    entry = _entry(loaded)
    data = loaded.data
    data.check_disjoint()
    assert (loaded.params, loaded.source, loaded.task.name) == (entry.params, f"zoo:{entry.name}", entry.task)
    assert (data.metric, len(data.evaluation)) == (entry.quality.metric, entry.quality.n)
    assert len(data.calibration)
    assert len(data.train)
    batch = next(data.train.batches(2))
    losses = loaded.losses(batch)
    assert losses.shape == (len(batch.rows),)
    assert bool(torch.isfinite(losses).all())


@pytest.mark.timeout(1800)
def test_it_is_as_good_as_it_says(loaded: Any) -> None:
    declared, measured = _entry(loaded).quality, metrics.of_module(loaded)
    assert declared.low <= measured.value <= declared.high
    assert measured.low <= declared.value <= measured.high


def test_it_comes_back_bit_for_bit(loaded: Any) -> None:
    again = zoo.load(loaded.name)
    assert again.fingerprint() == loaded.fingerprint()
    with torch.no_grad():
        assert torch.equal(again.forward(again.example), loaded.forward(loaded.example))


def _random_plan(structure: Structure) -> PruningPlan:
    """A share of the units of every site, at least one staying, and a block of every stack of several."""
    random = np.random.default_rng(0)
    units: list[Unit] = []
    for site in structure.sites:
        if site.kind != "block":
            chosen = random.permutation(site.count)[: int(site.count * SHARE)]
            units += [site.units[i] for i in chosen]
    for stack in structure.stacks:
        if stack.count > 1 and structure.find("block", stack.layers[0]) is not None:
            units.append(Unit("block", int(random.choice(list(stack.layers))), 0))
    return PruningPlan.of(units)


def test_a_pruned_one_is_saved_and_comes_back(loaded: Any, tmp_path: Path) -> None:
    pruned = surgery.prune(loaded, _random_plan(loaded.structure))
    assert pruned.params < loaded.params
    folder = checkpoint.save(pruned, tmp_path / "pruned")
    name = f"{loaded.skeleton.architecture}@{folder}" if loaded.skeleton.is_function else str(folder)
    again = workload.load(name)
    ours, theirs = pruned.module.state_dict(), again.module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert (again.plan, again.structure) == (pruned.plan, pruned.structure)
    assert again.data.evaluation.fingerprint == loaded.data.evaluation.fingerprint
    with torch.no_grad():
        assert torch.equal(pruned.forward(pruned.example), again.forward(again.example))


def _double(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


def _norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = self.weight * x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.variance_epsilon)
    return result


def test_masked_is_removed(loaded: Any) -> None:
    """With the trained weights, in float64, on real rows."""
    module = copy.deepcopy(loaded.module).double()
    for child in module.modules():
        if type(child).__name__ == "LlamaRMSNorm":  # the library computes it in float32
            child.forward = MethodType(_norm, child)
    exact = replace(loaded, module=module, example=_double(loaded.example))
    inputs = _double(next(loaded.data.evaluation.batches(2)).inputs)
    plan = _random_plan(exact.structure)
    with torch.no_grad():
        whole = exact.forward(inputs)
        with surgery.masked(module, exact.structure, plan):
            masked = exact.forward(inputs)
        removed = surgery.prune(exact, plan).forward(inputs)
    torch.testing.assert_close(masked, removed, rtol=0, atol=1e-9)
    assert (whole - removed).abs().max() > 1e-3


def test_without_gguf_it_is_said_which_extra_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)  # what an import finds where it is not installed
    with pytest.raises(UnavailableError, match=r"comes as a GGUF file: install edgepress\[gguf\]"):
        zoo.load("smollm2-135m")
    assert not any(tmp_path.iterdir())
