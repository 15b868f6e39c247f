"""Mixed precision: the operators that stay in float so that the rest may be quantized, chosen by what each costs the
target.

What    Of all operators that a scheme quantizes those that win back most for each millisecond that they take longer in
        float; the fewest of them with which the drop, judged through the written file, keeps within what is allowed.
When    A scheme is fast enough, but loses too much: a few operators are mostly to blame.
Cost    Two forward passes of some calibration rows for each operator; a short measurement for each kind of operator;
        a file, judged on all evaluation rows, for each number that is tried: as many as the fewest has doublings, twice
        at most.
Source  One-at-a-time sensitivity as in HAWQ (arXiv 1903.03696); its choice by loss and by latency as in HAWQ-V3
        (arXiv 2011.10680), here by a ratio and with both measured
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx as onnx_files
from torch import nn

from ..compress.quantize import sensitivity
from ..compress.quantize.sensitivity import Sensitivity
from ..errors import InputError
from ..export.artifact import Artifact
from ..export.backends import onnx
from ..models import metrics
from ..models.metrics import Quality
from ..models.workload import Progress, Workload
from ..plan import QuantizationPlan
from . import load
from .latency import share
from .measurement import Measurement

ROUNDS, SECONDS = 200, 3.0
"""How long each kind of operator is measured, at most."""
LEAST = 0.1
"""The least that an operator is believed to cost, as a share of the mean: less is noise."""


class Judged(Protocol):
    @property
    def quality(self) -> Quality: ...


Trial = TypeVar("Trial", bound=Judged)


@dataclass(frozen=True)
class Costs:
    """What each operator of a plan costs: in answers when it is quantized, and in time when it is not."""

    losses: Sensitivity
    milliseconds: dict[str, float]

    def order(self) -> list[str]:
        """The operators, that first which wins back most for each millisecond."""
        return self.losses.order(self.milliseconds)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self.losses), "milliseconds": self.milliseconds}

    @classmethod
    def from_json(cls, data: Any) -> Costs:
        return cls(Sensitivity(data["whole"], data["alone"], data["without"]), data["milliseconds"])


def costs(
    workload: Workload,
    plan: QuantizationPlan,
    original: Artifact,
    *,
    target: str,
    batch: int = 1,
    sequence: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> Costs:
    """The costs of the operators that ``plan`` quantizes, which is :func:`.sensitivity.uncorrected`; ``original`` is
    the float artifact of ``workload``."""
    losses = sensitivity.measure(workload, plan, seed=seed, progress=progress)
    where: dict[str, Any] = {"target": target, "batch": batch, "sequence": sequence}
    return Costs(losses, milliseconds(workload, plan, original, **where, progress=progress))


def milliseconds(
    workload: Workload,
    plan: QuantizationPlan,
    original: Artifact,
    *,
    target: str,
    batch: int = 1,
    sequence: int = 128,
    progress: Progress | None = None,
) -> dict[str, float]:
    """What each operator of ``plan`` takes longer in float than quantized, in ms on ``target``.

    Operators that are alike, such as all queries, are left in float at once, and what that costs, measured interleaved
    with the file in which nothing is, is shared out among them. Tables take bytes and no time worth measuring; so that
    they are not left in float for nothing, they are given the mean of the others.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in plan.weights:
        layer = workload.module.get_submodule(name)
        if not isinstance(layer, nn.Embedding):
            groups.setdefault((re.sub(r"\d+", "", name), *layer.get_parameter("weight").shape), []).append(name)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        manifest = onnx.in_form(original, "unfused-skip-layernorm").manifest

        def written(names: Sequence[str]) -> Artifact:
            place = Path(tempfile.mkdtemp(dir=folder))
            graph = onnx_files.load(original.model_file)
            onnx.quantize_graph(graph, sensitivity.keeping(replace(plan, state={}), names), place / manifest.model_file)
            return Artifact(place, manifest)

        whole = written([])
        for done, names in enumerate(groups.values()):
            if progress:
                progress(done, len(groups), "kinds of operators measured")
            first, other = _measured([whole, written(names)], target, batch, sequence)
            found |= dict.fromkeys(names, first.p50 * (share(first, other) - 1) / len(names))
    mean = max(sum(found.values()) / len(found), 1e-6)
    return {name: max(found.get(name, mean), LEAST * mean) for name in plan.weights}


