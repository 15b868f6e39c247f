"""Predicted losses: what is lost where one site keeps only so many units, and all else stays as it is.

What    Each site is cut to a few counts in turn, the layer that reads it makes up for what went, and the distance of
        the model's answers from the original's is measured on calibration rows; counts in between follow the error of
        that layer, which is known at each. A block's loss is that of skipping it.
When    Before an allocation, which adds up what the sites lose. Scores of single units say which go first, not how much
        is lost with half of them.
Cost    One pass for the Gram matrices, an elimination for each site, and about ``LEVELS`` passes of the rows a site, of
        which a site's earlier blocks are spared.
Source  The loss by layer and level is ZipLM's (Kurtic et al. 2023, arXiv 2302.04089), who take the layer's own error
        for it; measured at the model's answers here

Two orders are tried for each site at ``DUEL`` of its units, that of the scores given and that of :mod:`.elimination`
with the scores as its prior, and the one that loses less is taken: what a layer can make up for need not be what the
task can spare, and the other way round.

The distance is the mean over rows of KL(original || cut) where answers are classes or tokens, and elsewhere the squared
error over the answers' mean square. To second order both are quadratic in what the answers change by, which is linear
in what the layer's output changes by; so between levels the loss goes as the layer's squared error does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...models.data import Batch
from ...models.layers import matrix
from ...models.memory import give_back
from ...models.structure import Cut, Site, Structure
from ...models.surgery import gated
from ...models.workload import Progress, Workload
from ..cholesky import damp_
from ..distance import by_class, distance
from ..score.evidence import gather
from ..score.readers import Moments
from ..score.weights import places
from .budget import choices, fewest, orders, sums
from .elimination import Nested, eliminate, nested
from .replay import Replay

LEVELS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Shares of a site's units at which its loss is measured, beside the fewest that it may keep."""

DUEL = 1 / 4
"""The share of a site's units at which orders are held against each other."""

BATCH, TOKENS = 16, 512
"""Of a trial."""

LEAST = 1e-3
"""What every unit's prior is at least, in units of its site's mean score."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Predicted:
    losses: Mapping[Site, Floats]
    """Of every site of :func:`.budget.choices` the loss by units kept, [count + 1]."""
    orders: Mapping[Site, tuple[int, ...]]
    """Its units, the first to go first."""

    def save(self, path: Path) -> None:
        """As ``.npz``; see :func:`read`."""
        losses, orders = (np.concatenate(list(series.values())) for series in (self.losses, self.orders))
        np.savez(path, losses=losses, orders=orders)


def read(path: Path, structure: Structure) -> Predicted:
    """What was saved of the sites of ``structure``."""
    sites = choices(structure)
    with np.load(path, allow_pickle=False) as saved:
        losses = np.split(saved["losses"], np.cumsum([site.count + 1 for site in sites])[:-1])
        orders = np.split(saved["orders"], np.cumsum([site.count for site in sites])[:-1])
    ordered = (tuple(order.tolist()) for order in orders)
    return Predicted(dict(zip(sites, losses, strict=True)), dict(zip(sites, ordered, strict=True)))


@dataclass(frozen=True)
class _Reader:
    """A layer that reads a site's units: H and the mean of its inputs, its weights and the columns of each unit."""

    layer: nn.Module
    h: Tensor
    mean: Tensor
    weight: Tensor
    units: tuple[Tensor, ...]

    def ending(self, order: Sequence[int]) -> _Ending:
        """How it ends up as units go in ``order``; columns of no unit stay."""
        going = [self.units[unit] for unit in order]
        staying = torch.ones(self.h.shape[1], dtype=torch.bool)
        staying[torch.cat(going)] = False
        columns = torch.cat([*going, staying.nonzero()[:, 0]])
        return _Ending(self, nested(self.h, self.weight, columns), np.cumsum([0, *map(len, going)]))


