"""The contenders of :mod:`.pruning`: each prepares once for a workload and a seed, and then cuts to any share.

No contender trains. What a method leaves open is a setting of it; the study tries all settings with its first seed and
goes on with the one that loses least, so that every method is seen at its best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import edgepress as ep
from edgepress.benchmarks.peers import depgraph, kwon
from edgepress.benchmarks.peers.equal_latency import Bench, Candidate
from edgepress.compress.prune import budget
from edgepress.compress.prune.allocate import by_ratio
from edgepress.compress.prune.predicted import predict
from edgepress.compress.prune.reconstruct import reconstruct
from edgepress.models import surgery
from edgepress.models.workload import Workload
from edgepress.plan import PruningPlan

Cut = Callable[[Workload, Any, float, float], Candidate]
"""Called with the original, what was prepared, the share of channels to go and that of heads."""


@dataclass(frozen=True)
class Contender:
    source: str
    prepare: Callable[[Workload, int, Bench], Any]
    """Called with the original and its calibration rows, a seed, and what measures."""
    settings: Mapping[str, Cut]
    heads_needed: bool = False


# ---- Torch-Pruning


def _depgraph(importance: str, spreads: tuple[str, ...], source: str) -> Contender:
    def prepare(workload: Workload, _: int, __: Bench) -> Any:
        return depgraph.gradients(workload, importance)

    def cut(  # noqa: PLR0917
        spread: str, width: bool, workload: Workload, grads: Any, channels: float, heads: float
    ) -> Candidate:
        pruned = depgraph.prune(
            workload, grads, importance=importance, spread=spread, heads=heads, channels=channels, width=width
        )
        return Candidate(pruned, lambda: pruned)

    settings = {
        f"{spread}, {'width too' if width else 'heads and channels'}": partial(cut, spread, width)
        for spread in spreads
        for width in (False, True)
    }
    return Contender(source, prepare, settings)


# ---- Kwon et al.


def _kwon_prepare(workload: Workload, seed: int, bench: Bench) -> Any:
    found = kwon.gradients(workload, seed=seed)
    return found, {"macs": kwon.macs(workload.structure), "latency": _unit_times(workload, bench)}


def _unit_times(workload: Workload, bench: Bench) -> dict[str, float]:
    """What one head and one channel cost by measuring: the slopes of a latency that is linear in both."""
    times = {}
    structure = workload.structure
    for kind in kwon.KINDS:
        half = [unit for site in structure.of_kind(kind) for unit in site.units[: site.count // 2]]
        saved = 1 - bench.relative_time(surgery.prune(workload, PruningPlan.of(half)))
        times[kind] = max(saved, 1e-3) / len(half)
    return times


def _kwon_cut(counted: str, teacher: str, workload: Workload, prepared: Any, channels: float, _: float) -> Candidate:
    by_row, costs = prepared
    pruned = surgery.prune(workload, kwon.plan(workload.structure, by_row, costs[counted], channels))

    def finish() -> Workload:
        if teacher == "untuned":
            return pruned
        if teacher == "half-way":
            share = 1 - (1 - channels) ** 0.5
            half = kwon.plan(workload.structure, by_row, costs[counted], share)
            return kwon.tune(surgery.prune(workload, half), pruned)
        return kwon.tune(workload, pruned)

    return Candidate(pruned, finish)


# ---- edgepress

SCORES = ("masked_taylor", "fisher_block")


def _scored(workload: Workload, seed: int, bench: Bench) -> Any:
    rows = len(workload.data.calibration)
    scores = {method: ep.score(workload, method, rows=rows, seed=seed).values for method in SCORES}
    trials = {method: predict(workload, values, rows=rows, seed=seed) for method, values in scores.items()}
    return scores, trials, bench.costs(workload)


def _ours(  # noqa: PLR0917
    method: str, allocation: str, workload: Workload, prepared: Any, channels: float, heads: float
) -> Candidate:
    scores, trials, costs = prepared
    structure, values = workload.structure, scores[method]
    if allocation == "ratio":
        shares = {"head": heads, "ffn": channels, "channel": channels}
        present = {kind: share for kind, share in shares.items() if kind in structure.kinds}
        plan = by_ratio(structure, values, present)
    else:
        losses, order = trials[method].losses, trials[method].orders
        whole = costs.total(structure, PruningPlan())
        least = budget.reachable(structure, losses, costs)
        limit = least + (whole - least) * (1 - channels)
        plan = budget.by_latency(structure, losses, costs, limit, order=order)
    pruned = surgery.prune(workload, plan)
    rows = len(workload.data.calibration)
    return Candidate(pruned, lambda: reconstruct(workload, pruned, rows=rows))


DEPGRAPH = "Torch-Pruning 1.6.1 (arXiv 2301.12900)"
CONTENDERS: dict[str, Contender] = {
    "edgepress": Contender(
        "this repository",
        _scored,
        {
            f"{method} by {allocation}, reconstructed": partial(_ours, method, allocation)
            for method in SCORES
            for allocation in ("latency", "ratio")
        },
    ),
    "kwon": Contender(
        "Kwon et al. 2022 (arXiv 2204.09656), re-implemented",
        _kwon_prepare,
        {
            f"{counted}, {teacher}": partial(_kwon_cut, counted, teacher)
            for counted in ("macs", "latency")
            for teacher in ("unpruned", "half-way", "untuned")
        },
        heads_needed=True,
    ),
    "depgraph-magnitude": _depgraph("magnitude", ("local", "global"), DEPGRAPH),
    "depgraph-taylor": _depgraph("taylor", ("local", "global"), DEPGRAPH),
    "depgraph-hessian": _depgraph("hessian", ("local", "global"), DEPGRAPH),
    "isomorphic-taylor": _depgraph("taylor", ("isomorphic",), f"{DEPGRAPH}, isomorphic (arXiv 2407.04616)"),
}
OURS = "edgepress"
