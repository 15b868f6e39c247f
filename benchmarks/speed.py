"""Pruning to a speed: allocate by the latency table, measure what comes out, and correct the budget by what it missed.

A table predicts what a plan leaves within some per cent; the speed that is promised is the one that is measured, end to
end, through the exported file and interleaved with the original in the same precision.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..compress import quantize as quantizers
from ..compress.prune.budget import by_latency, reachable
from ..compress.prune.predicted import Predicted
from ..errors import ConstraintError
from ..export.artifact import Artifact
from ..export.backends import onnx, openvino
from ..models import surgery
from ..models.workload import Progress, Workload
from ..plan import PruningPlan, QuantizationPlan
from . import compare, load, targets
from .compare import Speedup
from .disturbance import calmest
from .latency_table import LatencyTable

ROUNDS = 6
SPARE = 1.03
"""Speed beyond what was asked for that is not worth another round."""
SHORTER = 0.01
"""By how much at least the budget of a plan that was too slow is cut, doubled each time.

The measured correction alone can creep up to the speed from below and never pass it, where only noise is left."""


@dataclass(frozen=True)
class Round:
    """One allocation: what it was allowed, what the table predicts of it, and what was measured."""

    budget_ms: float
    predicted_ms: float
    predicted_speedup: float
    original_ms: float
    measured_ms: float
    speedup: Speedup


@dataclass(frozen=True)
class Fitted:
    """The ``best`` of the rounds, and the plan it measured: the slowest that is fast enough, else the fastest."""

    plan: PruningPlan
    best: Round
    rounds: tuple[Round, ...]
    wanted: float
    table: LatencyTable

    def check(self) -> None:
        """Raise ConstraintError where even the best is too slow."""
        found = self.best.speedup.value
        if found < self.wanted:
            raise ConstraintError(
                f"The model cannot be pruned to {self.wanted:g}x; the fastest found has {found:.2f}x."
            )

    def to_json(self) -> dict[str, Any]:
        def plain(one: Round) -> dict[str, Any]:
            return {**asdict(one), "speedup": one.speedup.to_json()}

        where = {name: getattr(self.table, name) for name in ("target", "precision", "batch", "sequence")}
        return {**where, "wanted": self.wanted, **plain(self.best), "rounds": [plain(one) for one in self.rounds]}


def fit(
    workload: Workload,
    table: LatencyTable,
    told: Predicted,
    *,
    speedup: float,
    say: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """The plan that loses least, as ``told``, of those that make ``workload`` ``speedup`` times faster, by measurement.

    At most ``ROUNDS`` plans are measured: after each the budget is corrected by the ratio of the speed found to that
    aimed at, and where that was too slow by ``SHORTER`` and its doubles at least. A speed that cannot be met gives the
    fastest plan that was found; see ``check``.
    """
    structure = workload.structure
    costs = table.costs(structure)
    least = table.expected(reachable(structure, told.losses, costs))
    aim = speedup * SPARE**0.5  # the middle of what is good enough
    budget, shorter = table.total_ms / aim, SHORTER
    rounds: list[tuple[Round, PruningPlan]] = []
    with tempfile.TemporaryDirectory() as folder:
        original = _artifact(workload, table, Path(folder) / "original")
        for number in range(1, ROUNDS + 1):
            budget = max(budget, least)
            plan = by_latency(structure, told.losses, costs, table.summed(budget), order=told.orders)
            if plan in [earlier for _, earlier in rounds]:
                if rounds[-1][0].speedup.value >= speedup or budget == least:
                    break
                budget, shorter = budget * (1 - shorter), 2 * shorter
                continue
            predicted = table.predict(structure, plan)
            if progress:
                progress(number - 1, ROUNDS, "exporting")
            pruned = _artifact(surgery.prune(workload, plan), table, Path(folder) / f"pruned{number}")
            where: dict[str, Any] = {"target": table.target, "batch": table.batch, "sequence": table.sequence}
            take = partial(load.quick, [original, pruned], **where, rounds=300)
            first, second = calmest(take, table.total_ms)
            found = compare.speedup(first, second)
            one = Round(budget, predicted, table.total_ms / predicted, first.p50, second.p50, found)
            rounds.append((one, plan))
            if say:
                say(f"plan {number}: {one.predicted_speedup:.2f}x predicted, {found.value:.2f}x measured")
            if speedup <= found.value <= SPARE * speedup or (found.value < speedup and budget == least):
                break
            step = found.value / aim
            if step < 1:
                step, shorter = min(step, 1 - shorter), 2 * shorter
            budget *= step
    enough = [pair for pair in rounds if pair[0].speedup.value >= speedup]
    chosen = min(enough or rounds, key=lambda pair: pair[0].speedup.value * (1 if enough else -1))
    return Fitted(chosen[1], chosen[0], tuple(one for one, _ in rounds), speedup, table)


def _artifact(workload: Workload, table: LatencyTable, folder: Path) -> Artifact:
    precise = table.precision == "fp32"
    plan = QuantizationPlan("fp32") if precise else quantizers.quantize(workload, table.precision)
    if targets.parse(table.target).runtime == "openvino":
        return openvino.write(workload, plan, folder)
    return onnx.write(workload, plan, folder, form=table.form)
