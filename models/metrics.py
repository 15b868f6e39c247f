"""Metrics: how well a workload does its job, with an interval.

Two variants judged on the same rows are resampled together: the interval of the drop is far narrower than those of the
two values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError, UnavailableError
from . import generation, measures, tasks
from .measures import Floats
from .tasks import Answers, Task

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
    whole = float(value(counts @ levels))
    if np.isnan(whole):
        raise InputError(f"The answers to {len(statistics)} rows cannot be judged: none has a label, or some are NaN.")
    random = np.random.default_rng(seed)
    chunk = max(1, min(RESAMPLES, CELLS // len(levels)))
    drawn = []
    for start in range(0, RESAMPLES, chunk):
        size = min(chunk, RESAMPLES - start)
        drawn.append(value(random.multinomial(len(statistics), counts / len(statistics), size=size) @ levels))
    low, high = np.nanpercentile(np.concatenate(drawn), [2.5, 97.5])  # a draw may have nothing to judge
    return whole, float(low), float(high)


Run = Callable[[dict[str, NDArray[Any]]], NDArray[Any]]
"""An open artifact, or a module: arrays by input name to the model's answer."""


def predict(
    run: Run,
    rows: Rows,
    task: Task,
    *,
    batch: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Any:
    """The answer to every row through ``run``, in the order of ``rows``: an array [n, …], by token a list of arrays.

    ``batch`` is 16 rows by default, and 4 where every token is answered with a whole vocabulary.
    """
    answers: Answers = [np.empty(0)] * len(rows)
    done = 0
    for part in rows.batches(batch or (4 if task.by_token else 16)):
        output = torch.from_numpy(run({name: tensor.numpy() for name, tensor in part.inputs.items()}))
        for row, answer in zip(part.rows, task.answers(output, part), strict=True):
            answers[row] = answer
        done += len(part.rows)
        if progress:
            progress(done, len(rows), "rows")
    return answers if task.by_token else np.stack(answers)


def wanted(rows: Rows, metric: str) -> Any:
    """What the answers to ``rows`` are compared with under ``metric``."""
    measure = measures.get(metric)
    if measure.of_texts:
        return rows.texts
    return np.arange(len(rows)) if metric.startswith("recall@") else rows.labels


def answers(workload: Workload, rows: Rows, *, metric: str, progress: Progress | None = None) -> Any:
    """What ``workload``'s module answers to ``rows``, as ``metric`` judges it: texts, similarities, or its outputs."""
    if measures.get(metric).of_texts:
        return generation.texts(workload, rows, progress=progress)
    if workload.task is tasks.RETRIEVAL:

        def embed(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                output = workload.module(**inputs)
            return output.image_embeds, output.text_embeds

        return _similarities(embed, workload, rows, progress)
    return predict(_forward(workload), rows, workload.task, progress=progress)


def of_session(
    run: Callable[[dict[str, NDArray[Any]]], list[NDArray[Any]]],
    workload: Workload,
    *,
    original: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Quality:
    """The quality of an open artifact on ``workload``'s evaluation rows."""
    judged = session_answers(run, workload, progress=progress)
    rows, metric = workload.data.evaluation, workload.data.metric
    return quality(metric, judged, wanted(rows, metric), original=original, seed=seed)


def session_answers(
    run: Callable[[dict[str, NDArray[Any]]], list[NDArray[Any]]], workload: Workload, progress: Progress | None = None
) -> Any:
    """The answers of an open artifact to the evaluation rows; UnavailableError where they would have to be texts.

    Of a pair of towers ``run`` gives the embeddings of the images and those of the texts.
    """
    if workload.task is tasks.RETRIEVAL:

        def embed(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            images, texts = run({name: tensor.numpy() for name, tensor in inputs.items()})
            return torch.from_numpy(images), torch.from_numpy(texts)

        return _similarities(embed, workload, workload.data.evaluation, progress)
    if measures.get(workload.data.metric).of_texts:
        raise UnavailableError(f"{workload.data.metric} needs generated text, which artifacts do not give yet.")
    return predict(lambda feeds: run(feeds)[0], workload.data.evaluation, workload.task, progress=progress)


def for_artifacts(workload: Workload) -> Workload:
    """``workload``, judged by what an artifact can be judged by: the likelihood of the texts that it should produce."""
    if not measures.get(workload.data.metric).of_texts:
        return workload
    return workload.judged_by("perplexity" if workload.data.evaluation.labels is not None else workload.task.fidelity)


def of_modules(
    changed: Workload, original: Workload, *, seed: int = 0, progress: Progress | None = None
) -> dict[str, Any]:
    """The quality of a changed module on the evaluation rows, with the drop from the original's, as plain data."""
    rows, metric = original.data.evaluation, original.data.metric
    after, before = (answers(item, rows, metric=metric, progress=progress) for item in (changed, original))
    return asdict(quality(metric, after, wanted(rows, metric), original=before, seed=seed))


def of_module(workload: Workload, *, seed: int = 0, progress: Progress | None = None) -> Quality:
    """The quality of a module on its evaluation rows."""
    rows, metric = workload.data.evaluation, workload.data.metric
    found = answers(workload, rows, metric=metric, progress=progress)
    return quality(metric, found, wanted(rows, metric), seed=seed)


def _forward(workload: Workload) -> Run:
    def run(feeds: dict[str, NDArray[Any]]) -> NDArray[Any]:
        with torch.no_grad():
            result: NDArray[Any] = workload.forward(tensors(feeds)).numpy(force=True)
        return result

    return run


def tensors(feeds: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in feeds.items()}


def _similarities(
    embed: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]],
    workload: Workload,
    rows: Rows,
    progress: Progress | None,
) -> NDArray[np.float32]:
    """The logits of every image with every text, [n, n], of a pair of towers that embeds both."""
    images: list[Tensor] = []
    texts: list[Tensor] = []
    order: list[int] = []
    module: Any = workload.module
    scale = module.logit_scale.detach().exp()
    bias = module.logit_bias.detach() if hasattr(module, "logit_bias") else 0.0
    for part in rows.batches(16):
        for made, kept in zip(embed(part.inputs), (images, texts), strict=True):
            kept.append(made)
        order += part.rows.tolist()
        if progress:
            progress(len(order), len(rows), "pairs")
    logits = (torch.cat(images) @ torch.cat(texts).T * scale + bias).numpy()
    found: NDArray[np.float32] = np.empty_like(logits)
    found[np.ix_(order, order)] = logits
    return found


def save_answers(path: Path, judged: Any) -> None:
    """Write answers to an ``.npz`` file: an array, or arrays of unequal length side by side."""
    if isinstance(judged, np.ndarray):
        np.savez(path, allow_pickle=False, whole=judged)
    else:
        parts: dict[str, Any] = {"parts": np.concatenate(judged), "lengths": np.array([len(part) for part in judged])}
        np.savez(path, allow_pickle=False, **parts)


def read_answers(path: Path) -> Any:
    """What :func:`save_answers` wrote."""
    with np.load(path, allow_pickle=False) as found:
        if "whole" in found:
            return found["whole"]
        return np.split(found["parts"], np.cumsum(found["lengths"])[:-1])
