"""Validation: which scores to believe on this model and these rows.

Units and sets of units are masked in trials, and the change of the loss is what every score is held against, on rows
that the scores have not seen. Of each method and each kind of unit it is told how well its order agrees with the
trials', what its choice of the least important costs beyond the best choice, and how the loss grows as ever more units
go in its order.

Sets stand for what pruning does to layers of many units, where the loss of one alone is lost in the noise of the rows:
each has the same share of one layer's units, and the layer is cut into sets by the mean of the ranks that the methods
give to its units, so that some sets are important and some are not, in a way that all methods have a part in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ...errors import InputError
from ...models.data import Rows
from ...models.structure import Structure
from ...models.workload import Progress, Workload
from ..prune.allocate import by_ratio
from . import Scores
from .ablation import changes

Floats = NDArray[np.float64]

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
SETS = 24
"""Sets that a layer of at least twice as many units is cut into."""
REDRAWN = 1000
"""Bootstrap samples, of trials and of rows both."""
LEAST_ROWS = 64


@dataclass(frozen=True)
class Agreement:
    """How one score agrees with ``n`` trials of one kind; intervals, here and below, hold 95 % of the bootstrap."""

    n: int
    spearman: float | None
    """None, as all others, where it cannot be told: of trials that are too few or all alike."""
    low: float | None
    high: float | None
    kendall: float | None
    kendall_low: float | None
    kendall_high: float | None
    regret: float | None
    """Of the quarter that scores lowest; see :func:`regret`."""
    ceiling: float | None
    """What ``spearman`` could be at most, since the rows are a sample; see :func:`ceiling`."""


@dataclass(frozen=True)
class Curve:
    """The loss as units of one kind go in the order of a score: mean changes against removed shares."""

    shares: tuple[float, ...]
    losses: tuple[float, ...]
    area: float
    """The mean of ``losses`` over the shares, by the trapezoidal rule from nothing removed."""
    low: float | None
    high: float | None


def validate(
    workload: Workload,
    scores: Sequence[Scores],
    *,
    units: int = 64,
    rows: Rows | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """By method and kind the fields of :class:`Agreement` for ``units`` units of each kind; as ``sets`` the same for as
    many sets and their ``size``, None where layers have few units; as ``curve`` the fields of :class:`Curve`.

    ``rows`` are the rows of the trials, :func:`unseen` by default. Raises InputError where there are none.
    """
    structure = workload.structure
    judged = unseen(workload, seed=seed) if rows is None else rows
    if not len(judged):
        raise InputError("Trials need rows: give a data file or folder with --data.")
    random = np.random.default_rng(seed)
    alone = {kind: sample_units(structure, kind, units, random) for kind in structure.kinds}
    sets = {kind: sample_sets(structure, kind, scores, units, random) for kind in structure.kinds}
    plans = {(one.method, kind): growing(structure, one, kind) for one in scores for kind in structure.kinds}
    wanted = dict.fromkeys(chain(*alone.values(), *sets.values(), *plans.values()))
    measured = changes(workload, list(wanted), rows=judged, seed=seed, progress=progress).numpy()
    found = dict(zip(wanted, measured, strict=True))
    document: dict[str, dict[str, dict[str, Any]]] = {}
    for one in scores:
        values = one.values.numpy()
        for kind in structure.kinds:
            entry: dict[str, Any] = asdict(agreement(values, alone[kind], found, seed=seed))
            size = len(sets[kind][0]) if sets[kind] else 0
            of_sets = asdict(agreement(values, sets[kind], found, seed=seed)) if sets[kind] else None
            entry["sets"] = of_sets and {"size": size, **of_sets}
            entry["curve"] = asdict(curve(np.stack([found[plan] for plan in plans[one.method, kind]]), seed=seed))
            document.setdefault(one.method, {})[kind] = entry
    return document


def unseen(workload: Workload, *, scored: int = 256, count: int = 128, seed: int = 0) -> Rows:
    """At most ``count`` rows that a score of ``scored`` calibration rows by ``seed`` has not seen.

    They are of the calibration split, or where that has too few others of the training split. Where that has too few as
    well, they are all calibration rows, seen or not.
    """
    data = workload.data
    seen = set(data.calibration.take(scored, seed).keys)
    others = data.calibration.pick([row for row, key in enumerate(data.calibration.keys) if key not in seen])
    enough = (rows for rows in (others, data.train) if len(rows) >= LEAST_ROWS)
    return next(enough, data.calibration).take(count, seed)


def agreement(values: Floats, sets: Sequence[tuple[int, ...]], found: Mapping[Any, Floats], *, seed: int) -> Agreement:
    """How the sums of ``values`` [num_units] over ``sets`` agree with the changes of the rows' losses in ``found``."""
    predicted = np.array([values[list(chosen)].sum() for chosen in sets])
    by_row = np.stack([found[chosen] for chosen in sets])
    rows, random = by_row.shape[1], np.random.default_rng(seed)
    picks = random.integers(len(sets), size=(REDRAWN, len(sets)))
    weights = random.multinomial(rows, np.full(rows, 1 / rows), size=REDRAWN) / rows
    scored, true = predicted[picks], np.take_along_axis(weights @ by_row.T, picks, axis=1)
    (rho,), (tau,) = (measure(predicted[None], by_row.mean(axis=1)[None]) for measure in (spearman, kendall))
    rho_low, rho_high, tau_low, tau_high = (
        _percentile(drawn, share) for drawn in (spearman(scored, true), kendall(scored, true)) for share in (2.5, 97.5)
    )
    return Agreement(
        n=len(sets),
        spearman=_known(rho),
        low=rho_low,
        high=rho_high,
        kendall=_known(tau),
        kendall_low=tau_low,
        kendall_high=tau_high,
        regret=regret(predicted, by_row.mean(axis=1)),
        ceiling=ceiling(by_row, random),
    )


