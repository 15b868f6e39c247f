"""The pruning methods that edgepress is compared with do what their papers and packages say."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgepress.benchmarks.peers import depgraph, equal_latency, kwon, pruning, quantization, torch_int8
from edgepress.benchmarks.peers.contenders import CONTENDERS
from edgepress.compress.prune.allocate import by_ratio
from edgepress.compress.prune.budget import counted
from edgepress.models import surgery
from edgepress.models.data import Data, Rows
from edgepress.plan import PruningPlan


@pytest.fixture(scope="module")
def bert(workload: Any) -> Any:
    """The trained BERT, with few rows."""
    data = workload.data
    return replace(
        workload, data=replace(data, calibration=data.calibration.take(48), evaluation=data.evaluation.take(60))
    )


@pytest.fixture(scope="module")
def vit() -> Any:
    """A vision transformer of random weights, on random labelled images."""
    from edgepress.models import families, mapping
    from edgepress.models.examples import example
    from edgepress.models.skeleton import Skeleton, model_class
    from edgepress.models.workload import Workload
    from transformers import AutoConfig

    torch.manual_seed(0)
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = AutoConfig.for_model("vit", **options, image_size=16, patch_size=4, num_labels=2)
    module = model_class("ViTForImageClassification", type(config))(config).eval()
    family = families.get("vit")
    inputs = example(module, family.inputs, 1)
    skeleton = Skeleton("ViTForImageClassification", config.to_dict(), ("no", "yes"))
    images = np.random.default_rng(0).normal(size=(40, 3, 16, 16)).astype(np.float32)
    rows = Rows({"pixel_values": images}, np.arange(40) % 2, tuple(bytes([i]) for i in range(40)))
    structure = mapping.structure(module, family, inputs)
    return Workload("vit", module, structure, Data(rows, rows, rows), skeleton, 1, "", "", inputs)


@pytest.fixture(scope="module")
def cnn() -> Any:
    """Two convolutions and two linear layers of random weights, on random labelled images."""
    from edgepress.models import families, mapping
    from edgepress.models.skeleton import Skeleton
    from edgepress.models.workload import Workload
    from torch import nn

    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 12)
    module = nn.Sequential(*layers, nn.ReLU(), nn.Linear(12, 2)).eval()
    images = np.random.default_rng(0).normal(size=(40, 1, 8, 8)).astype(np.float32)
    rows = Rows({"input": images}, np.arange(40) % 2, tuple(bytes([i]) for i in range(40)))
    one = {"input": torch.from_numpy(images[:1])}
    structure = mapping.structure(module, families.get("generic"), one)
    return Workload("cnn", module, structure, Data(rows, rows, rows), Skeleton("n:n", {}, ()), 1, "", "", one)


@dataclass(frozen=True)
class Counting:
    """A bench whose clock counts operations, so that nothing here depends on the machine's mood."""

    original: Any

    def relative_time(self, pruned: Any) -> float:
        return float(pruned.macs / self.original.macs)

    def costs(self, workload: Any) -> Any:
        return counted(workload.structure, "macs", workload.macs)


@pytest.mark.parametrize("model", ["bert", "vit", "cnn"])
@pytest.mark.parametrize("name", CONTENDERS)
def test_every_setting_gives_a_smaller_model_that_works(name: str, model: str, request: pytest.FixtureRequest) -> None:
    workload = request.getfixturevalue(model)
    contender = CONTENDERS[name]
    if contender.heads_needed and not workload.structure.of_kind("head"):
        pytest.skip("the method is for transformers")
    weights = {key: tensor.clone() for key, tensor in workload.module.state_dict().items()}
    prepared = contender.prepare(workload, 0, Counting(workload))  # type: ignore[arg-type]
    for cut in contender.settings.values():
        candidate = cut(workload, prepared, 0.5, 0.5)
        finished = candidate.finish()
        assert finished.params < 0.98 * workload.params
        assert finished.macs < 0.8 * workload.macs
        assert equal_latency.shape_of(finished) == equal_latency.shape_of(candidate.cut)
        answers = finished.forward(next(workload.data.calibration.batches(8)).inputs)
        assert answers.shape == (8, 2)
        assert torch.isfinite(answers).all()
    assert all(torch.equal(weights[key], tensor) for key, tensor in workload.module.state_dict().items())


