"""Calibration against slow references: all activations kept, every range tried, loops in place of sums."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from edgepress.compress.prune import inputs
from edgepress.compress.quantize.calibrate import BINS, OBSERVERS, SHARE, STEP, Histogram, ranges
from edgepress.compress.quantize.choice import products
from edgepress.errors import InputError, UsageError
from edgepress.models.data import Data
from torch import Tensor


def _values(name: str, count: int = 20_000) -> Tensor:
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(count, generator=random)
    outliers = normal.clone()
    outliers[:20] *= 40
    return {
        "normal": normal,
        "gelu": torch.nn.functional.gelu(3 * normal),
        "relu": normal.relu(),
        "outliers": outliers,
        "far from zero": normal + 30,
        "two far tails": torch.cat([normal, normal[:50] * 3 - 25, normal[:10] * 2 + 60]),
    }[name]


NAMES = ("normal", "gelu", "relu", "outliers", "far from zero", "two far tails")


def _filled(values: Tensor) -> Histogram:
    histogram = Histogram()
    histogram.add(values)
    return histogram


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", ["as drawn", "small first", "large first"])
def test_counts_do_not_depend_on_how_values_stream_in(name: str, order: str) -> None:
    values = _values(name)
    if order != "as drawn":
        values = values[values.abs().argsort(descending=order == "large first")]
    histogram = Histogram()
    for part in values.split(777):
        histogram.add(part)
    exact = values.double().numpy()
    assert (histogram.low, histogram.high) == (min(exact.min(), 0), max(exact.max(), 0))
    assert histogram.top / 2 <= np.abs(exact).max() < histogram.top
    expected, _ = np.histogram(exact, bins=BINS, range=(-histogram.top, histogram.top))
    assert np.array_equal(histogram.counts.numpy(), expected)


def test_values_on_edges_and_zeros_keep_their_bins_while_the_range_grows() -> None:
    histogram = Histogram(16)
    histogram.add(torch.zeros(5))
    for value in (0.25, -0.25, 1.0, -4.0, 8.0):
        histogram.add(torch.tensor([value]))
    assert histogram.top == 16  # 8 itself must lie below it
    middles, counts = histogram.filled()
    assert dict(zip(middles.tolist(), counts.tolist(), strict=True)) == {-3.0: 1, -1.0: 1, 1.0: 7, 8.0: 1}


def test_a_value_that_is_not_finite_is_refused() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            Histogram().add(torch.tensor([1.0, bad]))


@pytest.mark.parametrize("name", NAMES)
def test_minmax_and_percentile_are_those_of_all_values(name: str) -> None:
    values = _values(name)
    histogram, exact = _filled(values), values.double().numpy()
    assert OBSERVERS["minmax"](histogram) == (min(exact.min(), 0), max(exact.max(), 0))
    low, high = OBSERVERS["percentile"](histogram)
    tail = (1 - SHARE) / 2
    slack = histogram.width
    if low < 0:
        assert (exact < low - slack).mean() - 1e-12 <= tail <= (exact <= low + slack).mean() + 1e-12
    if high > 0:
        assert (exact > high + slack).mean() - 1e-12 <= tail <= (exact >= high - slack).mean() + 1e-12
    assert (low < 0) == (np.quantile(exact, tail) < 0)


def _squared_error(values: Any, low: float, high: float) -> float:
    scale = (high - low) / 255
    zero = round(-low / scale)
    codes = np.clip(np.rint(values / scale) + zero, 0, 255)
    return float(np.square((codes - zero) * scale - values).sum())


SHARES = np.arange(1, STEP / 2, -STEP)


@pytest.mark.parametrize("name", NAMES)
def test_mse_finds_the_range_of_least_error_over_all_values(name: str) -> None:
    values = _values(name, 4000)
    exact = values.double().numpy()
    low, high = min(exact.min(), 0), max(exact.max(), 0)
    lows = SHARES * low if low else [0.0]
    highs = SHARES * high if high else [0.0]
    best = min(_squared_error(exact, a, b) for a in lows for b in highs)
    found = OBSERVERS["mse"](_filled(values))
    assert low <= found[0] <= 0 <= found[1] <= high
    assert _squared_error(exact, *found) <= 1.02 * best
    assert _squared_error(exact, *found) <= 1.005 * _squared_error(exact, low, high)  # a bin counts as its middle


def _divergence(histogram: Histogram, exact: Any, low: float, high: float) -> float:
    """KL between the clipped values and the levels, each value looked at."""
    width, top = histogram.width, histogram.top
    if high - low < 256 * width:
        return math.inf
    scale = (high - low) / 255
    zero = round(-low / scale)
    bins: dict[float, int] = {}
    for value in exact:
        middle = (math.floor((value + top) / width) + 0.5) * width - top
        middle = min(max(middle, histogram.low), histogram.high)
        bins[middle] = bins.get(middle, 0) + 1
    inside = sorted(middle for middle in bins if low <= middle <= high)
    if not inside:
        return math.inf
    p = {middle: bins[middle] for middle in inside}
    for middle, count in bins.items():
        if middle < low:
            p[inside[0]] += count
        elif middle > high:
            p[inside[-1]] += count
    levels: dict[int, list[float]] = {}
    for middle in inside:
        levels.setdefault(min(max(round(middle / scale) + zero, 0), 255), []).append(middle)
    q = {middle: sum(bins[m] for m in level) / len(level) for level in levels.values() for middle in level}
    total_p, total_q = sum(p.values()), sum(q.values())
    return sum(p[m] / total_p * math.log(p[m] / total_p / (q[m] / total_q)) for m in inside)


@pytest.mark.parametrize("name", NAMES)
def test_entropy_finds_the_range_of_least_divergence_over_all_values(name: str) -> None:
    values = _values(name, 1500)
    histogram, exact = _filled(values), values.double().tolist()
    lows = SHARES[::7] * histogram.low if histogram.low else [0.0]
    highs = SHARES[::7] * histogram.high if histogram.high else [0.0]
    best = min(_divergence(histogram, exact, float(a), float(b)) for a in lows for b in highs)
    found = OBSERVERS["entropy"](histogram)
    assert histogram.low <= found[0] <= 0 <= found[1] <= histogram.high
    assert _divergence(histogram, exact, *found) <= 1.02 * best


@pytest.mark.parametrize("observer", OBSERVERS)
def test_zeros_alone_and_nothing_at_all_have_the_range_zero(observer: str) -> None:
    assert OBSERVERS[observer](Histogram()) == (0, 0)
    assert OBSERVERS[observer](_filled(torch.zeros(9))) == (0, 0)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "t5", "sequence first"])
def test_ranges_are_those_of_each_row_by_itself_without_padding(name: str, with_rows: Callable[..., Any]) -> None:
    workload = with_rows(name)
    names = products(workload)
    kept: dict[str, list[Tensor]] = {layer: [] for layer in names}

    def keep(layer: str) -> Any:
        return lambda _, args: kept[layer].append(args[0].detach().flatten())

    handles = [workload.module.get_submodule(layer).register_forward_pre_hook(keep(layer)) for layer in names]
    with torch.no_grad():
        for batch in workload.data.calibration.batches(1):
            workload.forward(batch.inputs)
    for handle in handles:
        handle.remove()
    found = ranges(workload, names, observe="minmax", rows=100)
    assert found.keys() == set(names)
    for layer in names:
        values = torch.cat(kept[layer])
        assert found[layer] == pytest.approx((min(float(values.min()), 0), max(float(values.max()), 0)), rel=1e-6)


def test_no_activation_outlives_its_batch(with_rows: Callable[..., Any]) -> None:
    workload = with_rows("bert", 200)
    given: list[Any] = []

    def see(_: Any, args: tuple[Tensor, ...]) -> None:
        assert not any(reference() is not None for reference in given[:-1])
        given.append(weakref.ref(args[0]))

    handle = workload.module.bert.encoder.layer[1].output.dense.register_forward_pre_hook(see)
    ranges(workload, products(workload), rows=200)
    handle.remove()
    assert len(given) > 6


def test_a_batch_is_small_however_long_its_rows_are(
    with_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What memory calibration takes goes with the tokens of a batch, padding included."""
    monkeypatch.setattr(inputs, "TOKENS", 40)
    workload = with_rows("bert")
    sizes: list[tuple[int, int]] = []

    def see(_: Any, __: Any, given: dict[str, Any]) -> None:
        sizes.append(tuple(given["input_ids"].shape))

    handle = workload.module.register_forward_pre_hook(see, with_kwargs=True)
    inputs.visit(workload, inputs.linear_layers(workload)[:1], lambda *_: None, rows=60)
    handle.remove()
    assert sum(rows for rows, _ in sizes) == min(60, len(workload.data.calibration))
    assert all(rows == 1 or rows * length <= 40 for rows, length in sizes)
    assert max(rows for rows, _ in sizes) > 1


def test_what_cannot_be_calibrated_is_said_in_a_sentence(with_rows: Callable[..., Any]) -> None:
    workload = with_rows("bert")
    names = products(workload)
    with pytest.raises(UsageError, match=r"no observer 'best'.*minmax"):
        ranges(workload, names, observe="best")
    with torch.no_grad():
        workload.module.bert.encoder.layer[0].intermediate.dense.weight[0, 0] = math.nan
    with pytest.raises(InputError, match=r"in the input of 'bert.encoder.layer.0.output.dense' a value is NaN"):
        ranges(workload, names)
    with pytest.raises(UsageError, match="--data"):
        ranges(replace(workload, data=Data.empty()), names)
