"""Latency tables and pruning to a speed, on a real model and the real runtime; nothing here judges a time."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import pytest
from edgepress.benchmarks import disturbance, latency, speed
from edgepress.benchmarks.latency_table import LatencyTable
from edgepress.compress.prune import budget
from edgepress.compress.prune.predicted import Predicted
from edgepress.errors import ConstraintError, InputError, UsageError
from edgepress.models.structure import Site, Structure
from edgepress.plan import PruningPlan, Unit

pytestmark = pytest.mark.chain

QUICK = {"target": "cpu:1", "sequence": 16, "rounds": 30, "seconds": 0.1}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPRESS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module", params=["fp32", pytest.param("int8-dynamic", marks=pytest.mark.slow)])
def table(request: pytest.FixtureRequest, workload: Any, cache: Path) -> LatencyTable:
    return latency.measure(workload, precision=request.param, **QUICK)


def test_a_table_covers_every_choice(workload: Any, table: LatencyTable) -> None:
    structure = workload.structure
    costs = table.costs(structure)
    assert {(site.kind, site.layer) for site in costs.of} == {
        (k, n) for k in ("head", "ffn", "block") for n in range(3)
    }
    assert all(min(series) >= 0 for series in costs.of.values())
    assert table.sites["head", 0] == table.sites["head", 2], "layers that are alike share an entry"
    assert table.predict(structure, PruningPlan()) == pytest.approx(table.total_ms)
    block = PruningPlan.of([Unit("block", 1, 0)])
    inside = PruningPlan.of([Unit("block", 1, 0), Unit("head", 1, 0), Unit("ffn", 1, 3)])
    assert table.predict(structure, block) == table.predict(structure, inside) <= table.total_ms
    measured = {(point["kind"], point["kept"]) for point in table.points}
    assert {("head", 1), ("head", 2), ("head", 3), ("ffn", 0), ("ffn", 8), ("ffn", 120), ("block", 0)} <= measured
    assert table.together is not None
    assert min(table.together) > 0


def test_savings_add_up_to_that_of_all_kinds_at_once(workload: Any, table: LatencyTable) -> None:
    structure = workload.structure
    sites = [site for site in budget.choices(structure) if site.kind != "block"]
    halved = PruningPlan.of(unit for site in sites for unit in site.units[site.count // 2 :])
    predicted = table.predict(structure, halved)
    saved = table.total_ms - predicted
    scaled = table.adding_up(predicted, table.total_ms - 0.8 * saved)
    assert scaled.predict(structure, halved) == pytest.approx(table.total_ms - 0.8 * saved, rel=1e-4)
    assert scaled.predict(structure, PruningPlan()) == pytest.approx(table.total_ms)
    assert all(min(series) >= 0 for series in scaled.sites.values())
    for measured in (table.total_ms + 1.0, table.total_ms - 2 * saved):
        assert table.adding_up(predicted, measured).sites == table.sites, "noise is not believed"


def test_small_models_are_what_one_was_measured_to_be(workload: Any, table: LatencyTable) -> None:
    structure = workload.structure
    sites = [site for site in budget.choices(structure) if site.kind != "block"]
    few = PruningPlan.of(unit for site in sites for unit in site.units[max(site.count // 8, 1) :])
    straight = replace(table, bends=())
    total = straight.predict(structure, few)
    half = (table.total_ms + total) / 2
    bent = straight.bent(half, total, half - 1.2 * (half - total))
    assert bent.predict(structure, few) == pytest.approx(half - 1.2 * (half - total))
    assert bent.predict(structure, PruningPlan()) == pytest.approx(table.total_ms)
    sums = np.linspace(0, table.total_ms, 50)
    found = [bent.expected(summed) for summed in sums]
    assert (np.diff(found) > 0).all()
    assert [bent.summed(latency) for latency in found] == pytest.approx(sums.tolist())
    assert LatencyTable.from_json(json.loads(json.dumps(bent.to_json()))).bends == bent.bends
    for noise in (half, half - 2 * (half - total)):
        assert straight.bent(half, total, noise).expected(total) == pytest.approx(total), "noise is not believed"
    assert straight.bent(total, total, total).bends == ()


def test_a_table_is_json(table: LatencyTable, workload: Any) -> None:
    document = json.loads(json.dumps(table.to_json()))
    again = LatencyTable.from_json(document)
    assert json.dumps(again.to_json()) == json.dumps(table.to_json())
    assert document["environment"]["threads"] == 1
    assert document["precision"] == table.precision


def test_what_was_measured_before_is_not_measured_again(table: LatencyTable, workload: Any, cache: Path) -> None:
    files = {path: path.read_bytes() for path in (cache / "latency").iterdir()}
    asked: list[str] = []
    again = latency.measure(
        workload, precision=table.precision, **QUICK, progress=lambda done, total, note: asked.append(note)
    )
    assert again.to_json() == LatencyTable.from_json(table.to_json()).to_json()
    assert not asked
    assert files == {path: path.read_bytes() for path in (cache / "latency").iterdir()}


def test_a_damaged_cache_is_measured_again(workload: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "POINTS", 6)
    before = latency.measure(workload, **QUICK)
    path = next(p for p in (cache / "latency").iterdir() if json.loads(p.read_text())["precision"] == "fp32")
    path.write_text(path.read_text()[:1000])
    notes: list[str] = []
    after = latency.measure(workload, **QUICK, progress=lambda done, total, note: notes.append(note))
    assert notes[0] == "exporting"
    assert notes[-1] == "counts measured"
    assert LatencyTable.from_json(json.loads(path.read_text())).costs(workload.structure)
    assert after.sites.keys() == before.sites.keys()


def test_a_table_in_doubt_says_so(workload: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path))
    monkeypatch.setattr(latency, "POINTS", 6)
    monkeypatch.setattr(disturbance, "SLOWER", 0.5)  # as if all were
    notes: list[str] = []
    said: list[str] = []
    table = latency.measure(workload, **QUICK, progress=lambda done, total, note: notes.append(note), say=said.append)
    lots = notes.count("counts measured") - 1
    assert table.disturbed == (lots, lots)
    assert notes.count("disturbed ones again") == -(-lots // 2)
    (path,) = (tmp_path / "latency").iterdir()
    assert said == [
        f"something disturbed the machine while {lots} of {lots} lots of latencies were measured; without {path} they "
        f"are measured again"
    ]
    monkeypatch.undo()
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path))
    latency.measure(workload, **QUICK, say=said.append)
    assert said == said[:1] * 2, "what is kept in the cache is as doubtful"


@pytest.mark.parametrize(
    "change",
    [
        *({"format": 0}, {"sites": 3}, {"rest_ms": float("nan")}, {"points": None}, {"disturbed": 3}),
        *({"bends": 3}, {"bends": [[0, 0], [2, 1], [1, 2]]}, {"bends": [[0, 0], [1, float("inf")]]}),
    ],
)
def test_documents_that_are_no_tables(table: LatencyTable, change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="not a latency table"):
        LatencyTable.from_json({**table.to_json(), **change})


def test_a_table_of_another_model(table: LatencyTable) -> None:
    with pytest.raises(InputError, match="other sizes"):
        table.costs(Structure("bert", (), (Site("head", 0, 9),)))


def test_more_tokens_than_the_model_takes(workload: Any) -> None:
    with pytest.raises(UsageError, match="Sequence 65 is longer than the model's 64 tokens"):
        latency.measure(workload, sequence=65)


# ---- pruning to a speed


@pytest.fixture(scope="module")
def told(workload: Any) -> Predicted:
    values = ep.score(workload, "magnitude").values
    return Predicted(budget.sums(workload.structure, values), budget.orders(workload.structure, values))


def test_pruning_to_a_speed_measures_what_it_promises(workload: Any, table: LatencyTable, told: Predicted) -> None:
    said: list[str] = []
    aim = 1.3 * speed.SPARE**0.5
    fitted = speed.fit(workload, table, told, speedup=1.3, say=said.append)
    assert 1 <= len(fitted.rounds) == len(said) <= speed.ROUNDS
    assert fitted.best in fitted.rounds
    least = table.expected(budget.reachable(workload.structure, told.losses, table.costs(workload.structure)))
    assert fitted.rounds[0].budget_ms == pytest.approx(max(table.total_ms / aim, least))
    for one, then in itertools.pairwise(fitted.rounds):
        corrected = max(one.budget_ms * one.speedup.value / aim, least)
        assert then.budget_ms == pytest.approx(corrected) or least <= then.budget_ms < corrected < one.budget_ms
    for one in fitted.rounds:
        assert one.predicted_ms <= one.budget_ms * (1 + 1e-9)
    enough = [one.speedup.value for one in fitted.rounds if one.speedup.value >= 1.3]
    assert fitted.best.speedup.value == min(enough, default=max(one.speedup.value for one in fitted.rounds))
    workload.structure.check(fitted.plan)
    assert table.predict(workload.structure, fitted.plan) == pytest.approx(fitted.best.predicted_ms)
    document = json.loads(json.dumps(fitted.to_json()))
    assert document["wanted"] == 1.3
    assert document["rounds"][0]["speedup"]["verdict"] in {"faster", "slower", "no difference"}


def test_a_speed_out_of_reach_gives_the_fastest(workload: Any, table: LatencyTable, told: Predicted) -> None:
    fitted = speed.fit(workload, table, told, speedup=1000.0)
    costs = table.costs(workload.structure)
    least = table.expected(budget.reachable(workload.structure, told.losses, costs))
    assert fitted.best.predicted_ms == pytest.approx(least)
    with pytest.raises(ConstraintError, match=r"cannot be pruned to 1000x; the fastest found has \d"):
        fitted.check()
