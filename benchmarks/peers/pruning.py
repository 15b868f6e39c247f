"""What pruning without training costs in quality at equal measured latency: edgepress against other methods.

    python benchmarks/peers/pruning.py [--model zoo:minilm-reviews] [--speedups 1.5,2,3,4] [--seeds 3] -o study.jsonl

Every contender is cut until ONNX Runtime runs it as much faster as is wanted (``equal_latency.py``), on one target and
from the same calibration rows, which the seed draws; its quality is then measured through the artifact. A row is
written as soon as it is measured, and a study that was cut short goes on from there. Beside ``study.jsonl``, the end
writes ``study.json`` (all rows and the environment) and ``study.md`` (the table).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import edgepress as ep
import numpy as np
from edgepress import files
from edgepress.benchmarks import compare
from edgepress.benchmarks.environment import fingerprint
from edgepress.benchmarks.peers.contenders import CONTENDERS, OURS
from edgepress.benchmarks.peers.equal_latency import Bench, Candidate, Found, exported, fastest_form, search
from edgepress.benchmarks.runner import peak_rss
from edgepress.benchmarks.targets import parse
from edgepress.errors import EdgepressError, UsageError
from edgepress.export.artifact import Artifact
from edgepress.export.backends import onnx as backend
from edgepress.models import metrics
from edgepress.models.data import stratified
from edgepress.models.workload import Workload
from numpy.typing import NDArray

Parts = Mapping[str, NDArray[np.int64]]
"""Positions in the evaluation rows by the name of the set that they come from."""

TOO_SLOW = 0.04
"""How far below the wanted speedup a row may be: twice what the search allows, for its figure is measured anew."""


def evaluation_sets(workload: Workload) -> Parts:
    """The zoo's reviews are of two kinds, which stand one after the other."""
    rows = len(workload.data.evaluation)
    if workload.source == "zoo:minilm-reviews":
        from edgepress.models.zoo.minilm_reviews import SPLITS

        starts = np.cumsum([0, *SPLITS["evaluation"].values()])
        if starts[-1] == rows:
            return {name: np.arange(*starts[i : i + 2]) for i, name in enumerate(SPLITS["evaluation"])}
    return {"all": np.arange(rows)}


def fewer(workload: Workload, parts: Parts, rows: int) -> tuple[Workload, Parts]:
    """``workload`` judged on at most ``rows`` rows, each set in its share and each class of a set in its own."""
    whole = workload.data.evaluation
    if not 0 < rows < len(whole):
        return workload, parts
    random = np.random.default_rng(0)
    chosen = {}
    for name, at in parts.items():
        order = random.permutation(at)
        drawn = order if whole.classes is None else order[stratified(whole.classes[order])]
        chosen[name] = np.sort(drawn[: round(rows / len(whole) * len(at))])
    evaluation = whole.pick(np.concatenate(list(chosen.values())))
    starts = np.cumsum([0, *(len(at) for at in chosen.values())])
    data = replace(workload.data, evaluation=evaluation)
    return replace(workload, data=data), {name: np.arange(*starts[i : i + 2]) for i, name in enumerate(chosen)}


def calibrated(workload: Workload, rows: int, seed: int) -> Workload:
    """``workload`` with ``rows`` calibration rows that ``seed`` draws from its training rows, or from its own."""
    pool = workload.data.train if len(workload.data.train) >= rows else workload.data.calibration
    return replace(workload, data=replace(workload.data, calibration=pool.take(rows, seed)))


@dataclass(frozen=True)
class Judge:
    """Quality through the artifact, beside the original's answers to the same rows."""

    workload: Workload
    parts: Parts
    threads: int
    original: Any

    def answers(self, artifact: Artifact) -> Any:
        with backend.open_session(artifact, threads=self.threads) as session:
            return metrics.session_answers(session.run, self.workload)

    def quality(self, answers: Any) -> dict[str, Any]:
        """By set, and over all rows."""
        everything = np.arange(len(self.workload.data.evaluation))
        metric, wanted = (
            self.workload.data.metric,
            metrics.wanted(self.workload.data.evaluation, self.workload.data.metric),
        )
        found = {}
        for name, at in {**self.parts, "all": everything}.items():
            original = None if self.original is None else self.original[at]
            found[name] = asdict(metrics.quality(metric, answers[at], wanted[at], original=original))
        return found