@dataclass(frozen=True)
class _Ending:
    """A reader as the units of its site go in one order."""

    reader: _Reader
    solved: Nested
    columns: NDArray[np.int64]
    """How many columns have gone with the first so many units, [units + 1]."""

    def weights(self, gone: int) -> Tensor:
        """Its best weights, [out, columns], without the first ``gone`` units."""
        return self.solved.weights(int(self.columns[gone]))


@dataclass(frozen=True)
class _Order:
    """The units of a site, the first to go first, and how the layers that read them end up."""

    units: tuple[int, ...]
    endings: tuple[_Ending, ...]

    @classmethod
    def of(cls, units: tuple[int, ...], readers: Sequence[_Reader]) -> _Order:
        return cls(units, tuple(reader.ending(units) for reader in readers))

    @property
    def errors(self) -> Floats:
        """The squared error of the readers' outputs by units kept, [units + 1]."""
        total = np.zeros(len(self.units) + 1)
        for ending in self.endings:
            total += ending.solved.errors.numpy()[ending.columns]
        return total[::-1]


def predict(
    workload: Workload,
    scores: Tensor,
    *,
    rows: int = 256,
    trial_rows: int = 32,
    seed: int = 0,
    progress: Progress | None = None,
) -> Predicted:
    """The losses of every site, from ``scores`` [num_units], Gram matrices of ``rows`` calibration rows, and trials on
    ``trial_rows`` of them.

    Where ``workload`` has no rows (a score of the weights alone needs none) they are the sums of the scores.
    """
    module, structure, calibration = workload.module, workload.structure, workload.data.calibration
    sites = choices(structure)
    if not len(calibration):
        summed, order = sums(structure, scores), orders(structure, scores)
        return Predicted({site: summed[site] for site in sites}, {site: order[site] for site in sites})
    places_of = dict(structure.slices())
    evidence = gather(workload, ("grams",), rows=calibration.take(rows, seed), seed=seed, progress=progress)
    trials = _Trials(workload, list(calibration.take(trial_rows, seed).batches(BATCH, tokens=TOKENS)))
    found: dict[Site, tuple[Floats, tuple[int, ...]]] = {}

    def done(site: Site, losses: Floats, order: tuple[int, ...]) -> None:
        found[site] = losses, order
        give_back()
        if progress:
            progress(len(found), len(sites), "layers tried")

    for site in sites:
        if site.kind == "block":
            done(site, np.array([trials.distance(site, (0,), ()), 0.0]), (0,))
    waiting = {site: [cut.layer for cut in site.gates] for site in sites if site.kind != "block"}
    seen: dict[str, Moments] = {}
    for name, moments in evidence.grams():
        seen[name] = moments
        for site in [site for site, names in waiting.items() if all(name in seen for name in names)]:
            own = scores[places_of[site]]
            done(site, *_best(trials, site, [_reader(module, site, cut, seen[cut.layer]) for cut in site.gates], own))
            del waiting[site]
        needed = {name for names in waiting.values() for name in names}
        seen = {name: moments for name, moments in seen.items() if name in needed}
    return Predicted({site: found[site][0] for site in sites}, {site: found[site][1] for site in sites})


def _reader(module: nn.Module, site: Site, cut: Cut, moments: Moments) -> _Reader:
    layer: Any = module.get_submodule(cut.layer)
    own, owner = places(layer, site, cut), torch.tensor(site.parts)
    units = tuple(own[owner == unit].flatten().sort().values for unit in range(site.count))
    h = damp_(moments.covariance(centred=layer.bias is not None))
    return _Reader(layer, h, moments.mean.double(), matrix(layer).detach().double(), units)


def _best(trials: _Trials, site: Site, readers: Sequence[_Reader], scores: Tensor) -> tuple[Floats, tuple[int, ...]]:
    """The losses of a site and its order, by the ``scores`` [units] alone or by elimination with them."""
    orders = [tuple(scores.argsort(stable=True).tolist())]
    if len(readers) == 1 and len({len(columns) for columns in readers[0].units}) == 1:
        columns = torch.stack(readers[0].units)
        orders.append(eliminate(readers[0].h, readers[0].weight, columns, prior=_prior(scores)).order)
    if len(orders) == 1:
        return _curve(trials, site, _Order.of(orders[0], readers), {}), orders[0]
    kept = max(round(DUEL * site.count), 1)
    lost = [trials.without(site, _Order.of(one, readers), site.count - kept) for one in orders]
    best = orders[lost.index(min(lost))]
    return _curve(trials, site, _Order.of(best, readers), {kept: min(lost)}), best


