"""The main job: from a recipe to a measured artifact, stage by stage, each stage kept only where it pays.

load → baseline → score → (prune → recover → quantize) for each level until one meets the constraint → measure
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .benchmarks import compare, environment, examples, latency, load, speed, targets
from .benchmarks.measurement import Measurement
from .benchmarks.report import write_report
from .benchmarks.targets import Target
from .compress import quantize as quantizers
from .compress import score as scorers
from .compress.prune import predicted
from .compress.prune.allocate import by_ratio
from .compress.prune.budget import choices
from .compress.prune.reconstruct import reconstruct
from .compress.recover import recover
from .errors import InputError, UsageError
from .export import backends
from .files import new_folder, write_text
from .gate import choose, unmet
from .models import checkpoint, metrics, surgery
from .models import workload as workloads
from .models.metrics import Quality
from .models.workload import Progress, Workload
from .plan import PruningPlan
from .recipe import Level, Recipe
from .stages import Display, Silent, at_work, claimed
from .workshop import Pruned, Variant, Workshop

SPEEDS = (3.0, 2.0, 1.5)
"""What pruning is asked to gain, in turn, where the constraint asks for no speed."""

MARGINS = (1.02, 1.1, 1.25)
"""And where it does, beyond what is wanting: a speed can turn out a little less when it is measured again."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to; ``unmet`` lists what of the constraint the best result does not meet."""

    run: Path
    original: dict[str, Any]
    results: list[dict[str, Any]]
    chosen: str | None
    refused: list[dict[str, Any]]
    unmet: list[str]

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("original", "results", "chosen", "refused")}


def compress(recipe: Recipe, out: Path, *, resume: bool = False, display: Display | None = None) -> Outcome:
    """Run ``recipe`` in the folder ``out``, and leave there the artifact, the measurements and the report.

    Stages that are finished in ``out`` are used again; the last measurement too, if ``resume``. Raises the errors of
    errors.py for input that cannot be used, before anything is computed where that is possible; so is another run at
    work in ``out``.
    """
    target = targets.to_write_for(recipe.target)
    scorers.get(recipe.score.method)
    for scheme in recipe.quantize.tried(target.runtime) if recipe.quantize else ():
        quantizers.get(scheme)
        backends.writing(scheme, target.runtime)
    show = display or Silent()
    with at_work(out), targets.connect(target, target.runtime) as (_, target):  # one for all that is measured
        with claimed(out, recipe):
            workload = workloads.load(
                recipe.model,
                recipe.data,
                columns=recipe.columns,
                seed=recipe.seed,
                max_length=recipe.max_length,
                trust_remote_code=recipe.trust_remote_code,
                progress=show.progress("load"),
            ).judged_by(recipe.metric)
            workload = metrics.for_artifacts(workload)
            if not len(workload.data.evaluation):
                raise InputError(f"{recipe.model} can only be judged on rows: give them with --data.")
        if "input_ids" in workload.example and recipe.measure.sequence > workload.max_length:
            raise UsageError(
                f"Sequence {recipe.measure.sequence} is longer than the model's {workload.max_length} tokens."
            )
        run = _Run(out, recipe, workload, show, target)
        outcome = run.finish(run.search(), resume=resume)
        write_report(out)
        return outcome


