"""Environment: what a latency figure depends on besides the artifact, and whether two of them can be compared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .device import fingerprint, usable_cpus

__all__ = ["DECISIVE", "differences", "fingerprint", "unsteady", "usable_cpus", "warnings"]

DECISIVE = ("cpu", "flags", "cpus", "system", "threads", "imitation")
PACKAGES = {
    "onnx": ("onnxruntime",),
    "openvino": ("openvino",),
    "executorch": ("executorch",),
    "tensorrt": ("tensorrt", "tensorrt_rtx"),
    "torch": ("torch",),
}
"""What a runtime's speed hangs on, by each word that says what ran an artifact."""
UNSTEADY_GOVERNORS = ("powersave", "ondemand", "conservative", "schedutil")


def differences(a: Mapping[str, Any], b: Mapping[str, Any], runtimes: Iterable[str] = ()) -> list[str]:
    """Why figures from ``a`` and ``b`` must not be compared; empty where they may be.

    ``runtimes`` are what took them, as measurements have it ("onnx cuda"), so that other libraries may differ; where it
    is not known of one, ONNX Runtime is held to be it.
    """
    reasons = [f"{key} is {a.get(key)} and {b.get(key)}" for key in DECISIVE if a.get(key) != b.get(key)]
    if a.get("gpu") != b.get("gpu"):
        reasons.append("the GPU is another")
    words = {word for runtime in runtimes or ("",) for word in (runtime or "onnx").split()}
    for package in (package for word, packages in PACKAGES.items() if word in words for package in packages):
        ours, theirs = (x.get("packages", {}).get(package) for x in (a, b))
        if ours != theirs:
            reasons.append(f"{package} is {ours} and {theirs}")
    return reasons


def warnings(environment: Mapping[str, Any]) -> list[str]:
    """What makes figures taken here doubtful: a sentence for each, with its figures."""
    found = []
    if environment.get("governor") in UNSTEADY_GOVERNORS:
        found.append(f"the CPU governor is '{environment['governor']}'; 'performance' gives steadier figures")
    found += environment.get("unprofiled") or []
    return found + unfit(environment.get("watch") or {})


def unfit(watch: Mapping[str, Any]) -> list[str]:
    """Why a machine was not fit to measure on, from what ``meters.Watch`` saw of it during the run."""

    def seen(name: str) -> Any:
        return watch.get(name) or 0

    found = []
    if seen("other_load") > 0.1:
        found.append(f"other processes took {seen('other_load'):.0%} of the CPUs' time during the run")
    if seen("steal") > 0.02:
        found.append(f"the hypervisor kept {seen('steal'):.1%} of the CPUs' time for others during the run (steal)")
    slowest, fastest = watch.get("clock_mhz") or (1, 1)
    if fastest > 1.1 * slowest:
        found.append(f"the CPU's clock moved between {slowest:,} and {fastest:,} MHz during the run")
    if seen("throttled"):
        hot = watch.get("temperature_c")
        found.append(
            f"the CPU was slowed down by heat or want of power {seen('throttled')} times during the run"
            + (f", at up to {hot[1]:.0f} degrees Celsius" if hot else "")
        )
    if seen("quota_throttled"):
        found.append(f"the control group's CPU quota ran out {seen('quota_throttled')} times during the run")
    if seen("swapped_pages") > 256:
        found.append(f"{seen('swapped_pages'):,} pages of memory went to or from swap during the run")
    if seen("memory_pressure") > 0.01:
        found.append(f"processes waited for memory in {seen('memory_pressure'):.1%} of the run's time")
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