def spearman(a: Floats, b: Floats) -> Floats:
    """The rank correlation of each row of ``a`` [samples, n] with that of ``b``; NaN where a row is all alike."""
    x, y = (stats.rankdata(values, axis=1) for values in (a, b))
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    return _cosines(x, y)


def kendall(a: Floats, b: Floats) -> Floats:
    """Kendall's tau-b, which knows ties, of each row of ``a`` [samples, n] with that of ``b``."""
    pairs = (
        (np.sign(np.subtract.outer(x, x)).ravel(), np.sign(np.subtract.outer(y, y)).ravel())
        for x, y in zip(a, b, strict=True)
    )
    return np.array([_cosines(x[None], y[None])[0] for x, y in pairs])


def regret(predicted: Floats, true: Floats) -> float | None:
    """What the quarter that is predicted lowest truly costs beyond the cheapest quarter, in units of what a quarter
    picked by chance costs beyond it; None where all cost the same."""
    count = max(1, len(true) // 4)
    chosen = true[predicted.argsort(kind="stable")[:count]].mean()
    best, chance = np.sort(true)[:count].mean(), true.mean()
    return float((chosen - best) / (chance - best)) if chance > best else None


def ceiling(by_row: Floats, random: np.random.Generator, *, halves: int = 20) -> float | None:
    """The Spearman correlation of the true mean changes with those over these rows, ``by_row`` [sets, rows].

    Two halves of the rows correlate with r; their whole with another sample of the same size by 2 r / (1 + r) (Spearman
    1910, Brown 1910), and with the truth by the square root of that.
    """
    if by_row.shape[1] < 2:
        return None
    orders = [random.permutation(by_row.shape[1]) for _ in range(halves)]
    cut = by_row.shape[1] // 2
    first, second = (np.stack([by_row[:, order[part]].mean(axis=1) for order in orders]) for part in _halves(cut))
    r = np.nanmean(drawn) if np.isfinite(drawn := spearman(first, second)).any() else np.nan
    return _known(np.sqrt(max(0.0, 2 * r / (1 + r)))) if np.isfinite(r) and r > -1 else None


def curve(by_row: Floats, *, seed: int) -> Curve:
    """The curve through the changes of the rows' losses at ``SHARES``, ``by_row`` [shares, rows]."""
    grown = np.concatenate([np.zeros((1, by_row.shape[1])), by_row])
    areas = np.trapezoid(grown, (0.0, *SHARES), axis=0) / SHARES[-1]
    drawn = np.random.default_rng(seed).choice(areas, size=(REDRAWN, len(areas))).mean(axis=1)
    low, high = (_percentile(drawn, share) for share in (2.5, 97.5))
    return Curve(SHARES, tuple(by_row.mean(axis=1).tolist()), float(areas.mean()), low, high)


def growing(structure: Structure, scores: Scores, kind: str) -> list[tuple[int, ...]]:
    """The positions of the units that go at each of ``SHARES`` in the order of ``scores``."""
    place = {unit: position for position, unit in enumerate(structure.units)}
    plans = [by_ratio(structure, scores.values, {kind: share}) for share in SHARES]
    return [tuple(sorted(place[unit] for unit in structure.closed(plan).removed)) for plan in plans]


def sample_units(structure: Structure, kind: str, count: int, random: np.random.Generator) -> list[tuple[int, ...]]:
    """At most ``count`` units of one kind, from every layer as many, each as a set of its own."""
    by_layer = [random.permutation(np.arange(place.start, place.stop)).tolist() for place in _places(structure, kind)]
    return [(int(unit),) for unit in _in_turn(by_layer)[:count]]


def sample_sets(
    structure: Structure, kind: str, scores: Sequence[Scores], count: int, random: np.random.Generator
) -> list[tuple[int, ...]]:
    """At most ``count`` sets of units of one kind, from every layer as many; none where layers have few units."""
    by_layer = []
    for place in _places(structure, kind):
        ranks = np.mean([stats.rankdata(one.values[place].numpy()) for one in scores], axis=0)
        units = place.start + ranks.argsort(kind="stable")
        size = len(units) // SETS
        if size < 2:
            return []
        cut = [tuple(map(int, np.sort(units[start : start + size]))) for start in range(0, size * SETS, size)]
        by_layer.append([cut[index] for index in random.permutation(SETS)])
    return _in_turn(by_layer)[:count]


def _places(structure: Structure, kind: str) -> list[slice]:
    return [place for site, place in structure.slices() if site.kind == kind]


def _in_turn(lists: Sequence[Sequence[Any]]) -> list[Any]:
    """The first of each, then the second of each, and so on."""
    return [item for turn in zip_longest(*lists) for item in turn if item is not None]


def _halves(cut: int) -> tuple[slice, slice]:
    return slice(0, cut), slice(cut, None)


def _cosines(x: Floats, y: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.asarray((x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1)))


def _percentile(drawn: Floats, share: float) -> float | None:
    known = drawn[np.isfinite(drawn)]
    return float(np.percentile(known, share)) if len(known) else None


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
