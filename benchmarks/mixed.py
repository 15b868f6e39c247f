"""Mixed precision: the operators that stay in float so that the rest may be quantized, chosen by what each costs the
target.

What    Of all operators that a scheme quantizes those that win back most for each millisecond that they take longer in
        float; the fewest of them with which the drop, judged through the written file, keeps within what is allowed.
When    A scheme is fast enough, but loses too much, or its file computes something else: a few operators are mostly to
        blame.
Cost    Two forward passes of some calibration rows for each operator; a short measurement for each kind of operator;
        a file, judged on all evaluation rows, for each number that is tried: as many as the fewest has doublings, twice
        at most.
Source  One-at-a-time sensitivity as in HAWQ (arXiv 1903.03696); its choice by loss and by latency as in HAWQ-V3
        (arXiv 2011.10680), here by a ratio and with both measured
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import onnx as onnx_files
from torch import nn

from ..compress.quantize import sensitivity
from ..compress.quantize.sensitivity import Sensitivity
from ..errors import InputError, ParityError
from ..export.artifact import Artifact
from ..export.backends import onnx
from ..models import metrics
from ..models.measures import told
from ..models.metrics import Quality
from ..models.workload import Progress, Workload
from ..plan import QuantizationPlan
from . import load
from .compare import share
from .measurement import Measurement

SECONDS = 3.0
"""How long each kind of operator is measured, at most."""
LEAST = 0.1
"""The least that an operator is believed to cost, as a share of the mean: less is noise."""


FAILED = Quality("parity", 0.0, 0.0, 0.0, 0, drop=float("inf"))
"""Of a file that does not compute what it should: more than any drop that may be allowed."""


class Judged(Protocol):
    @property
    def quality(self) -> Quality | None: ...


Trial = TypeVar("Trial", bound=Judged)


@dataclass(frozen=True)
class Costs:
    """What each operator of a plan costs: in answers when it is quantized, and in time when it is not."""

    losses: Sensitivity
    milliseconds: dict[str, float]
    """Empty where they do not matter."""

    def order(self) -> list[str]:
        """The operators, that first which wins back most for each millisecond."""
        return self.losses.order(self.milliseconds or None)

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
    where: dict[str, Any] = {"target": target, "batch": batch, "sequence": sequence}
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
            first, other = load.quick([whole, written(names)], **where, seconds=SECONDS)
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
    if _drop(whole) <= max_drop:
        return (), whole
    tried: dict[int, Trial] = {}

    def inside(count: int) -> bool:
        tried[count] = attempt(tuple(order[:count]))
        return _drop(tried[count]) <= max_drop

    count = min(sensitivity.fewest(len(order), inside), max(len(order) - 1, 1))
    kept = tuple(order[:count])
    return kept, tried[count] if count in tried else attempt(kept)


def _drop(trial: Judged) -> float:
    return (trial.quality.drop if trial.quality else None) or 0.0


@dataclass(frozen=True)
class _Failed:
    """An attempt whose file does not compute what it should: worse than any that does."""

    error: ParityError
    quality: Quality = FAILED


@dataclass(frozen=True)
class Found(Generic[Trial]):
    """Which operators stay in float, and the attempt that leaves them there: the first within what is allowed, or the
    last of those that were tried."""

    in_float: tuple[str, ...]
    best: Trial
    costs: Costs | None
    """None where nothing had to stay in float."""
    tried: str
    """What each number of operators in float came to, in words."""


def search(
    attempt: Callable[[tuple[str, ...]], Trial], weigh: Callable[[], Costs], max_drop: float | None = None
) -> Found[Trial]:
    """The fewest operators in float with which an ``attempt`` is proven, raising no ParityError, and drops at most
    ``max_drop`` where one is given.

    None of them is what is attempted first; only where that fails the costs of all are asked for. Raises ParityError,
    which names what was tried, where no attempt is proven.
    """
    tried: dict[int, Trial | _Failed] = {}

    def proven(in_float: tuple[str, ...]) -> Trial | _Failed:
        try:
            tried[len(in_float)] = attempt(in_float)
        except ParityError as error:
            tried[len(in_float)] = _Failed(error)
        return tried[len(in_float)]

    limit, whole = sys.float_info.max if max_drop is None else max_drop, proven(())
    costs = None if _drop(whole) <= limit else weigh()
    in_float, best = fewest(costs.order() if costs else (), proven, whole, limit)
    words = ", ".join(f"{count or 'none'} ({_came_to(trial)})" for count, trial in sorted(tried.items()))
    if isinstance(best, _Failed):
        raise ParityError(f"{best.error} No mix with float is proven either; operators left in float: {words}.")
    return Found(in_float, best, costs, words)


def _came_to(trial: Judged) -> str:
    if isinstance(trial, _Failed):
        return "another function"
    return told(trial.quality.metric, _drop(trial)) if trial.quality else "proven"


# ---- on its own


@dataclass(frozen=True)
class Candidate:
    artifact: Artifact
    quality: Quality | None = None


@dataclass(frozen=True)
class Mixed:
    """The outcome: which operators stay in float, and what was measured, interleaved, of the original in FP32, of the
    file in which none does, and of ``best``."""

    found: Found[Candidate]
    count: int
    """Of operators that the scheme quantizes."""
    measured: tuple[Measurement, ...]
    """The original, all quantized where that is proven and, where it is another one, the best."""

    def to_json(self) -> dict[str, Any]:
        known = self.found.costs.to_json() if self.found.costs else None
        return {"in_float": list(self.found.in_float), "operators": self.count, "costs": known}


def fit(
    workload: Workload,
    scheme: str,
    folder: Path,
    *,
    max_drop: float,
    target: str,
    batch: int = 1,
    sequence: int = 128,
    rotate: bool = False,
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
    forms = [onnx.in_form(original, form) for form in onnx.FORMS]
    original = forms[load.fastest(forms, **where, seconds=SECONDS)]
    before = _answers(original, workload, progress)

    rounding = sensitivity.uncorrected(workload, scheme, rotate=rotate, seed=seed, progress=progress)
    made: dict[int, Candidate] = {}

    def attempt(in_float: tuple[str, ...]) -> Candidate:
        count = len(in_float)
        if progress:
            progress(0, 0, f"writing with {count} in float")
        plan = sensitivity.corrected(workload, rounding, in_float, seed=seed)
        title = f"{scheme}, {count} in float" if in_float else f"{scheme}, all"
        written = onnx.write(workload, plan, folder / str(count), name=title, base=original)
        judged = metrics.quality(metric, _answers(written, workload, progress), labels, original=before, seed=seed)
        say(f"{title}: {judged.drop or 0.0:.3g} of {metric} lost")
        made[count] = Candidate(written, judged)
        return made[count]

    def weigh() -> Costs:
        return costs(workload, rounding, original, **where, seed=seed, progress=progress)

    found = search(attempt, weigh, max_drop)
    candidates = [Candidate(original, metrics.quality(metric, before, labels, seed=seed))]
    candidates += [made[count] for count in dict.fromkeys((0, len(found.in_float))) if count in made]
    timed = load.benchmark([one.artifact for one in candidates], **where, memory=False, progress=progress)
    measured = tuple(replace(item, quality=one.quality) for item, one in zip(timed, candidates, strict=True))
    return Mixed(found, len(rounding.weights), measured)


def proven(
    workload: Workload,
    plan: QuantizationPlan,
    write: Callable[[QuantizationPlan], Artifact],
    *,
    rotate: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress | None = None,
) -> Artifact:
    """What ``write`` makes of ``plan`` or, where that is refused for it computes something else, of one with the fewest
    operators in float that is not: those of the worst answers first, as there is no target to measure on.

    Raises ParityError where there are no rows to find these by, where it cannot be tried one operator at a time, and
    where no mix is proven.
    """
    try:
        return write(plan)
    except ParityError as error:
        failed = error
    if plan.scheme not in sensitivity.SCHEMES:
        raise failed
    if not len(workload.data.calibration):
        raise ParityError(f"{failed} Which operators must stay in float is tried on rows: give them with --data.")
    say(f"{failed} A mix with float is tried.")
    rounding = sensitivity.uncorrected(workload, plan.scheme, rotate=rotate, seed=seed, progress=progress)

    def attempt(in_float: tuple[str, ...]) -> Candidate:
        if not in_float:
            raise failed
        return Candidate(write(sensitivity.corrected(workload, rounding, in_float, seed=seed)))

    found = search(attempt, lambda: Costs(sensitivity.measure(workload, rounding, seed=seed, progress=progress), {}))
    say(f"in float: {', '.join(found.in_float)}")
    return found.best.artifact


def _answers(artifact: Artifact, workload: Workload, progress: Progress | None) -> Any:
    with onnx.open_session(artifact) as session:
        return metrics.session_answers(session.run, workload, progress=progress)
