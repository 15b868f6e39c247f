"""Metrics: how well a workload does its job, with an interval.

Every metric is a mean of per-row values, so that the bootstrap can resample rows, and so that two variants judged on
the same rows can be compared row by row: the interval of the drop is far narrower than those of the two values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError

if TYPE_CHECKING:
    from .data import Rows
    from .workload import Progress, Workload

METRICS = ("accuracy",)
RESAMPLES = 2000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Quality:
    """A metric on ``n`` rows with its 95 % bootstrap interval, in the metric's own unit (accuracy: points of 100).

    ``drop`` is the original's value minus this one, with its own, paired interval; None for the original itself.
    """

    metric: str
    value: float
    low: float
    high: float
    n: int
    drop: float | None = None
    drop_low: float | None = None
    drop_high: float | None = None


def accuracy(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Floats:
    """100 for each row of ``logits`` [n, labels] whose largest entry is at its label, else 0; shape [n]."""
    return np.where(logits.argmax(axis=1) == labels, 100.0, 0.0)


def get(name: str) -> Callable[[NDArray[np.float32], NDArray[np.int64]], Floats]:
    """The per-row function of a metric."""
    if name not in METRICS:
        raise UsageError(f"There is no metric '{name}' (known: {', '.join(METRICS)}).")
    function: Callable[[NDArray[np.float32], NDArray[np.int64]], Floats] = globals()[name]
    return function


def quality(
    metric: str,
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    original: NDArray[np.float32] | None = None,
    seed: int = 0,
) -> Quality:
    """The quality of ``logits`` [n, labels]; with ``original``'s logits on the same rows, also the drop from it."""
    per_row = get(metric)
    values = per_row(logits, labels)
    low, high = _interval(values, seed)
    if original is None:
        return Quality(metric, float(values.mean()), low, high, len(values))
    lost = per_row(original, labels) - values
    drop_low, drop_high = _interval(lost, seed)
    return Quality(metric, float(values.mean()), low, high, len(values), float(lost.mean()), drop_low, drop_high)


def _interval(values: Floats, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean (Efron 1979).

    Per-row values take few distinct levels, so a resample of the rows is a multinomial draw of level counts: exact,
    and its memory does not grow with the rows.
    """
    levels, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=RESAMPLES)
    low, high = np.percentile(drawn @ levels / len(values), [2.5, 97.5])
    return float(low), float(high)


def predict(
    run: Callable[[dict[str, NDArray[np.int64]]], NDArray[np.float32]],
    rows: Rows,
    *,
    batch: int = 16,
    progress: Callable[[int, int, str], None] | None = None,
) -> NDArray[np.float32]:
    """Logits [n, labels] of every row through ``run``, in the order of ``rows``."""
    logits: NDArray[np.float32] | None = None
    done = 0
    for part in rows.batches(batch):
        out = run({name: tensor.numpy() for name, tensor in part.inputs.items()})
        if logits is None:
            logits = np.empty((len(rows), out.shape[1]), dtype=np.float32)
        logits[part.rows] = out
        done += len(part.rows)
        if progress:
            progress(done, len(rows), "rows")
    assert logits is not None
    return logits


def of_session(
    run: Callable[[dict[str, NDArray[np.int64]]], list[NDArray[np.float32]]],
    workload: Workload,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The quality of an open artifact on ``workload``'s evaluation rows, as plain data."""
    rows = workload.data.evaluation
    logits = predict(lambda feeds: run(feeds)[0], rows, progress=progress)
    return asdict(quality(workload.data.metric, logits, rows.labels, seed=seed))


def of_modules(
    changed: Workload, original: Workload, *, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """The quality of a changed module on the evaluation rows, with the drop from the original's, as plain data."""
    rows = original.data.evaluation
    after, before = (predict(_forward(item), rows, progress=progress) for item in (changed, original))
    return asdict(quality(original.data.metric, after, rows.labels, original=before, seed=seed))


def _forward(workload: Workload) -> Callable[[dict[str, NDArray[np.int64]]], NDArray[np.float32]]:
    import torch

    def run(feeds: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        with torch.no_grad():
            logits = workload.forward({name: torch.from_numpy(array) for name, array in feeds.items()})
        result: NDArray[np.float32] = logits.numpy()
        return result

    return run