class Study:
    """The rows measured so far, in ``path``, and what measures more of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.path: Path = options.out
        self.options = options
        self.facts = {
            name: getattr(options, name) for name in ("model", "target", "batch", "sequence", "rows", "calibration")
        }
        self.rows = _read(self.path, self.facts)
        whole = ep.load(options.model)
        self.workload, parts = fewer(whole, evaluation_sets(whole), options.rows)
        threads = parse(options.target).threads
        self.environment = fingerprint(threads)
        shape = {"target": options.target, "batch": options.batch, "sequence": options.sequence}
        written = ep.export(self.workload, options.folder / "original")
        original = fastest_form(written, queries=options.queries, **shape)
        judge = Judge(self.workload, parts, threads, None)
        answers = judge.answers(original)
        self.judge = replace(judge, original=answers)
        self.bench = Bench(original, queries=options.search_queries, known={}, **shape)
        form = next(name for name, session in backend.FORMS.items() if session == original.manifest.session)
        self.original = {
            "params": self.workload.params,
            "macs": self.workload.macs,
            "form": form,
            "quality": judge.quality(answers),
        }
        if not self.path.exists():
            self._append({"study": self.facts, "original": self.original, "environment": self.environment})

    def _append(self, row: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        return [row for row in self.rows if all(row[key] == value for key, value in wanted.items())]

    def run(self) -> None:
        for seed in range(self.options.seeds):
            workload = calibrated(self.workload, self.options.calibration, seed)
            evidence = {
                name: Once(partial(CONTENDERS[name].prepare, workload, seed, self.bench))
                for name in self.options.contenders
            }
            for name, prepared in evidence.items():
                if not CONTENDERS[name].heads_needed or workload.structure.of_kind("head"):
                    self._contender(workload, name, seed, prepared)
            if self.options.recover:
                self._recovered(workload, seed, evidence)

    def _contender(self, workload: Workload, name: str, seed: int, prepared: Once) -> None:
        contender = CONTENDERS[name]
        for wanted in self.options.speedups:
            every = [one for one in contender.settings if not self.options.settings or one in self.options.settings]
            settings = [self.best(name, wanted)["setting"]] if seed else every
            for setting in settings:
                key = {"contender": name, "setting": setting, "wanted": wanted, "seed": seed, "recover": 0}
                if self.find(**key):
                    continue
                cut = contender.settings[setting]
                evidence = prepared()
                try:
                    found = search(lambda c, h: cut(workload, evidence, c, h), self.bench, wanted)  # noqa: B023
                    finished = Once(found.candidate.finish)
                    row = self._row(key, found, finished, {"prepare": prepared, "finish": finished})
                except (EdgepressError, RuntimeError) as error:
                    row = {**key, "failed": f"{type(error).__name__}: {error}"}
                self.rows.append(row)
                self._append(row)
                _say(row)

    def _recovered(self, workload: Workload, seed: int, evidence: Mapping[str, Once]) -> None:
        """The best of ours and the best peer of each speedup, after distillation."""
        steps = self.options.recover
        for wanted in self.options.speedups:
            chosen = [self.best(name, wanted) for name in self.options.contenders if self.find(contender=name)]
            peers = [row for row in chosen if row["contender"] != OURS]
            ours = [row for row in chosen if row["contender"] == OURS]
            for row in ours + sorted(peers, key=_lost)[:1]:
                key = {
                    **{name: row[name] for name in ("contender", "setting", "wanted")},
                    "seed": seed,
                    "recover": steps,
                }
                at_seed = self.find(**{**key, "recover": 0})
                if self.find(**key) or not at_seed or "failed" in at_seed[0]:
                    continue
                cut = CONTENDERS[row["contender"]].settings[row["setting"]]
                shares = at_seed[0]["channels"], at_seed[0]["heads"]
                candidate = cut(workload, evidence[row["contender"]](), *shares)
                found = Found(*shares, candidate, self.bench.speedup(candidate.cut))
                finish = Once(partial(_distilled, candidate, workload, steps, seed))
                recovered = self._row(key, found, finish, {"finish": finish})
                self.rows.append(recovered)
                self._append(recovered)
                _say(recovered)

    def best(self, contender: str, wanted: float) -> dict[str, Any]:
        """The first seed's row of the setting that loses least, of one contender."""
        return min(self.find(contender=contender, wanted=wanted, seed=0, recover=0), key=_lost)

    def _row(self, key: Mapping[str, Any], found: Found, finish: Once, timed: Mapping[str, Once]) -> dict[str, Any]:
        finished = finish()
        with exported(finished) as artifact:
            original, other = self.bench.beside(artifact, queries=self.options.queries, memory=True)
            quality = self.judge.quality(self.judge.answers(artifact))
        counts: dict[str, dict[int, int]] = {}
        for site in finished.structure.sites:
            counts.setdefault(site.kind, {})[site.layer] = site.count
        return {
            **key,
            "channels": found.channels,
            "heads": found.heads,
            "searched_speedup": found.speedup.value,
            "speedup": compare.speedup(original, other).to_json(),
            "latency_ms": {"original": original.p50, "pruned": other.p50, "n": len(other.samples)},
            "quality": quality,
            "params": finished.params,
            "macs": finished.macs,
            "size_bytes": other.size_bytes,
            "kept": counts,
            "seconds": {name: once.seconds for name, once in timed.items()},
            "peak_rss_bytes": {**{name: once.peak for name, once in timed.items()}, "artifact": other.peak_rss_bytes},
        }