@pytest.mark.parametrize("spread", depgraph.SPREADS)
@pytest.mark.parametrize(("model", "width"), [("bert", False), ("vit", False), ("vit", True)])
def test_what_torch_pruning_cuts_is_what_the_plan_says(
    model: str, spread: str, width: bool, request: pytest.FixtureRequest
) -> None:
    workload = request.getfixturevalue(model)
    grads = depgraph.gradients(workload, "taylor")
    theirs = depgraph.prune(workload, grads, importance="taylor", spread=spread, heads=0.5, channels=0.4, width=width)
    ours = surgery.prune(workload, theirs.plan)
    assert (
        {site.kind for site in workload.structure.sites}
        >= {unit.kind for unit in theirs.plan.removed}
        >= {"head", "ffn"}
    )
    assert (theirs.structure.hidden_size < workload.structure.hidden_size) == width
    assert ours.params == theirs.params
    with torch.no_grad():
        found, wanted = ours.forward(workload.example), theirs.forward(workload.example)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_the_hessian_is_the_mean_over_rows(bert: Any) -> None:
    few = replace(bert, data=replace(bert.data, calibration=bert.data.calibration.take(3)))
    weight = few.module.classifier.weight
    squares = []
    for batch in few.data.calibration.batches(1):
        few.module.zero_grad()
        few.losses(batch).sum().backward()
        squares.append(weight.grad.square().clone())
    few.module.zero_grad()
    assert torch.allclose(depgraph.gradients(few, "hessian")["classifier.weight"], torch.stack(squares).mean(0))


# ---- Kwon et al.


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_the_best_masks(seed: int, share: float, tiny: Any) -> None:
    """Against all masks that keep a head in each layer and keep to the budget."""
    structure = tiny.structure
    fisher = torch.rand(structure.num_units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    costs = {"head": 3.0, "ffn": 2.0}
    kinds = [unit.kind for unit in structure.units]
    places = [place for place, kind in enumerate(kinds) if kind in costs]
    budget = (1 - share) * sum(costs[kinds[place]] for place in places)
    heads = [range(place.start, place.stop) for site, place in structure.slices() if site.kind == "head"]
    best = 0.0
    for keep in itertools.product([False, True], repeat=len(places)):
        kept = {place for place, stays in zip(places, keep, strict=True) if stays}
        if sum(costs[kinds[place]] for place in kept) <= budget and all(kept & set(layer) for layer in heads):
            best = max(best, float(fisher[sorted(kept)].sum()))
    masks = kwon.search(structure, fisher, costs, budget)
    kept = [place for place in places if masks[place]]
    assert sum(costs[kinds[place]] for place in kept) <= budget
    assert float(fisher[kept].sum()) == pytest.approx(best)
    assert all(masks[place] for place, kind in enumerate(kinds) if kind not in costs)


@pytest.fixture(scope="module")
def tiny() -> Any:
    """Two layers of two heads and three channels: 1,024 masks."""
    from edgepress.models import families, mapping
    from edgepress.models.examples import example
    from edgepress.models.skeleton import Skeleton
    from edgepress.models.workload import Workload
    from transformers import BertConfig, BertForSequenceClassification

    shape = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 3,
    }
    config = BertConfig(**shape, max_position_embeddings=16)
    module = BertForSequenceClassification(config).eval()
    family = families.get("bert")
    one = example(module, family.inputs, 6)
    structure = mapping.structure(module, family, one)
    skeleton = Skeleton("BertForSequenceClassification", config.to_dict(), ("a", "b"))
    return Workload("tiny", module, structure, Data.empty(), skeleton, 16, "", "", one)


def test_rearrangement_keeps_counts_and_lowers_the_block_fisher_loss(bert: Any) -> None:
    structure = bert.structure
    random = torch.Generator().manual_seed(0)
    by_row = torch.randn(30, 5, generator=random) @ torch.randn(5, structure.num_units, generator=random)
    by_row = by_row.double()  # units that stand in for each other, and units that work against each other
    whole = sum(kwon.macs(structure)[kind] * site.count for kind in kwon.KINDS for site in structure.of_kind(kind))
    before = kwon.search(structure, by_row.square().sum(0), kwon.macs(structure), 0.5 * whole)
    after = kwon.rearrange(structure, before, by_row)
    assert not torch.equal(before, after)
    for _, place in structure.slices():
        assert before[place].sum() == after[place].sum()
        then, now = (by_row[:, place][:, ~masks[place]].sum(dim=1).square().sum() for masks in (before, after))
        assert now <= then * (1 + 1e-9)