def _prior(scores: Tensor) -> Tensor:
    """Scores over their mean; those of units that nothing is lost with still leave their errors to be compared."""
    scores = scores.double().clamp(min=0)
    return scores / scores.mean().clamp(min=torch.finfo(scores.dtype).tiny) + LEAST


def _curve(trials: _Trials, site: Site, order: _Order, already: Mapping[int, float]) -> Floats:
    """The loss by units kept, measured at ``LEVELS`` (some have been ``already``), in between by the readers' errors.

    It is never less as more go.
    """
    counts = sorted({fewest(site), *(max(round(share * site.count), 1) for share in LEVELS)} - {site.count})
    measured: dict[int, float] = {site.count: 0.0}
    for kept in counts:
        measured[kept] = already[kept] if kept in already else trials.without(site, order, site.count - kept)
    at = np.array(sorted(measured))
    levels = np.maximum.accumulate([measured[kept] for kept in at[::-1]])[::-1]
    error = order.errors
    losses = np.full(site.count + 1, np.inf)  # fewer than the first count may not stay
    losses[site.count] = 0.0
    for low, high, lost, less in zip(at, at[1:], levels, levels[1:], strict=False):
        span = error[low] - error[high]
        share = (error[low : high + 1] - error[high]) / span if span > 0 else np.linspace(1, 0, high - low + 1)
        losses[low : high + 1] = less + (lost - less) * share
    return losses


class _Trials:
    """Trial batches with the original's answers; blocks before the one that is tried are replayed."""

    def __init__(self, workload: Workload, batches: Sequence[Batch]) -> None:
        self.workload, self.replay = workload, Replay(workload, batches)
        self.by_class = by_class(workload)
        with torch.no_grad():
            self.wanted = [workload.forward(batch.inputs) for batch in batches]

    def without(self, site: Site, order: _Order, gone: int) -> float:
        """The distance of the answers without the first ``gone`` units of an order, made up for by their readers."""
        changed = [(ending.reader, ending.weights(gone)) for ending in order.endings]
        return self.distance(site, order.units[:gone], changed)

    def distance(self, site: Site, gone: Sequence[int], changed: Sequence[tuple[_Reader, Tensor]]) -> float:
        """The distance of the answers where the units ``gone`` are masked and readers have other weights."""
        module, structure = self.workload.module, self.workload.structure
        place = dict(structure.slices())[site]
        mask = torch.ones(structure.num_units).to(next(module.parameters()))
        mask[[place.start + unit for unit in gone]] = 0.0
        total, count = 0.0, 0
        with torch.no_grad(), _holding(changed), gated(module, structure, mask):
            for number, (batch, wanted) in enumerate(zip(self.replay.batches, self.wanted, strict=True)):
                forward = self.workload.forward
                found = self.replay.through(site.block, number, forward) if site.block else forward(batch.inputs)
                total += float(distance(wanted, found, batch, by_class=self.by_class).sum())
                count += len(batch.rows)
        return total / max(count, 1)


@contextmanager
def _holding(changed: Sequence[tuple[_Reader, Tensor]]) -> Iterator[None]:
    """Within the context readers have other weights, and the biases that keep the means of their outputs."""
    held = [(reader.layer, copy.deepcopy(reader.layer.state_dict())) for reader, _ in changed]
    try:
        for reader, weight in changed:
            layer: Any = reader.layer
            if layer.bias is not None:
                layer.bias += ((reader.weight - weight) @ reader.mean).to(layer.bias)
            matrix(layer).copy_(weight)
        yield
    finally:
        for layer, state in held:
            layer.load_state_dict(state)
