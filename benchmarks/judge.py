"""Quality beside latency: artifacts and models answer the same evaluation rows, each in the form in which it is run.

The rows are those that every other command keeps for evaluation: the split follows from what is in them and the seed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray

from ..errors import InputError, UnavailableError, UsageError
from ..export import backends
from ..export.artifact import Artifact
from ..models import encode, measures, metrics, tasks, zoo
from ..models import workload as workloads
from ..models.data import Data
from ..models.metrics import Quality
from ..models.skeleton import Skeleton
from ..models.tasks import Task
from ..models.workload import PAST, Progress
from ..plan import read_json
from .environment import usable_cpus
from .runtimes.torch import DTYPES, narrowed, placed
from .subjects import Original
from .targets import Target

Feeds = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Judge:
    """What answers are and what they are held against."""

    task: Task
    data: Data
    labels: tuple[str, ...]

    @property
    def metric(self) -> str:
        return self.data.metric


def judge(
    subjects: Sequence[Artifact],
    data: str,
    *,
    columns: Mapping[str, str] | None = None,
    metric: str | None = None,
    seed: int = 0,
) -> Judge:
    """The rows called ``data`` as the subjects take them: as the first model does, which was loaded with them, or else
    the first artifact, whose tokenizer and configuration came along.

    Raises InputError for rows that do not fit, UsageError where the subjects answer different questions, and
    UnavailableError for what an artifact alone cannot be judged by.
    """
    models = [one for one in subjects if isinstance(one, Original)]
    if models:
        workload = models[0].workload
        found = Judge(workload.task, workload.data, workload.skeleton.labels)
    elif data.startswith("zoo:"):
        workload = zoo.load(data.removeprefix("zoo:"), seed=seed)
        found = Judge(workload.task, workload.data, workload.skeleton.labels)
    else:
        found = _read(subjects[0], data, columns, seed)
    if not len(found.data.evaluation):
        raise InputError(f"{subjects[0].name} can only be judged on rows: give them with --data.")
    found.data.check_disjoint()
    if found.task is tasks.RETRIEVAL:
        raise UnavailableError("A pair of towers is judged by 'edgepress export', which has both.")
    for one in subjects:
        if tuple(one.manifest.labels) != tuple(found.labels):
            ours, theirs = (", ".join(labels) or "no classes" for labels in (one.manifest.labels, found.labels))
            raise UsageError(f"{one.name} and {subjects[0].name} cannot be judged together: {ours} against {theirs}.")
        given = {*found.data.evaluation.inputs, "attention_mask"}
        wanting = [name for name in one.manifest.inputs if name not in given and not name.startswith(PAST)]
        if wanting:
            raise UsageError(f"{one.name} takes '{wanting[0]}', which the rows do not have: it cannot be judged alone.")
    return Judge(found.task, _judged_by(found, metric), found.labels)


def _read(artifact: Artifact, data: str, columns: Mapping[str, str] | None, seed: int) -> Judge:
    """The rows as ``artifact`` takes them."""
    manifest = artifact.manifest
    architecture, is_function = manifest.architecture, ":" in manifest.architecture
    if not architecture or not (is_function or "config.json" in manifest.files):
        raise InputError(
            f"{artifact.folder} was written before artifacts kept what tells how they are judged: write it again, or "
            "name the model that it was made from before it."
        )
    config = {} if is_function else read_json(artifact.folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{artifact.folder / 'config.json'} does not hold a JSON object.")
    axes = [axis for spec in manifest.inputs.values() for axis in spec.axes.values()]
    longest = max((axis.max for axis in axes if axis.name in {"sequence", "decoder_sequence"}), default=1)
    example = {
        name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))
        for name, spec in manifest.inputs.items()
        if not name.startswith(PAST)
    }
    skeleton = Skeleton(architecture, config, tuple(manifest.labels))
    reader = encode.Reader(None if is_function else artifact.folder, skeleton, example, longest)
    rows = encode.load(data, reader, columns=columns, seed=seed)
    return Judge(tasks.of_labels(rows.evaluation.labels) if is_function else reader.task, rows, skeleton.labels)


def _judged_by(found: Judge, metric: str | None) -> Data:
    """The rows with the metric; of what produces texts, the likelihood of those that it should, as in ``compress``."""
    rows = found.data.evaluation
    if metric is None and measures.get(found.metric).of_texts:
        metric = "perplexity" if rows.labels is not None else found.task.fidelity
    if metric is None:
        return found.data
    measure = measures.get(metric)
    if measure.of_texts:
        raise UnavailableError(f"{metric} needs generated text, which artifacts do not give yet.")
    if metric in measures.KNOWN and metric not in found.task.metrics:
        known = ", ".join(found.task.metrics)
        raise UsageError(f"'{metric}' does not judge the answers of {found.task.name} (these do: {known}).")
    if rows.labels is None and not measure.against_original:
        raise UsageError(f"The rows have no labels for '{metric}'; they can be judged by {found.task.fidelity}.")
    return replace(found.data, metric=metric)


def qualities(
    subjects: Sequence[Artifact], judge: Judge, where: Target, *, seed: int = 0, progress: Progress | None = None
) -> list[Quality]:
    """The quality of each subject, and of all but the first the drop from the first, paired row by row.

    They run on this machine: on the target's device where that is here, and on the CPU for a device over ssh, which is
    held to what they answered.
    """
    rows = judge.data.evaluation
    found: list[Quality] = []
    first: Any = None
    for one in subjects:
        with _opened(one, where) as run:
            answers = metrics.predict(run, rows, judge.task, progress=progress)
        wanted = metrics.wanted(rows, judge.metric)
        found.append(metrics.quality(judge.metric, answers, wanted, original=first if found else None, seed=seed))
        first = answers if first is None else first
    return found


@contextmanager
def _opened(subject: Artifact, where: Target) -> Iterator[Callable[[dict[str, NDArray[Any]]], NDArray[Any]]]:
    """What answers the inputs that it takes of those given."""
    device, threads = ("cpu", usable_cpus()) if where.address else (where.device, where.threads)
    names = subject.manifest.inputs
    if isinstance(subject, Original):
        _, precision = where.way("torch")
        dtype = getattr(torch, DTYPES[precision])
        module = narrowed(copy.deepcopy(subject.workload.module), device, dtype)

        def answered(feeds: Feeds) -> NDArray[Any]:
            inputs = {name: placed(feeds[name], device, dtype) for name in names if name in feeds}
            with torch.inference_mode():
                made: NDArray[Any] = workloads.answer(module(**inputs)).float().numpy(force=True)
            return made

        yield answered
        return
    with backends.get(subject.manifest.runtime).open_session(subject, device=device, threads=threads) as session:
        yield lambda feeds: session.run({name: feeds[name] for name in names if name in feeds})[0]
