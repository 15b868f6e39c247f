"""Elimination against brute force and numpy, and predicted losses against masking and solving by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import edgepress as ep
import numpy as np
import pytest
import torch
from edgepress.compress.cholesky import damp_
from edgepress.compress.distance import distance as distance_of
from edgepress.compress.prune import predicted, replay
from edgepress.compress.prune.allocate import by_ratio
from edgepress.compress.prune.budget import choices, fewest
from edgepress.compress.prune.elimination import AT_ONCE, eliminate, nested
from edgepress.compress.score.evidence import gather
from edgepress.compress.score.weights import places
from edgepress.models import surgery
from edgepress.models.layers import matrix
from edgepress.models.surgery import gated
from torch import Tensor


def _problem(columns: int, outputs: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs [rows, columns], their H, and weights."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=random, dtype=torch.float64)
    x = torch.randn(3 * columns, columns, generator=random, dtype=torch.float64) @ mix
    h = x.T @ x / len(x) + 1e-3 * torch.eye(columns, dtype=torch.float64)
    return x, h, torch.randn(outputs, columns, generator=random, dtype=torch.float64)


def _solution(h: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """The best weights [out, kept] for these columns, by the normal equations."""
    return torch.linalg.solve(h[kept][:, kept], h[kept] @ weight.T).T


def _error(h: Tensor, weight: Tensor, kept: Tensor) -> float:
    change = -weight.clone()
    change[:, kept] += _solution(h, weight, kept)
    return float((change @ h * change).sum())


@pytest.mark.parametrize("seed", range(3))
def test_after_every_step_of_an_order_the_weights_are_least_squares(seed: int) -> None:
    x, h, weight = _problem(7, 3, seed)
    tall = torch.cat([x / len(x) ** 0.5, 1e-3**0.5 * torch.eye(7, dtype=torch.float64)]).numpy()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    found = nested(h, weight, order)
    for gone in range(8):
        kept = order[gone:].tolist()
        expected = np.zeros((3, 7))
        expected[:, kept] = np.linalg.lstsq(tall[:, kept], tall @ weight.numpy().T, rcond=None)[0].T
        np.testing.assert_allclose(found.weights(gone), expected, rtol=1e-7, atol=1e-12)
        error = np.square(tall @ (expected - weight.numpy()).T).sum()
        np.testing.assert_allclose(found.errors[gone], error, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(("count", "width", "more"), [(6, 2, 0), (9, 1, 3), (5, 3, 2)])
def test_every_step_takes_the_unit_that_costs_least(count: int, width: int, more: int) -> None:
    _, h, weight = _problem(count * width + more, 4, count)
    units = torch.randperm(len(h), generator=torch.Generator().manual_seed(1))[: count * width].reshape(count, width)
    found = eliminate(h, weight, units)
    kept = set(range(len(h)))
    assert float(found.errors[count]) == 0
    for step, unit in enumerate(found.order):
        left = {
            other: _error(h, weight, torch.tensor(sorted(kept - set(units[other].tolist())), dtype=torch.int64))
            for other in range(count)
            if other not in found.order[:step]
        }
        assert min(left, key=left.__getitem__) == unit
        assert float(found.errors[count - step - 1]) == pytest.approx(left[unit], rel=1e-8)
        kept -= set(units[unit].tolist())


def test_many_units_go_some_at_a_time_with_exact_errors() -> None:
    count = 3 * AT_ONCE
    _, h, weight = _problem(count, 5, 2)
    found = eliminate(h, weight, torch.arange(count)[:, None])
    assert sorted(found.order) == list(range(count))
    assert (found.errors.diff() <= 0).all()
    kept = count
    while kept:
        kept -= max(1, kept // AT_ONCE)  # where a step ends
        left = torch.tensor(sorted(found.order[count - kept :]), dtype=torch.int64)
        assert float(found.errors[kept]) == pytest.approx(_error(h, weight, left), rel=1e-6)


def test_it_finds_the_unit_that_another_stands_in_for() -> None:
    _, h, weight = _problem(6, 4, 3)
    twice = torch.cat([torch.eye(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)[:1]])  # 6 is 0 again
    h = twice @ h @ twice.T + 1e-9 * torch.eye(7, dtype=torch.float64)
    weight = torch.cat([weight * 10, weight[:, :1] * 10], dim=1)
    found = eliminate(h, weight, torch.arange(7)[:, None])
    assert found.order[0] in {0, 6}
    assert float(found.errors[6]) < 1e-6 * float(found.errors[5])


def test_a_prior_weighs_what_is_compared_and_not_what_is_told() -> None:
    _, h, weight = _problem(12, 4, 5)
    units, prior = torch.arange(12).reshape(6, 2), torch.tensor([3.0, 0.01, 1.0, 9.0, 0.5, 2.0])
    found = eliminate(h, weight, units, prior=prior)
    assert found.order != eliminate(h, weight, units).order
    gone: list[int] = []
    for unit in found.order:
        before = float(found.errors[6 - len(gone)])
        left = [other for other in range(6) if other not in gone]
        kept = {other: torch.tensor([c for c in range(12) if c // 2 not in {*gone, other}]).long() for other in left}
        told = {other: _error(h, weight, columns) for other, columns in kept.items()}
        assert min(left, key=lambda other: (told[other] - before) * float(prior[other])) == unit
        gone.append(unit)
        assert float(found.errors[6 - len(gone)]) == pytest.approx(told[unit], rel=1e-8)


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "t5", "cnn", "sequence first"])
def test_predicted_losses_are_those_of_the_cut_and_solved_model(name: str, with_rows: Callable[..., Any]) -> None:
    small = with_rows(name)
    scores = ep.score(small, "fisher").values
    before = copy.deepcopy(small.module.state_dict())
    found = predicted.predict(small, scores, rows=10, trial_rows=10)
    assert all(torch.equal(before[key], tensor) for key, tensor in small.module.state_dict().items())
    assert tuple(found.losses) == choices(small.structure)
    moments = dict(gather(small, ("grams",), rows=small.data.calibration).grams())
    batch = next(small.data.calibration.batches(10))
    wanted = small.forward(batch.inputs)
    for site, losses in found.losses.items():
        assert len(losses) == site.count + 1
        assert losses[-1] == 0
        assert np.isinf(losses[: fewest(site)]).all()
        assert (np.diff(losses[fewest(site) :]) <= 1e-12).all()
        assert sorted(found.orders[site]) == list(range(site.count))
        kept = fewest(site)
        module = copy.deepcopy(small.module)
        gone = found.orders[site][: site.count - kept]
        if site.kind != "block":
            _solve(module, site, gone, moments)
        place = dict(small.structure.slices())[site].start
        mask = torch.ones(small.structure.num_units, dtype=torch.float64)
        mask[[place + unit for unit in gone]] = 0
        cut = small.with_module(module, small.structure, small.plan)
        with torch.no_grad(), gated(module, small.structure, mask):
            answers = cut.forward(batch.inputs)
        distance = distance_of(wanted.detach(), answers, batch, by_class=small.task.name not in {"embedding"})
        assert losses[kept] >= float(distance.mean()) - 1e-9  # never less than measured, as more units go
        if site.kind == "block":
            assert losses[0] == pytest.approx(float(distance.mean()))


@pytest.mark.parametrize("name", ["bert", "vit", "t5", "albert", "cnn"])
def test_predicted_losses_are_those_from_the_start(
    name: str, with_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replaying blocks changes nothing: neither a mask nor a weight of one trial is in the states of the next."""
    small = with_rows(name)
    scores = ep.score(small, "fisher").values
    found = predicted.predict(small, scores, rows=10, trial_rows=10)
    monkeypatch.setattr(replay, "_replayable", lambda _: frozenset())
    plain = predicted.predict(small, scores, rows=10, trial_rows=10)
    assert found.orders == plain.orders
    assert all(np.array_equal(losses, plain.losses[site]) for site, losses in found.losses.items())