def test_rearrangement_is_the_greedy_search_of_the_paper(bert: Any) -> None:
    """Step by step as it is defined, with the sums of gradients made anew each time."""
    by_row = kwon.gradients(bert)
    site, place = next((s, p) for s, p in bert.structure.slices() if s.kind == "ffn")
    masks = torch.ones(bert.structure.num_units, dtype=torch.bool)
    grads = by_row[:, place].T
    order = grads.square().sum(dim=1).argsort(stable=True).tolist()
    masks[torch.tensor(order[:40]) + place.start] = False
    group = order[:40]
    for unit in order[40:]:
        group.append(unit)
        vectors = grads[group]
        del group[int((vectors.sum(dim=0) - vectors).square().sum(dim=1).argmin())]
    found = kwon.rearrange(bert.structure, masks, by_row)[place]
    assert set(torch.nonzero(~found).flatten().tolist()) == set(group)
    assert site.count - int(found.sum()) == 40


@pytest.mark.parametrize("model", ["bert", "vit"])
def test_folded_factors_are_masks_with_those_factors(model: str, request: pytest.FixtureRequest) -> None:
    workload = request.getfixturevalue(model)
    values = torch.arange(workload.structure.num_units).double()
    plan = by_ratio(workload.structure, values, {"head": 0.5, "ffn": 0.4})
    pruned = surgery.prune(workload, plan)
    random = torch.Generator().manual_seed(0)
    gates = torch.ones(workload.structure.num_units)
    gone = torch.tensor([unit in plan.removed for unit in workload.structure.units])
    for site, place in workload.structure.slices():
        if site.kind in kwon.KINDS:
            gates[place] = torch.rand(site.count, generator=random) * 2 - 0.5
            now = pruned.structure.site(site.kind, site.layer)
            with torch.no_grad():
                kwon.fold(pruned, now, gates[place][~gone[place]].double())
    gates[gone] = 0
    with torch.no_grad(), surgery.gated(workload.module, workload.structure, gates):
        wanted = workload.forward(workload.example)
    with torch.no_grad():
        found = pruned.forward(workload.example)
    assert torch.allclose(found, wanted, atol=1e-5)


def _layer_error(teacher: Any, pruned: Any, site: Any) -> float:
    """The squared distance of the residual sums after a site, over the real tokens of the calibration rows."""
    total = 0.0
    for batch in pruned.data.calibration.batches(32):
        real = batch.inputs.get("attention_mask", torch.ones(1)).bool()
        then = teacher.structure.site(site.kind, site.layer)
        with torch.no_grad():
            wanted, found = (kwon._at(one, at, batch.inputs)[1] for one, at in ((teacher, then), (pruned, site)))
        difference = (wanted - found).double()
        total += float((difference[real] if real.shape == difference.shape[:2] else difference).square().sum())
    return total


@pytest.mark.parametrize("model", ["bert", "vit"])
@pytest.mark.parametrize("kind", kwon.KINDS)
def test_factors_never_lose_against_masks_of_one(model: str, kind: str, request: pytest.FixtureRequest) -> None:
    workload = request.getfixturevalue(model)
    values = kwon.gradients(workload).square().sum(dim=0)
    pruned = surgery.prune(workload, by_ratio(workload.structure, values, {"head": 0.5, "ffn": 0.5}))
    improved = 0
    for site in pruned.structure.of_kind(kind):
        with torch.no_grad():
            normal, target = kwon.equations(workload, pruned, site)
            changed = surgery.prune(pruned, PruningPlan())
            kwon.fold(changed, site, kwon.factors(normal, target))
            exact = surgery.prune(pruned, PruningPlan())
            kwon.fold(exact, site, torch.linalg.lstsq(normal, target[:, None], driver="gelsd").solution[:, 0])
        before, after, least = (_layer_error(workload, one, site) for one in (pruned, changed, exact))
        assert least * (1 - 1e-4) <= after <= before * (1 + 1e-6)
        improved += least < before
    assert improved


