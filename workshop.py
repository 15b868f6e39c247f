"""The workshop of a run: it makes variants, each a stage in the run's folder, and has the gate judge them.

What the gate refuses for its quality is mended where the recipe allows it: trained with rounding in the loop, else with
the fewest operators in float.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import __version__
from .benchmarks import compare, environment, load, mixed
from .benchmarks.targets import Target
from .compress import quantize as quantizers
from .compress.quantize import sensitivity
from .compress.quantize.distilled import distilled
from .errors import ParityError, UnavailableError
from .export import artifact as artifacts
from .export import backends
from .export.artifact import Artifact
from .export.backends import onnx
from .gate import Constraint, Standing, gate
from .models import metrics
from .models.measures import told
from .models.metrics import Quality
from .models.workload import Progress, Workload
from .plan import PruningPlan, QuantizationPlan
from .recipe import Recipe
from .stages import Display, Stages


@dataclass(frozen=True)
class Pruned:
    """How a variant was pruned: checkpoint, plan, what a fit to a speed found, and the trace of the recovery."""

    checkpoint: Path
    plan: PruningPlan
    speed: Mapping[str, Any] | None
    trace: Mapping[str, Any]


@dataclass(frozen=True)
class Broken:
    """A scheme whose file does not compute what it should with all operators quantized."""

    key: str
    scheme: str
    title: str
    error: ParityError


@dataclass(frozen=True)
class Variant:
    """An artifact with its quality; ``key`` addresses the stage that made it."""

    key: str
    artifact: Artifact
    quality: Quality
    title: str
    pruned: Pruned | None = None

    @property
    def scheme(self) -> str:
        return self.artifact.precision


class Workshop:
    """What makes and judges the variants of one run: its folder, its workload, and what its gate has decided so far."""

    def __init__(self, out: Path, recipe: Recipe, workload: Workload, show: Display, target: Target) -> None:
        self.out, self.recipe, self.workload, self.show = out, recipe, workload, show
        self.target, self.backend = str(target), backends.get(target.runtime)
        shape = {"batch": recipe.measure.batch, "sequence": recipe.measure.sequence}
        self.where: dict[str, Any] = {"target": self.target, **shape}
        self.threads = environment.usable_cpus() if target.address else target.threads  # of this machine, for judging
        self.constraint: Constraint = recipe.limits.constraint()
        self.kept: list[dict[str, Any]] = []
        self.refused: list[dict[str, Any]] = []
        self.mixed: list[dict[str, Any]] = []
        facts = {"edgepress": __version__, "workload": workload.fingerprint(), "seed": recipe.seed}
        self.stages = Stages(out, facts, show)

    # ---- variants

    def baseline(self) -> Variant:
        """The original in FP32, in the graph form that is fastest on the target."""
        depends = {"target": self.target, "shape": [self.recipe.measure.batch, self.recipe.measure.sequence]}
        return self._artifact("baseline", "original fp32", self.workload, "fp32", depends, None)

    def _artifact(  # noqa: PLR0917
        self,
        name: str,
        title: str,
        workload: Workload,
        scheme: str,
        depends: Mapping[str, Any],
        base: Variant | None,
        planned: Callable[[Progress], tuple[Workload, QuantizationPlan]] | None = None,
    ) -> Variant:
        """Export in a scheme, by its own plan or what is ``planned``, choose the graph form by measuring, judge the
        quality through the file."""

        def make(place: Path, progress: Progress) -> dict[str, Any]:
            if planned:
                source, plan = planned(progress)
            else:
                source = workload
                plan = self._plan(workload, scheme) if scheme != "fp32" else QuantizationPlan("fp32")
            progress(0, 0, "exporting")
            usable = base and base.artifact.precision == "fp32" and base.artifact.manifest.runtime == "onnx"
            float_graph = base.artifact if base and usable and scheme != "fp32" else None
            written = self.backend.write(source, plan, place / "artifact", name=title, base=float_graph)
            if self.backend is onnx:
                written = self._fastest_form(written, progress)
            with self.backend.open_session(written, threads=self.threads) as session:
                answers = metrics.session_answers(session.run, self.workload, progress=progress)
            metrics.save_answers(place / "answers.npz", answers)
            original = None if name == "baseline" else metrics.read_answers(self._baseline_folder / "answers.npz")
            metric = self.workload.data.metric
            labels = metrics.wanted(self.workload.data.evaluation, metric)
            judged = metrics.quality(metric, answers, labels, original=original, seed=self.recipe.seed)
            return {"quality": asdict(judged)}

        facts = {**depends, "scheme": scheme, "title": title, "base": base.key if base else None}
        if scheme != "fp32" and self._rotates:
            facts["rotate"] = True
        key, folder, result = self.stages.run(name, facts, make)
        if name == "baseline":
            self._baseline_folder = folder
        return Variant(key, artifacts.open_artifact(folder / "artifact"), Quality(**result["quality"]), title)

    @property
    def _rotates(self) -> bool:
        return bool(self.recipe.quantize and self.recipe.quantize.rotate)

    def _plan(self, workload: Workload, scheme: str) -> QuantizationPlan:
        return quantizers.quantize(workload, scheme, rotate=self._rotates, seed=self.recipe.seed, say=self.show.say)

    def _proven(self, name: str, title: str, workload: Workload, scheme: str, base: Variant) -> Variant | Broken:
        """The artifact in a scheme; one that computes something else is refused here, and the run goes on."""
        try:
            return self._artifact(name, title, workload, scheme, {}, base)
        except ParityError as error:
            self._refuse(name, title, str(error))
            facts = {"base": base.key, "title": title, "rotate": self._rotates}
            return Broken(self.stages.key(name, facts), scheme, title, error)

    def _refuse(self, stage: str, variant: str, reason: str, speedup: Any = None) -> None:
        """Refuse what there is no file to measure of."""
        self.refused.append({"stage": stage, "variant": variant, "reason": reason, "drop": None, "speedup": speedup})
        self.show.say(f"{variant}: refused, {reason}")

    def _fastest_form(self, written: Artifact, progress: Progress) -> Artifact:
        candidates = [onnx.in_form(written, form) for form in onnx.FORMS]
        best = load.fastest(candidates, **self.where, progress=progress)
        return Artifact(written.folder, artifacts.seal(written.folder, candidates[best].manifest, {}))

    # ---- the gate

    def judge(self, stage: str, before: Variant, after: Variant) -> bool:
        """Measure the two interleaved and let the gate decide; the decision is a stage of its own, so it stays."""

        def make(_: Path, progress: Progress) -> dict[str, Any]:
            first, second = load.quick([before.artifact, after.artifact], **self.where, progress=progress)
            faster = compare.speedup(first, second)
            kept, reason = gate(
                Standing(before.title, before.quality, before.artifact.size_bytes, None),
                Standing(after.title, after.quality, after.artifact.size_bytes, faster),
                self.constraint,
            )
            figures = {"drop": after.quality.drop, "speedup": faster.to_json()}
            return {"kept": kept, "entry": {"stage": stage, "variant": after.title, "reason": reason, **figures}}

        depends = {"before": before.key, "after": after.key, "limits": self.recipe.limits.model_dump()}
        _, _, result = self.stages.run(f"gate-{stage}", depends, make)
        (self.kept if result["kept"] else self.refused).append(result["entry"])
        word = "kept" if result["kept"] else "refused"
        self.show.say(f"{after.title}: {word}, {result['entry']['reason']}")
        return bool(result["kept"])

    def _fastest(self, variants: list[Variant]) -> Variant | None:
        """The fastest of several, measured interleaved; a stage, so that a run that goes on takes the same."""

        def make(_: Path, progress: Progress) -> dict[str, Any]:
            timed = [variant.artifact for variant in variants]
            return {"fastest": load.fastest(timed, **self.where, progress=progress)}

        if len(variants) < 2:
            return variants[0] if variants else None
        _, _, result = self.stages.run("scheme", {"variants": [variant.key for variant in variants]}, make)
        return variants[int(result["fastest"])]

    # ---- quantized, and mended where that is refused

    def _quantized(self, name: str, scheme: str, title: str, workload: Workload, base: Variant) -> Variant | None:
        """``base``, which is in float, in a scheme; None where the gate refuses it."""
        whole = self._proven(name, title, workload, scheme, base)
        kept = isinstance(whole, Variant) and self.judge(name, base, whole)
        return whole if isinstance(whole, Variant) and kept else self._mended(name, whole, workload, base)

    def _mended(self, name: str, whole: Variant | Broken, workload: Workload, base: Variant) -> Variant | None:
        """``whole``, which is refused, trained with rounding in the loop, else with some operators in float."""
        return self._distilled(name, whole, workload, base) or self._mixed(name, whole, workload, base)

    def _distilled(self, name: str, whole: Variant | Broken, workload: Workload, base: Variant) -> Variant | None:
        """None where the gate refuses that too, or the recipe or the scheme knows no such thing."""
        scheme, options = whole.scheme, self.recipe.quantize
        if not (options and options.steps and scheme in sensitivity.SCHEMES and self._too_coarse(whole)):
            return None
        facts = {"whole": whole.key, "steps": options.steps}
        name, unfinished = f"distilled-{name}", self.out / "unfinished"
        state = unfinished / f"{name}-{self.stages.key(name, facts)}.safetensors"

        def train(progress: Progress) -> tuple[Workload, QuantizationPlan]:
            found = distilled(
                workload,
                self._plan(workload, scheme),
                original=self.workload,
                steps=options.steps,
                checkpoint=state,
                seed=self.recipe.seed,
                progress=progress,
            )
            return found.workload, found.plan

        title = f"{whole.title}, distilled"
        variant = None
        try:
            variant = self._artifact(name, title, workload, scheme, facts, None, train)
        except UnavailableError as error:
            self.show.say(str(error))
        except ParityError as error:
            self._refuse(name, title, str(error))
        shutil.rmtree(unfinished, ignore_errors=True)  # a run that is killed goes on from it
        return variant if variant and self.judge(name, base, variant) else None

    def _too_coarse(self, whole: Variant | Broken) -> bool:
        """Whether ``whole`` was refused for its quality alone, or for its answers."""
        if isinstance(whole, Broken):
            return True
        entry = next(one for one in reversed(self.refused) if one["variant"] == whole.title)
        return (whole.quality.drop or 0.0) > self.constraint.max_drop and entry["speedup"]["verdict"] == "faster"

    def _mixed(self, name: str, whole: Variant | Broken, workload: Workload, base: Variant) -> Variant | None:
        """``whole``, which is refused, with the fewest operators in float that keep within the drop; None where the
        gate refuses that too, or the recipe or the scheme knows no such thing. Every number tried is a stage."""
        scheme, allowed = whole.scheme, self.constraint.max_drop
        options = self.recipe.quantize
        if not (options and options.mixed) or scheme not in sensitivity.SCHEMES or self.backend is not onnx:
            return None  # what an operator in float costs is measured in ONNX Runtime alone
        if not self._too_coarse(whole):
            return None
        where, seed = self.where, self.recipe.seed
        rounding = cache(lambda: sensitivity.uncorrected(workload, scheme, rotate=self._rotates, seed=seed))

        def measured(_: Path, progress: Progress) -> dict[str, Any]:
            found = mixed.costs(workload, rounding(), base.artifact, **where, seed=seed, progress=progress)
            return found.to_json()

        def weigh() -> mixed.Costs:
            facts = {**where, "whole": whole.key, "base": base.key}
            _, _, result = self.stages.run(f"sensitivity-{name}", facts, measured)
            return mixed.Costs.from_json(result)

        def attempt(in_float: tuple[str, ...]) -> Variant:
            if not in_float:
                if isinstance(whole, Broken):
                    raise whole.error
                return whole
            title = f"{whole.title}, {len(in_float)} in float"
            made = self._artifact(
                f"mixed-{name}-{len(in_float)}",
                title,
                workload,
                scheme,
                {"whole": whole.key, "in_float": in_float},
                base,
                lambda _: (workload, sensitivity.corrected(workload, rounding(), in_float, seed=seed)),
            )
            self.show.say(f"{title}: {told(made.quality.metric, made.quality.drop or 0.0)}")
            return made

        try:
            found = mixed.search(attempt, weigh, allowed)
        except UnavailableError as error:
            self.show.say(str(error))
            return None
        except ParityError as error:
            self._refuse(f"mixed-{name}", f"{whole.title}, mixed", str(error))
            return None
        if not self.judge(f"mixed-{name}", base, found.best):
            entry = self.refused[-1]
            entry["reason"] += f"; operators left in float: {found.tried}"
            return None
        assert found.costs is not None
        self.mixed.append({"variant": found.best.title, "in_float": list(found.in_float), **found.costs.to_json()})
        return found.best
