"""Metrics: how well a workload does its job, with an interval.

Two variants judged on the same rows are resampled together: the interval of the drop is far narrower than those of the
two values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import measures
from .measures import Floats

if TYPE_CHECKING:
    from .data import Rows
    from .workload import Progress, Workload

RESAMPLES = 2000
CELLS = 1 << 22
"""Most weights that the bootstrap holds at once."""


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


def quality(
    metric: str,
    outputs: Any,
    labels: Any,
    *,
    original: Any = None,
    seed: int = 0,
) -> Quality:
    """The quality of ``outputs`` of n rows; with the ``original``'s outputs on the same rows, also the drop from it.

    ``labels`` are what the metric compares with; a metric of fidelity takes the original's outputs instead. A drop is
    positive where something was lost, whichever way the metric runs.
    """
    measure = measures.get(metric)
    if measure.against_original:
        labels = outputs if original is None else original
    statistics = measure.count(outputs, labels)
    if original is None:
        value, low, high = _interval(statistics, measure.value, seed)
        return Quality(metric, value, low, high, len(statistics))
    both = np.concatenate([statistics, measure.count(original, labels)], axis=1)
    width = statistics.shape[1]

    def lost(sums: Floats) -> Floats:
        result: Floats = measure.better * (measure.value(sums[..., width:]) - measure.value(sums[..., :width]))
        return result

    value, low, high = _interval(both, lambda sums: measure.value(sums[..., :width]), seed)
    return Quality(metric, value, low, high, len(statistics), *_interval(both, lost, seed))


def _interval(statistics: Floats, value: Callable[[Floats], Floats], seed: int) -> tuple[float, float, float]:
    """A function of the sums of ``statistics`` [n, k], and its 95 % percentile bootstrap interval (Efron 1979).

    Rows with equal statistics are one level: a resample of the rows is a multinomial draw of how often each level
    comes, so that few levels cost little, however many the rows. The draws are the same for the same rows and seed.
    """
    levels, counts = np.unique(statistics, axis=0, return_counts=True)
    random = np.random.default_rng(seed)
    chunk = max(1, min(RESAMPLES, CELLS // len(levels)))
    drawn = []
    for start in range(0, RESAMPLES, chunk):
        size = min(chunk, RESAMPLES - start)
        drawn.append(value(random.multinomial(len(statistics), counts / len(statistics), size=size) @ levels))
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return float(value(counts @ levels)), float(low), float(high)


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