def test_the_losses_of_a_site_with_one_unit(with_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One group that all heads read cannot go, and costs nothing where it stays, whatever memory held before."""
    small = with_rows("llama")
    values = torch.rand(small.structure.num_units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    single = surgery.prune(small, by_ratio(small.structure, values, {"kv": 0.9}))
    assert [site.count for site in single.structure.of_kind("kv")] == [1, 1]
    monkeypatch.setattr(predicted.np, "empty", lambda shape, *more, **options: np.full(shape, 7.0, *more, **options))
    found = predicted.predict(single, values[: single.structure.num_units], rows=10, trial_rows=10)
    for site in single.structure.of_kind("kv"):
        assert found.losses[site].tolist() == [np.inf, 0.0]


def _solve(module: Any, site: Any, gone: Any, moments: Any) -> None:
    owner = torch.tensor(site.parts)
    for cut in site.gates:
        layer = module.get_submodule(cut.layer)
        own, seen = places(layer, site, cut), moments[cut.layer]
        lost = own[torch.isin(owner, torch.tensor(gone))].flatten()
        h = damp_(seen.covariance(centred=layer.bias is not None))
        kept = torch.tensor([c for c in range(len(h)) if c not in lost.tolist()], dtype=torch.int64)
        with torch.no_grad():
            weight = torch.zeros_like(matrix(layer))
            weight[:, kept] = _solution(h, matrix(layer).double(), kept).to(weight)
            if layer.bias is not None:
                layer.bias += (matrix(layer) - weight) @ seen.mean
            matrix(layer).copy_(weight)