# ---- the study


@pytest.mark.parametrize("wanted", [1.5, 2.0, 3.7])
def test_the_search_meets_the_wanted_speedup(wanted: float) -> None:
    """On a latency of 15 % that nothing takes away, with heads that go in steps of a quarter."""

    class Model:
        def __init__(self, channels: float, heads: float) -> None:
            self.time = 0.15 + 0.5 * (1 - channels) + 0.35 * (1 - np.ceil(4 * heads) / 4)

    class Bench:
        trials = 0

        def speedup(self, model: Any) -> Any:
            self.trials += 1
            return equal_latency.Speedup(1 / model.time, 1.0, 1.0)

    bench: Any = Bench()

    def cut(channels: float, heads: float) -> Any:
        return equal_latency.Candidate(Model(channels, heads), lambda: None)  # type: ignore[arg-type, return-value]

    found = equal_latency.search(cut, bench, wanted)
    assert found.speedup.value == pytest.approx(wanted, rel=equal_latency.TOLERANCE)
    assert bench.trials <= 2 * equal_latency.MOST_TRIALS


def test_a_study_that_was_killed_goes_on(tmp_path: Path) -> None:
    facts = {"model": "m", "rows": 3}
    path = tmp_path / "study.jsonl"
    whole = [json.dumps({"study": facts}), json.dumps({"contender": "a"})]
    path.write_text("\n".join([*whole, '{"contender": "b", "spe']), encoding="utf-8")
    assert pruning._read(path, facts) == [{"contender": "a"}]
    assert path.read_text(encoding="utf-8") == "\n".join(whole) + "\n"
    with pytest.raises(pruning.UsageError, match="another file"):
        pruning._read(path, {**facts, "rows": 4})


def test_the_sets_of_the_reviews_keep_apart_on_fewer_rows(minilm: Any) -> None:
    parts = pruning.evaluation_sets(minilm)
    assert {name: len(at) for name, at in parts.items()} == {"rotten_tomatoes": 2000, "imdb": 1000}
    fewer, small = pruning.fewer(minilm, parts, 90)
    assert {name: len(at) for name, at in small.items()} == {"rotten_tomatoes": 60, "imdb": 30}
    whole, classes = minilm.data.evaluation.classes, fewer.data.evaluation.classes
    for name, at in parts.items():  # a set of one class would be judged by what a model leans to
        assert classes[small[name]].mean() == pytest.approx(whole[at].mean(), abs=0.5 / len(small[name]) + 0.01)
    lengths = minilm.data.evaluation.lengths
    assert lengths[parts["imdb"]].mean() > 4 * lengths[parts["rotten_tomatoes"]].mean()
    assert (
        fewer.data.evaluation.lengths[small["imdb"]].mean()
        > 4 * fewer.data.evaluation.lengths[small["rotten_tomatoes"]].mean()
    )


def test_shapes_of_texts_and_of_images() -> None:
    assert quantization.sizes("1x32,8x128", texts=True) == [(1, 32), (8, 128)]
    assert quantization.sizes("1,8", texts=False) == [(1, 0), (8, 0)]
    for text, texts in (("1", True), ("1x32", False), ("0x32", True), ("ax3", True), ("", False)):
        with pytest.raises(SystemExit, match="is not a shape"):
            quantization.sizes(text, texts=texts)


def test_torchao_answers_nearly_as_the_float_model(vit: Any, tmp_path: Path) -> None:
    """Where it is installed; what is read is the head's input."""
    pytest.importorskip("torchao")
    eager, *_ = torch_int8.of_torchao(vit, tmp_path)
    feeds = {"pixel_values": np.random.default_rng(1).normal(size=(4, 3, 16, 16)).astype(np.float32)}
    logits, read = eager.read()(feeds)
    with torch.no_grad():
        wanted = vit.forward({"pixel_values": torch.from_numpy(feeds["pixel_values"])}).numpy()
    assert read.shape == (4, 32)
    assert 0 < np.abs(logits - wanted).max() < 0.05 * np.abs(wanted).max()
    np.testing.assert_allclose(eager.open(1, feeds)().logits.numpy(), logits)
    assert eager.size_bytes > 0
