"""Environment: what a latency figure depends on besides the artifact, and whether two of them can be compared."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
PACKAGES = ("edgepress", "numpy", "onnx", "onnxruntime", "openvino", "torch", "transformers")
DECISIVE = ("cpu", "flags", "cpus", "system", "threads")


def usable_cpus() -> int:
    """CPUs that this process may run on, by affinity and by its control group's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        count = min(count, max(1, int(quota[0]) // int(quota[1])))
    return count


def fingerprint(threads: int) -> dict[str, Any]:
    """The machine and its libraries, as plain data."""
    info = _read("/proc/cpuinfo")
    fields = dict(part for line in info.splitlines() if len(part := [x.strip() for x in line.split(":", 1)]) == 2)
    have = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "arch": platform.machine(),
        "flags": [flag for flag in FLAGS if flag in have],
        "cpus": usable_cpus(),
        "physical_cpus": psutil.cpu_count(logical=False),
        "threads": threads,
        "memory_bytes": psutil.virtual_memory().total,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "load_1min": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Why figures from ``a`` and ``b`` must not be compared; empty where they may be."""
    reasons = [f"{key} is {a.get(key)} and {b.get(key)}" for key in DECISIVE if a.get(key) != b.get(key)]
    ours, theirs = (x.get("packages", {}).get("onnxruntime") for x in (a, b))
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


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
