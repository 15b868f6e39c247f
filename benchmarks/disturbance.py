"""Disturbance: what slows a machine down for seconds, told by the latency of a model that is timed again and again.

A neighbour of a virtual machine, or another process, takes caches and memory bandwidth. It slows small models down by
another factor than large ones, so the ratio of two that were timed in turn is wrong too: by up to a third where the
larger took half as long again as usual. No counter of the operating system need show it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .measurement import Measurement

SLOWER = 1.1
"""By how much more than usual the first model takes where something disturbs it."""


def disturbed(first_ms: Sequence[float]) -> list[int]:
    """The places, the slowest first, at which the first model took more than ``SLOWER`` times its median."""
    usual = float(np.median(first_ms))
    return [at for at in np.argsort(first_ms)[::-1].tolist() if first_ms[at] > SLOWER * usual]


def calmest(take: Callable[[], list[Measurement]], usual_ms: float) -> list[Measurement]:
    """What ``take`` measures; where the first of it took longer than usual the calmer of two runs."""
    found = take()
    if found[0].p50 <= SLOWER * usual_ms:
        return found
    return min(found, take(), key=lambda taken: taken[0].p50)
