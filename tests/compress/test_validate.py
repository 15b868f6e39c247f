"""Validation: its statistics against scipy and by hand, trials against masking, and what it says of known scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import edgepress as ep
import numpy as np
import pytest
import torch
from edgepress.compress import score as scores
from edgepress.compress.prune.allocate import by_ratio
from edgepress.compress.score import validate
from edgepress.models.surgery import masked
from scipy import stats

METHODS = ("fisher", "taylor", "magnitude", "random")


def test_rank_correlations_are_scipys() -> None:
    random = np.random.default_rng(0)
    a = random.normal(size=(5, 40))
    b = np.round(a + random.normal(size=(5, 40)), 1)  # with ties
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(validate.spearman(a, b), expected)
    expected = [stats.kendalltau(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(validate.kendall(a, b), expected)
    assert np.isnan(validate.spearman(a[:1], np.ones((1, 40)))).all()


def test_regret_is_nothing_for_the_best_choice_and_one_for_chance() -> None:
    true = np.arange(16.0)
    assert validate.regret(true**3, true) == 0
    assert validate.regret(-true, true) == pytest.approx((13.5 - 1.5) / (7.5 - 1.5))
    random = np.random.default_rng(0)
    drawn = [validate.regret(random.normal(size=16), true) for _ in range(2000)]
    assert np.mean([value for value in drawn if value is not None]) == pytest.approx(1, abs=0.05)
    assert validate.regret(true, np.ones(16)) is None


def test_the_ceiling_is_the_correlation_of_the_truth_with_its_sample() -> None:
    random = np.random.default_rng(0)
    true = random.normal(size=(20, 200))
    samples = true[..., None] + random.normal(size=(20, 200, 50)) * 5
    found = [validate.ceiling(by_row, random) for by_row in samples]
    assert None not in found
    assert np.mean(np.array(found, float)) == pytest.approx(validate.spearman(true, samples.mean(2)).mean(), abs=0.02)


def test_the_area_is_that_under_the_curve() -> None:
    lines = np.outer(validate.SHARES, [1.0, 2.0, 3.0, 2.0])
    found = validate.curve(lines, seed=0)
    assert found.area == pytest.approx(validate.SHARES[-1])
    assert found.losses == pytest.approx([2 * share for share in validate.SHARES])
    assert found.low is not None
    assert found.high is not None
    assert 0.45 < found.low < found.area < found.high < 1.35


def test_intervals_hold_the_truth_about_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "REDRAWN", 200)
    random = np.random.default_rng(0)
    inside = 0
    for seed in range(60):
        truth = random.normal(size=40)
        score = truth + random.normal(size=40)
        rows = truth[:, None] + random.normal(size=(40, 400)) * 0.1
        sets = [(unit,) for unit in range(40)]
        found = validate.agreement(score, sets, dict(zip(sets, rows, strict=True)), seed=seed)
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 6 / np.pi * np.arcsin(0.5**0.5 / 2) <= found.high  # Spearman's of a Pearson of 1/sqrt(2)
    assert inside >= 51


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "cnn"])
def test_the_true_change_agrees_with_itself(name: str, with_rows: Callable[..., Any]) -> None:
    small = with_rows(name)
    known = [ep.score(small, method) for method in ("ablation", "random")]
    found = validate.validate(small, known, units=12, rows=small.data.calibration)
    assert found.keys() == {"ablation", "random"}
    for kind in small.structure.kinds:
        entry = found["ablation"][kind]
        assert entry["n"] == min(12, sum(site.count for site in small.structure.of_kind(kind)))
        if entry["n"] > 2:
            assert entry["spearman"] == pytest.approx(1)
            assert entry["kendall"] == pytest.approx(1)
        assert entry["regret"] == pytest.approx(0, abs=1e-9)
        if entry["sets"]:
            assert entry["sets"]["size"] > 1


def test_curves_are_the_losses_of_masked_plans(with_rows: Callable[..., Any]) -> None:
    small = with_rows("bert")
    fisher = ep.score(small, "fisher")
    found = validate.validate(small, [fisher], units=2, rows=small.data.calibration)
    (batch,) = small.data.calibration.batches(len(small.data.calibration))
    for kind in ("head", "ffn"):
        for share, loss in zip(validate.SHARES, found["fisher"][kind]["curve"]["losses"], strict=True):
            plan = by_ratio(small.structure, fisher.values, {kind: share})
            with torch.no_grad():
                whole = small.losses(batch).mean()
                with masked(small.module, small.structure, plan):
                    assert float(small.losses(batch).mean() - whole) == pytest.approx(loss, abs=1e-10)


def test_sets_are_of_one_size_and_one_layer_each(minilm: Any) -> None:
    structure = minilm.structure
    known = [ep.score(minilm, method, rows=8) for method in METHODS]
    sets = validate.sample_sets(structure, "ffn", known, 30, np.random.default_rng(0))
    layers = [{structure.units[unit].layer for unit in chosen} for chosen in sets]
    assert len(sets) == 30
    assert {len(chosen) for chosen in sets} == {1536 // validate.SETS}
    assert [len(layer) for layer in layers] == [1] * 30
    assert [sum(layer == {number} for layer in layers) for number in range(6)] == [5] * 6
    assert len({unit for chosen in sets for unit in chosen}) == 30 * 64
    assert validate.sample_sets(structure, "head", known, 30, np.random.default_rng(0)) == []


def test_trials_are_on_rows_that_no_score_has_seen(minilm: Any) -> None:
    rows = validate.unseen(minilm, scored=256, count=128)
    assert len(rows) == 128
    assert not set(rows.keys) & set(minilm.data.calibration.take(256).keys)
    assert not set(rows.keys) & set(minilm.data.evaluation.keys)
    few = replace(minilm, data=replace(minilm.data, calibration=minilm.data.calibration.take(300)))
    assert set(validate.unseen(few, scored=256).keys) <= set(few.data.train.keys)
    alone = replace(few, data=replace(few.data, train=few.data.train.pick([])))
    assert set(validate.unseen(alone, scored=256).keys) <= set(few.data.calibration.keys)


def test_it_is_repeatable(with_rows: Callable[..., Any]) -> None:
    small = with_rows("bert")
    known = scores.score_all(small, METHODS)
    first, second = (validate.validate(small, known, units=6, seed=3) for _ in range(2))
    assert first == second
