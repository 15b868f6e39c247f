"""Gradual pruning: what has to go goes in rounds, and what is left is restored after each.

A model that loses half of itself at once is scored on the whole of it; in rounds, what is left is scored as it then is.
Every round takes the same share of what is left, and between rounds the model is reconstructed or trained (as ZipLM
does, Kurtic et al. 2023, arXiv 2302.04089).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...errors import UsageError
from ...models import surgery
from ...models.workload import Workload
from ...plan import PruningPlan


def gradual(
    original: Workload,
    plan_for: Callable[[Workload, dict[str, float]], PruningPlan],
    restore: Callable[[Workload], Workload],
    *,
    ratio: Mapping[str, float],
    rounds: int = 3,
) -> Workload:
    """``original`` without the ``ratio`` of its units, by kind, removed in ``rounds``.

    ``plan_for(workload, ratio)`` names the units that go of what is left, as :func:`.allocate.by_ratio` does from
    scores; ``restore(pruned)`` brings back what was lost. Raises UsageError for less than one round.
    """
    if rounds < 1:
        raise UsageError(f"Nothing can be pruned in {rounds} rounds; one is the least.")
    going = {kind: 1 - (1 - share) ** (1 / rounds) for kind, share in ratio.items()}
    current = original
    for _ in range(rounds):
        current = restore(surgery.prune(current, plan_for(current, going)))
    return current