def fewest(
    order: Sequence[str], attempt: Callable[[tuple[str, ...]], Trial], whole: Trial, max_drop: float
) -> tuple[tuple[str, ...], Trial]:
    """The fewest of ``order``, from its beginning, that must stay in float for a drop of at most ``max_drop``, and the
    ``attempt`` that has it.

    Where ``whole``, with none in float, does, it is that; where not even one quantized operator is allowed, the attempt
    with just the last one quantized, which drops too much.
    """
    if (whole.quality.drop or 0.0) <= max_drop:
        return (), whole
    tried: dict[int, Trial] = {}

    def inside(count: int) -> bool:
        tried[count] = attempt(tuple(order[:count]))
        return (tried[count].quality.drop or 0.0) <= max_drop

    count = min(sensitivity.fewest(len(order), inside), max(len(order) - 1, 1))
    kept = tuple(order[:count])
    return kept, tried[count] if count in tried else attempt(kept)


# ---- on its own


@dataclass(frozen=True)
class Candidate:
    artifact: Artifact
    quality: Quality


@dataclass(frozen=True)
class Mixed:
    """The outcome: which operators stay in float, and what was measured, interleaved, of the original in FP32, of the
    file in which none does, and of ``best``."""

    in_float: tuple[str, ...]
    count: int
    """Of operators that the scheme quantizes."""
    best: Candidate
    costs: Costs | None
    """None where nothing had to stay in float."""
    measured: tuple[Measurement, ...]
    """The original, all quantized and, where it is another one, the best."""

    def to_json(self) -> dict[str, Any]:
        known = self.costs.to_json() if self.costs else None
        return {"in_float": list(self.in_float), "operators": self.count, "costs": known}


def fit(
    workload: Workload,
    scheme: str,
    folder: Path,
    *,
    max_drop: float,
    target: str,
    batch: int = 1,
    sequence: int = 128,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress | None = None,
) -> Mixed:
    """``workload`` in ``scheme`` with the fewest operators in float that keep the drop within ``max_drop``.

    Every file that is tried stays in ``folder``. Raises InputError where there are no rows to judge it by.
    """
    if not len(workload.data.evaluation):
        raise InputError(f"{workload.name} can only be judged on rows: give them with --data.")
    metric, rows = workload.data.metric, workload.data.evaluation
    where: dict[str, Any] = {"target": target, "batch": batch, "sequence": sequence}
    labels = metrics.wanted(rows, metric)
    original = onnx.write(workload, QuantizationPlan("fp32"), folder / "original", name="original fp32")
    taken = min(onnx.FORMS, key=_paces(original, where).__getitem__)
    original = onnx.in_form(original, taken)
    before = _answers(original, workload, progress)

    def attempt(in_float: tuple[str, ...]) -> Candidate:
        if progress:
            progress(0, 0, f"writing with {len(in_float)} in float")
        plan = sensitivity.corrected(workload, rounding, in_float, seed=seed)
        title = f"{scheme}, {len(in_float)} in float" if in_float else f"{scheme}, all"
        written = onnx.write(workload, plan, folder / str(len(in_float)), name=title, base=original)
        judged = metrics.quality(metric, _answers(written, workload, progress), labels, original=before, seed=seed)
        say(f"{title}: {judged.drop or 0.0:.3g} of {metric} lost")
        return Candidate(written, judged)

    rounding = sensitivity.uncorrected(workload, scheme, seed=seed, progress=progress)
    whole, found = attempt(()), None
    order = list(rounding.weights)
    if (whole.quality.drop or 0.0) > max_drop:
        found = costs(workload, rounding, original, **where, seed=seed, progress=progress)
        order = found.order()
    in_float, best = fewest(order, attempt, whole, max_drop)
    candidates = [Candidate(original, metrics.quality(metric, before, labels, seed=seed)), whole]
    candidates += [best] if in_float else []
    timed = load.benchmark([one.artifact for one in candidates], **where, memory=False, progress=progress)
    measured = tuple(replace(item, quality=one.quality) for item, one in zip(timed, candidates, strict=True))
    return Mixed(in_float, len(order), best, found, measured)


def _answers(artifact: Artifact, workload: Workload, progress: Progress | None) -> Any:
    with onnx.open_session(artifact) as session:
        return metrics.session_answers(session.run, workload, progress=progress)


def _paces(original: Artifact, where: dict[str, Any]) -> dict[str, float]:
    """The median latency of each graph form."""
    taken = _measured([onnx.in_form(original, form) for form in onnx.FORMS], **where)
    return {form: float(np.median(one.samples)) for form, one in zip(onnx.FORMS, taken, strict=True)}


def _measured(artifacts: Sequence[Artifact], target: str, batch: int, sequence: int) -> list[Measurement]:
    return load.benchmark(
        artifacts,
        target=target,
        batch=batch,
        sequence=sequence,
        min_queries=ROUNDS,
        min_seconds=SECONDS,
        memory=False,
    )
