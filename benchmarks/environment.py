"""Environment: what a latency figure depends on besides the artifact, and whether two of them can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .device import fingerprint, usable_cpus

__all__ = ["DECISIVE", "differences", "fingerprint", "unsteady", "usable_cpus", "warnings"]

DECISIVE = ("cpu", "flags", "cpus", "system", "threads")


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Why figures from ``a`` and ``b`` must not be compared; empty where they may be."""
    reasons = [f"{key} is {a.get(key)} and {b.get(key)}" for key in DECISIVE if a.get(key) != b.get(key)]
    ours, theirs = (x.get("packages", {}).get("onnxruntime") for x in (a, b))
    if a.get("gpu") != b.get("gpu"):
        reasons.append("the GPU is another")
    if ours != theirs:
        reasons.append(f"onnxruntime is {ours} and {theirs}")
    return reasons


def warnings(environment: Mapping[str, Any]) -> list[str]:
    """What makes figures taken here doubtful."""
    found = []
    if environment.get("governor") == "powersave":
        found.append("the CPU governor is 'powersave'; 'performance' gives steadier figures")
    return found


def unsteady(samples_ms: NDArray[np.float64]) -> list[str]:
    """Signs of throttling or of a busy machine in samples in the order they were taken."""
    found = []
    quarter = len(samples_ms) // 4
    if quarter >= 10:
        first, last = float(np.median(samples_ms[:quarter])), float(np.median(samples_ms[-quarter:]))
        if not 0.9 < last / first < 1.1:
            found.append(
                f"the median moved from {first:.2f} to {last:.2f} ms during the run (throttling or other load)"
            )
        p50, p90 = np.percentile(samples_ms, [50, 90])
        if p90 > 1.5 * p50:
            found.append(f"p90 is {p90 / p50:.1f} times p50: other work is running on this machine")
    return found