class Once:
    """A function that is called once, with the seconds that it took and the peak of memory meanwhile."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function, self.result = function, None
        self.seconds, self.peak = -1.0, 0

    def __call__(self) -> Any:
        if self.seconds < 0:
            with suppress(OSError):  # Linux alone can forget the peak so far
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            begin = time.perf_counter()
            self.result = self.function()
            self.seconds, self.peak = time.perf_counter() - begin, peak_rss()
        return self.result


def _distilled(candidate: Candidate, workload: Workload, steps: int, seed: int) -> Workload:
    return ep.recover(candidate.finish(), workload, steps=steps, seed=seed).workload


def _lost(row: Mapping[str, Any]) -> float:
    """The drop of the set that loses most, in points; infinite where the row came out too slow to be compared."""
    too_slow = "failed" in row or row["speedup"]["value"] < (1 - TOO_SLOW) * row["wanted"]
    return float("inf") if too_slow else max(float(found["drop"]) for found in row["quality"].values())


def _read(path: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run; UsageError where it measured something else."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):  # killed in the middle of a line
        files.write_text(path, "".join(lines[:-1]))
        lines.pop()
    head, *rows = [json.loads(line) for line in lines]
    if head["study"] != facts:
        raise UsageError(f"{path} is a study of {head['study']}, not of {dict(facts)}; give another file with -o.")
    return rows


def _say(row: Mapping[str, Any]) -> None:
    name = f"{row['contender']} ({row['setting']}), seed {row['seed']}, {row['wanted']:g}x"
    if "failed" in row:
        print(f"{name}: {row['failed']}", file=sys.stderr, flush=True)
        return
    drops = ", ".join(f"{part} {found['drop']:+.2f}" for part, found in row["quality"].items())
    after = f" after {row['recover']} steps" if row["recover"] else ""
    print(f"{name}{after}: {row['speedup']['value']:.2f}x, drop {drops}", file=sys.stderr, flush=True)


def table(rows: Sequence[Mapping[str, Any]], original: Mapping[str, Any]) -> str:
    """Markdown: for every speedup the contenders' best settings, means over the seeds, those that lose least first.

    The interval of a drop is the mean over the seeds of the rows' paired intervals' ends; the range is over seeds.
    """
    sets = list(original["quality"])
    metric = next(iter(original["quality"].values()))["metric"]
    whole = ", ".join(f"{name} {found['value']:.2f} (n = {found['n']})" for name, found in original["quality"].items())
    lines = [
        f"Original: {metric} {whole}; {original['params'] / 1e6:.1f} M parameters, {original['macs'] / 1e9:.2f} GMAC."
    ]
    for wanted in sorted({row["wanted"] for row in rows}):
        lines += ["", f"### {wanted:g} times faster", ""]
        drops = [f"drop, {name}" for name in sets]
        columns = ["contender", "setting", "seeds", "speedup", *drops, "M parameters", "GMAC", "seconds"]
        lines.append(f"| {' | '.join(columns)} |")
        lines.append("| --- " * len(columns) + "|")
        groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
        for row in rows:
            if row["wanted"] == wanted and "failed" not in row:
                groups.setdefault((row["contender"], row["setting"], row["recover"]), []).append(row)
        best: dict[tuple[str, int], tuple[str, str, int]] = {}
        for group in sorted(groups, key=lambda group: (-len(groups[group]), mean(_lost(row) for row in groups[group]))):
            best.setdefault((group[0], group[2]), group)
        for group in sorted(best.values(), key=lambda group: mean(_lost(row) for row in groups[group])):
            lines.append(_line(group, groups[group], sets))
    return "\n".join(lines) + "\n"


def _line(group: tuple[str, str, int], rows: Sequence[Mapping[str, Any]], sets: Sequence[str]) -> str:
    name, setting, steps = group
    faster = [mean(row["speedup"][end] for row in rows) for end in ("value", "low", "high")]
    cells = [f"{name} + {steps} steps" if steps else name, setting, str(len(rows))]
    missed = " (too slow)" if any(_lost(row) == float("inf") for row in rows) else ""
    cells.append(f"{faster[0]:.2f} [{faster[1]:.2f}, {faster[2]:.2f}]{missed}")
    for part in sets:
        drop, low, high = (mean(row["quality"][part][end] for row in rows) for end in ("drop", "drop_low", "drop_high"))
        drops = [row["quality"][part]["drop"] for row in rows]
        over = f", {min(drops):.2f} to {max(drops):.2f}" if len(rows) > 1 else ""
        cells.append(f"{drop:.2f} [{low:.2f}, {high:.2f}]{over}")
    cells += [f"{mean(row['params'] for row in rows) / 1e6:.2f}", f"{mean(row['macs'] for row in rows) / 1e9:.3f}"]
    cells.append(f"{mean(sum(row['seconds'].values()) for row in rows):.0f}")
    return f"| {' | '.join(cells)} |"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:minilm-reviews")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="separated by commas")
    parser.add_argument("--settings", default="", help="of the first seed, separated by semicolons; all if not said")
    parser.add_argument("--speedups", default="1.5,2,3,4", help="separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calibration", type=int, default=512, help="rows that methods may look at")
    parser.add_argument("--rows", type=int, default=0, help="evaluation rows; 0 for all")
    parser.add_argument("--recover", type=int, default=0, help="steps of distillation after ours and the best peer")
    parser.add_argument("--target", default="cpu:2")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--queries", type=int, default=500, help="timed runs of each variant for the figures in a row")
    parser.add_argument("--search-queries", type=int, default=200, help="timed runs of each variant in the search")
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    options.contenders = options.contenders.split(",")
    options.settings = [name for name in options.settings.split(";") if name]
    options.speedups = [float(value) for value in options.speedups.split(",")]
    options.folder = options.out.with_suffix("")
    unknown = [name for name in options.contenders if name not in CONTENDERS]
    if unknown:
        raise UsageError(f"There is no contender '{unknown[0]}' (known: {', '.join(CONTENDERS)}).")
    known = {name for contender in options.contenders for name in CONTENDERS[contender].settings}
    if missing := sorted(set(options.settings) - known):
        raise UsageError(f"There is no setting '{missing[0]}' (known: {'; '.join(sorted(known))}).")
    return options


def main() -> None:
    options = _options()
    study = Study(options)
    study.run()
    document = {"study": study.facts, "original": study.original, "environment": study.environment, "rows": study.rows}
    files.write_text(options.out.with_suffix(".json"), json.dumps(document, indent=2) + "\n")
    text = table(study.rows, study.original)
    files.write_text(options.out.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except EdgepressError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
