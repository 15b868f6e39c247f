"""Training rows that are held out of training, to tell which step's weights are the best and when to stop.

The evaluation rows judge what comes out in the end, so they must not steer it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import UnavailableError
from ...models import measures, metrics, tasks
from ...models.data import Rows
from ...models.workload import Workload

SHARE, MOST = 0.1, 512
"""How many of the training rows; every prefix of them holds each class in its share."""


@dataclass(frozen=True)
class HeldOut:
    rows: Rows
    metric: str
    """The workload's, or fidelity to the original where the rows have no labels or texts would have to be generated."""
    wanted: Any

    def value(self, student: Workload) -> float:
        """The metric of ``student``, in its own unit."""
        measure = measures.get(self.metric)
        return float(measure.value(measure.count(_answers(student, self.rows), self.wanted).sum(axis=0)))

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether a later ``value`` is at least as good as the ``best`` one so far."""
        return best is None or measures.get(self.metric).better * (value - best) >= 0


def hold_out(original: Workload) -> tuple[Rows, HeldOut]:
    """The training rows that are left to train on, and those that are held out.

    Raises UnavailableError for pairs of towers, which can only be judged on all rows at once.
    """
    if original.task is tasks.RETRIEVAL:
        raise UnavailableError("Stopping early is not available for models that find images and texts.")
    train, metric = original.data.train, original.data.metric
    count = max(1, min(MOST, round(SHARE * len(train))))
    held, rest = train.pick(np.arange(count)), train.pick(np.arange(count, len(train)))
    if held.labels is None or measures.get(metric).of_texts or measures.get(metric).against_original:
        metric = original.task.fidelity if not measures.get(metric).against_original else metric
        return rest, HeldOut(held, metric, _answers(original, held))
    return rest, HeldOut(held, metric, metrics.wanted(held, metric))


def _answers(workload: Workload, rows: Rows) -> Any:
    device = next(workload.module.parameters()).device

    def run(feeds: dict[str, NDArray[Any]]) -> NDArray[Any]:
        inputs = {name: tensor.to(device) for name, tensor in metrics.tensors(feeds).items()}
        with torch.no_grad():
            answer: NDArray[Any] = workload.forward(inputs).float().numpy(force=True)
        return answer

    return metrics.predict(run, rows, workload.task)