class _Run(Workshop):
    """One run: what it tries in turn, and what it has found out of the original so far."""

    def __init__(self, out: Path, recipe: Recipe, workload: Workload, show: Display, target: Target) -> None:
        super().__init__(out, recipe, workload, show, target)
        self.trace: Mapping[str, Any] = {}
        self.scores: scorers.Scores | None = None
        self.losses: predicted.Predicted | None = None
        self.schemes = recipe.quantize.tried(target.runtime) if recipe.quantize else ()
        self.precision = "fp32"

    # ---- the search

    def search(self) -> list[Variant]:
        """The original and every variant that is worth a row of the final table, the best last."""
        original = self.baseline()
        _check_sane(original.quality, self.workload)
        variants = [original]
        wholes = [self._proven(name, f"{name} only", self.workload, name, original) for name in self.schemes]
        made = [variant for variant in wholes if isinstance(variant, Variant)]
        whole = self._fastest([variant for variant in made if self.judge(variant.scheme, original, variant)])
        if wholes and not whole:
            best = min(made, key=lambda variant: variant.quality.drop or 0.0) if made else wholes[0]
            whole = self._mended(best.scheme, best, self.workload, original)
        if whole:
            variants.append(whole)
            self.precision = whole.artifact.precision
        for number, level in enumerate(self._levels(original, variants[-1]), 1):
            found = self._level(number, level, original)
            variants += found
            if found and self._meets(number, original, found[-1]):
                break
            if not found and self.constraint.asks_for_speed and self._lost_too_much():
                break  # the next is to be faster still, and would lose more
        return variants

    def _lost_too_much(self) -> bool:
        """Whether what was refused last was refused for its quality."""
        return (self.refused[-1]["drop"] or 0.0) > self.constraint.max_drop

    def _levels(self, original: Variant, best: Variant) -> list[Level]:
        """The levels to try, in turn: the recipe's, else such as meet the constraint.

        Where a speed is asked for they gain what ``best``, which is not pruned, leaves wanting; the first gains half of
        it (of the factor's logarithm), so that there is something to show where the whole costs too much.
        """
        given, limits, structure = self.recipe.levels, self.constraint, self.workload.structure

        def fitting(_: Path, progress: Progress) -> dict[str, Any]:
            first, second = load.quick([original.artifact, best.artifact], **self.where, progress=progress)
            by_ratio = (limits.min_speedup or 0) / compare.speedup(first, second).value
            wanting = max(by_ratio, second.p50 / (limits.max_latency_ms or np.inf))
            return {"speedups": [wanting**0.5, *(wanting * more for more in MARGINS)] if wanting > 1 else []}

        if given is None and limits.asks_for_speed:
            depends = {"original": original.key, "best": best.key, "limits": self.recipe.limits.model_dump()}
            _, _, result = self.stages.run("levels", depends, fitting)
            given = tuple(Level(speedup=one) for one in result["speedups"])
        elif given is None:
            given = tuple(Level(speedup=one) for one in SPEEDS)
        elif limits.asks_for_speed:
            given = given[::-1]
        return [level for level in given if (choices(structure) if level.speedup else level.shares(structure.kinds))]

    def _meets(self, number: int, original: Variant, last: Variant) -> bool:
        """Whether no further level is wanted; a stage, so that a run that goes on tries the same levels."""
        limits = self.constraint

        def make(_: Path, progress: Progress) -> dict[str, Any]:
            first, second = load.quick([original.artifact, last.artifact], **self.where, progress=progress)
            faster = compare.speedup(first, second).value
            return {"unmet": unmet(limits, second.p50, faster, last.artifact.size_bytes)}

        if not limits.asks_for_speed and limits.max_size_bytes is None:
            return True
        depends = {"original": original.key, "last": last.key, "limits": self.recipe.limits.model_dump()}
        _, _, result = self.stages.run(f"meets-{number}", depends, make)
        return not result["unmet"]

    def _scores(self) -> scorers.Scores:
        options = self.recipe.score

        def make(place: Path, progress: Progress) -> dict[str, Any]:
            scores = scorers.score(
                self.workload, options.method, rows=options.rows, seed=self.recipe.seed, progress=progress
            )
            np.save(place / "scores.npy", scores.values.numpy(), allow_pickle=False)
            return {}

        if self.scores is None:
            _, folder, _ = self.stages.run("score", options.model_dump(), make)
            values = torch.from_numpy(np.load(folder / "scores.npy", allow_pickle=False))
            self.scores = scorers.Scores(options.method, self.workload.structure, values)
        return self.scores

    def _losses(self) -> predicted.Predicted:
        values, structure = self._scores().values, self.workload.structure

        def make(place: Path, progress: Progress) -> dict[str, Any]:
            told = predicted.predict(self.workload, values, seed=self.recipe.seed, progress=progress)
            told.save(place / "losses.npz")
            return {}

        if self.losses is None:
            _, folder, _ = self.stages.run("losses", self.recipe.score.model_dump(), make)
            self.losses = predicted.read(folder / "losses.npz", structure)
        return self.losses

    def _fitted(self, wanted: float, progress: Progress) -> speed.Fitted:
        """The plan that loses least at a speed, in the precision that is deployed."""
        measure = self.recipe.measure
        table = latency.measure(
            self.workload,
            target=self.target,
            batch=measure.batch,
            sequence=measure.sequence,
            precision=self.precision,
            progress=progress,
            say=self.show.say,
        )
        return speed.fit(self.workload, table, self._losses(), speedup=wanted, say=self.show.say, progress=progress)

    def _level(self, number: int, level: Level, original: Variant) -> list[Variant]:
        """Prune, recover, export and quantize at one level; what the gate keeps of it."""
        options, wanted = self.recipe.recover, level.speedup
        scores, shares = self._scores(), level.shares(self.workload.structure.kinds)
        facts: dict[str, Any] = {"level": shares, "score": self.recipe.score.model_dump()}
        if wanted:
            where = {"target": self.target, "precision": self.precision, "measure": self.recipe.measure.model_dump()}
            facts |= {"level": {"speedup": wanted}, "where": where}
            self._losses()
            self.show.say(f"level {number}: pruned to {wanted:.2f}x in {self.precision}")
        else:
            gone = ", ".join(f"{kind} -{share:.0%}" for kind, share in shares.items())
            self.show.say(f"level {number}: pruned {gone}")

        def cut(place: Path, progress: Progress) -> dict[str, Any]:
            fitted = self._fitted(wanted, progress) if wanted else None
            plan = fitted.plan if fitted else by_ratio(self.workload.structure, scores.values, shares)
            pruned = surgery.prune(self.workload, plan)
            if options.reconstruct:
                pruned = reconstruct(self.workload, pruned, seed=self.recipe.seed, in_place=True, progress=progress)
            checkpoint.save(pruned, place / "checkpoint")
            return {"speed": fitted.to_json() if fitted else None}

        _, folder, result = self.stages.run(f"prune-{number}", {**facts, "reconstruct": options.reconstruct}, cut)
        fitted_to = result["speed"]
        pruned = self._read(folder / "checkpoint")
        if fitted_to and pruned.plan == self.workload.plan:
            self._nothing_gained(number, fitted_to)
            return []
        facts["recover"] = options.model_dump()
        if options.steps:
            folder = self._recovered(number, facts, pruned)
            pruned = self._read(folder / "checkpoint")
        name = f"export-{number}"
        small = self._artifact(name, f"pruned {number} fp32", pruned, "fp32", facts, original)
        if not self.judge(name, original, small):
            return []
        found = [small]
        if self.precision != "fp32":
            title = f"pruned {number} {self.precision}"
            quantized = self._quantized(f"quantize-{number}", self.precision, title, pruned, small)
            found += [quantized] if quantized else []
        how = Pruned(folder / "checkpoint", pruned.plan, fitted_to, self.trace)
        return [replace(variant, pruned=how) for variant in found]

    def _recovered(self, number: int, facts: Mapping[str, Any], pruned: Workload) -> Path:
        """The folder of the stage that trains ``pruned``; a killed one goes on from its last state."""
        name, unfinished = f"recover-{number}", self.out / "unfinished"
        state = unfinished / f"{name}-{self.stages.key(name, facts)}.safetensors"

        def train(place: Path, progress: Progress) -> dict[str, Any]:
            recovered = recover(
                pruned,
                self.workload,
                **self.recipe.recover.model_dump(exclude={"reconstruct"}),
                checkpoint=state,
                seed=self.recipe.seed,
                progress=progress,
            )
            checkpoint.save(recovered.workload, place / "checkpoint")
            return {"trace": recovered.trace, "layers": recovered.layers}

        _, folder, result = self.stages.run(name, facts, train)
        shutil.rmtree(unfinished, ignore_errors=True)
        self.trace = {"recover": result["trace"], "layers": result["layers"]}
        return folder

    def _nothing_gained(self, number: int, speed: Mapping[str, Any]) -> None:
        """Refuse a level at which nothing goes: whatever would, costs the target no time."""
        reason = f"no removal makes it {speed['wanted']:.2f}x faster, nor faster at all"
        self._refuse(f"prune-{number}", f"pruned {number}", reason, speed["speedup"])

    def _read(self, folder: Path) -> Workload:
        skeleton = self.workload.skeleton
        function, trusted = skeleton.architecture if skeleton.is_function else "", self.recipe.trust_remote_code
        return checkpoint.read(folder, self.workload.data, function, trust_remote_code=trusted)

    # ---- the end

    def finish(self, variants: list[Variant], *, resume: bool) -> Outcome:
        """Measure all variants interleaved, and write artifact, measurements and summary."""
        path = self.out / "measurements.jsonl"
        keys = [variant.key for variant in variants]
        depends = {"variants": keys, "measure": self.recipe.measure.model_dump(), "target": self.target}
        if not resume:
            self.stages.forget("measure")

        def make(place: Path, progress: Progress) -> dict[str, Any]:
            taken = load.benchmark(
                [variant.artifact for variant in variants],
                **self.where,
                min_queries=self.recipe.measure.min_queries,
                min_seconds=self.recipe.measure.min_seconds,
                energy=True,
                progress=progress,
            )
            lines = [json.dumps(replace(m, quality=v.quality).to_json()) for m, v in zip(taken, variants, strict=True)]
            (place / path.name).write_text("\n".join(lines) + "\n", encoding="utf-8")
            return {}

        _, folder, _ = self.stages.run("measure", depends, make)
        text = (folder / path.name).read_text(encoding="utf-8")
        measured = [Measurement.from_json(json.loads(line)) for line in text.splitlines()]
        measured = [
            replace(m, artifact=str(v.artifact.folder.relative_to(self.out)))
            for m, v in zip(measured, variants, strict=True)
        ]
        rows = compare.rows(measured)
        best, missing = choose(self.constraint, measured)
        chosen = rows[best]["name"] if best else None
        shutil.rmtree(self.out / examples.FOLDER, ignore_errors=True)  # of another run's choice
        with new_folder(self.out / "artifact", ours=True) as place:
            shutil.copytree(variants[best].artifact.folder, place, dirs_exist_ok=True)
        write_text(path, "".join(json.dumps(m.to_json()) + "\n" for m in measured))
        outcome = Outcome(self.out, rows[0], rows[1:], chosen, self.refused, missing)
        summary = self._summary(outcome, measured, variants[best])
        write_text(self.out / "summary.json", json.dumps(summary, indent=1) + "\n")
        self._examples(variants[0], variants[best])  # the run is finished, whatever becomes of its pictures
        return outcome

    def _examples(self, original: Variant, best: Variant) -> None:
        """Keep in the run which predictions changed, and where heads look, for its report."""
        pruned = best.pruned

        def make(folder: Path, progress: Progress) -> dict[str, Any]:
            progress(0, 0, "changed predictions, attention")
            before, after = (metrics.read_answers(v.artifact.folder.parent / "answers.npz") for v in (original, best))
            left = self._read(pruned.checkpoint) if pruned else None
            plan = pruned.plan if pruned else PruningPlan()
            examples.write(folder, self.workload, left, plan, before, after)
            return {}

        if best is original:
            return
        _, folder, _ = self.stages.run("examples", {"original": original.key, "best": best.key}, make)
        with new_folder(self.out / examples.FOLDER, ours=True) as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("result.json"))

    def _summary(self, outcome: Outcome, measured: list[Measurement], best: Variant) -> dict[str, Any]:
        data, structure = self.workload.data, self.workload.structure
        doubts = environment.warnings(measured[0].environment)
        for item in measured:
            doubts += [f"{item.name}: {sign}" for sign in environment.unsteady(item.samples)]
        pruned, scores = best.pruned, self.scores
        return {
            "name": self.workload.name,
            "origin": self.workload.origin,
            "target": self.target,
            "constraint": self.recipe.limits.model_dump(),
            **outcome.to_json(),
            "unmet": outcome.unmet,
            "kept": self.kept,
            "structure": [{"kind": s.kind, "layer": s.layer, "count": s.count} for s in structure.sites],
            "removed": pruned.plan.to_json() if pruned else {},
            "scores": {"method": scores.method, "values": {k: scores.of(k) for k in structure.kinds}}
            if scores
            else None,
            "mixed": self.mixed,
            "speed": pruned.speed if pruned else None,
            "trace": pruned.trace if pruned else self.trace,
            "data": {
                "train": len(data.train),
                "calibration": len(data.calibration),
                "evaluation": len(data.evaluation),
                "labels": list(self.workload.skeleton.labels),
            },
            "checkpoint": str(pruned.checkpoint.relative_to(self.out)) if pruned else None,
            "stages": self.stages.done,
            "environment": dict(measured[0].environment),
            "warnings": doubts,
            "recipe": self.recipe.model_dump(mode="json"),
        }


def _check_sane(quality: Quality, workload: Workload) -> None:
    """An original that is surely worse than guessing has been given the wrong labels."""
    if quality.metric != "accuracy":
        return
    chance = 100.0 / len(workload.skeleton.labels)
    if quality.high < chance:
        raise InputError(
            f"The original model has {quality.value:.1f} % {quality.metric} on the evaluation rows, and guessing gives "
            f"{chance:.1f} %: the labels of the rows do not match the model's ({', '.join(workload.skeleton.labels)})."
        )
