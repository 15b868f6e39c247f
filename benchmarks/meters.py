"""What a machine does while something is timed: the energy it takes, its clock, its heat, and who else works on it.

One file of Python 3.8's standard library, in ASCII, which goes to a device beside ``runner.py``. It reads what the
kernel keeps under ``/sys`` and ``/proc``; every reader takes the root of these folders.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOOK_SECONDS = 1.0
SAMPLE_SECONDS = 0.02
NVML = "libnvidia-ml.so.1"
TICKS = os.sysconf("SC_CLK_TCK")


class NoMeterError(Exception):
    """Why there is nothing to read energy from."""


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    except OSError:
        return ""


def number(path: Path) -> int | None:
    text = read(path)
    return int(text) if text.lstrip("-").isdigit() else None


# ---- energy


class Rapl:
    """The counters of Intel's and AMD's processor packages.

    A package's zone counts its cores and its graphics, which have zones of their own inside it, and the platform's zone
    (psys) counts the packages again: packages alone are added up.
    Source: https://docs.kernel.org/power/powercap/powercap.html
    """

    def __init__(self, root: Path) -> None:
        zones = [zone for zone in sorted(root.glob("sys/class/powercap/intel-rapl:*")) if zone.name.count(":") == 1]
        self._zones = [zone for zone in zones if read(zone / "name").startswith("package")]
        if not self._zones:
            raise NoMeterError("there is no RAPL package under /sys/class/powercap")
        self.name = f"RAPL {' and '.join(read(zone / 'name') for zone in self._zones)}"
        self._ranges = [number(zone / "max_energy_range_uj") or 0 for zone in self._zones]
        self._last = [self._microjoules(zone) for zone in self._zones]
        self._total = 0

    @staticmethod
    def _microjoules(zone: Path) -> int:
        try:
            return int((zone / "energy_uj").read_text(encoding="ascii"))
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "no number"
            raise NoMeterError(f"{zone}/energy_uj cannot be read ({why}), which root may, or who is let") from error

    def joules(self) -> float:
        """Since the meter was made. It has to be asked before a counter, which takes minutes, has begun anew twice."""
        now = [self._microjoules(zone) for zone in self._zones]
        for value, last, most in zip(now, self._last, self._ranges):  # noqa: B905 - Python 3.8
            self._total += value - last if value >= last else value - last + most
        self._last = now
        return self._total / 1e6

    def close(self) -> None:
        pass


class Rails:
    """The INA3221 power monitors of NVIDIA's Jetson boards: volts times amperes, sampled and added up.

    The rail that feeds the whole module is read alone where there is one (VDD_IN, POM_5V_IN); otherwise all rails are.
    Source: https://docs.nvidia.com/jetson/archives/r36.4/DeveloperGuide/SD/PlatformPowerAndPerformance.html
    """

    WHOLE = ("VDD_IN", "POM_5V_IN")

    def __init__(self, root: Path) -> None:
        rails = {}
        for chip in sorted(root.glob("sys/class/hwmon/hwmon*")):
            if read(chip / "name") == "ina3221":
                for channel in (1, 2, 3):
                    pair = chip / f"in{channel}_input", chip / f"curr{channel}_input"
                    label = read(chip / f"in{channel}_label") or f"{chip.name} {channel}"
                    if label != "NC" and all(number(one) is not None for one in pair):
                        rails[label] = pair
        if not rails:
            raise NoMeterError("there are no Jetson rails (ina3221) under /sys/class/hwmon")
        self._rails = {label: pair for label, pair in rails.items() if label in self.WHOLE} or rails
        self.name = f"rails {' and '.join(self._rails)}"
        self._total, self._at, self._watts = 0.0, time.monotonic(), self.watts()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def watts(self) -> float:
        return sum((number(volts) or 0) * (number(amperes) or 0) for volts, amperes in self._rails.values()) / 1e6

    def joules(self) -> float:
        with self._lock:
            now, watts = time.monotonic(), self.watts()
            self._total += (watts + self._watts) / 2 * (now - self._at)
            self._at, self._watts = now, watts
            return self._total

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.joules()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


class Nvml:
    """The counter of an NVIDIA GPU, from Volta on: of the first that this process may see.

    Source: https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
    """

    def __init__(self, _root: Path) -> None:
        try:
            self._library = ctypes.CDLL(NVML)
        except OSError:
            raise NoMeterError("there is no NVIDIA driver (libnvidia-ml)") from None
        self._call("nvmlInit_v2")
        self._device = ctypes.c_void_p()
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
        if seen.isdigit():
            self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(int(seen)), ctypes.byref(self._device))
        else:
            self._call("nvmlDeviceGetHandleByUUID", seen.encode(), ctypes.byref(self._device))
        self.name = f"NVML GPU {seen}"
        self._first = 0.0
        self._first = self.joules()

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise NoMeterError(f"the NVIDIA driver answers {name} with error {code}")

    def joules(self) -> float:
        millijoules = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(millijoules))
        return millijoules.value / 1e3 - self._first

    def close(self) -> None:
        self._library.nvmlShutdown()


def find(root: str = "/", *, gpu: bool = False) -> tuple[list[Any], str]:
    """The meters that there are, that of the GPU if that is what runs, and why the others are not."""
    found, reasons = [], []
    for kind in (Rapl, Rails, Nvml) if gpu else (Rapl, Rails):
        try:
            found.append(kind(Path(root)))
        except NoMeterError as error:
            reasons.append(str(error))
    return found, "; ".join(reasons)


@contextmanager
def reading(meters: Sequence[Any]) -> Iterator[Callable[[], float]]:
    """What tells the joules of all ``meters`` together, from some moment on."""
    try:
        yield lambda: sum(meter.joules() for meter in meters)
    finally:
        for meter in meters:
            meter.close()


# ---- the machine


class Watch:
    """What else the machine did from when this was made until ``result``, with a ``look`` now and then.

    ``cpus`` are those that this process may run on, and ``own`` tells the CPU seconds that it took itself.
    """

    def __init__(
        self, root: str = "/", cpus: Sequence[int] | None = None, own: Callable[[], float] = time.process_time
    ) -> None:
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
        self._root, self._cpus, self._own = Path(root), sorted(allowed if cpus is None else cpus), own
        self._begin = self._looked = time.monotonic()
        self._clocks: list[float] = []
        self._slowed = 0
        self._heat = [self._hottest()]
        self._first = self._counts()

    def look(self) -> None:
        """Read the clock and the heat, at most once in LOOK_SECONDS."""
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._sight()

    def _sight(self) -> None:
        self._clocks += self._clock()
        self._heat.append(self._hottest())
        self._slowed += self._cooling()

    def result(self) -> dict[str, Any]:
        """Shares are of the CPU time that there was; None is what this machine does not tell."""
        counts = self._counts()
        moved: dict[str, Any] = {
            name: None if value is None or self._first[name] is None else value - self._first[name]
            for name, value in counts.items()
        }
        self._sight()
        seconds = time.monotonic() - self._begin
        ticks = moved["ticks"]
        heat = [degrees for degrees in self._heat if degrees is not None]
        events = [moved[name] for name in ("core_throttle_count", "package_throttle_count") if moved[name] is not None]
        return {
            "seconds": round(seconds, 3),
            "other_load": round(min(1.0, max(0.0, moved["busy"] - moved["own"]) / ticks), 4) if ticks else None,
            "steal": round(moved["steal"] / ticks, 4) if ticks else None,
            "clock_mhz": [round(min(self._clocks)), round(max(self._clocks))] if self._clocks else None,
            "temperature_c": [round(heat[0], 1), round(max(heat), 1)] if heat else None,
            "throttled": sum(events) + self._slowed if events or self._slowed else None,
            "quota_throttled": moved["quota"],
            "swapped_pages": moved["swapped"],
            "memory_pressure": None if moved["stalled"] is None else round(moved["stalled"] / 1e6 / seconds, 4),
        }

    def _counts(self) -> dict[str, Any]:
        """What only grows, of these CPUs or the whole machine."""
        ticks = [
            [int(field) for field in line.split()[1:9]]  # the time of guests after them is in that of users
            for line in read(self._root / "proc/stat").splitlines()
            if line.startswith("cpu") and line[3:4].isdigit() and int(line.split()[0][3:]) in self._cpus
        ]
        total = [sum(column) for column in zip(*ticks)] or [0] * 8  # noqa: B905 - Python 3.8
        user, nice, system, _idle, _iowait, irq, softirq, steal = total
        swaps = [line.split() for line in read(self._root / "proc/vmstat").splitlines()]
        stalled = [line.rpartition("total=")[2] for line in read(self._root / "proc/pressure/memory").splitlines()]
        throttles = {name: self._throttles(name) for name in ("core_throttle_count", "package_throttle_count")}
        return {
            "ticks": sum(total),
            "busy": user + nice + system + irq + softirq,
            "steal": steal,
            "own": self._own() * TICKS,
            "quota": self._quota(),
            "swapped": sum(int(line[1]) for line in swaps if line[0] in {"pswpin", "pswpout"}) if swaps else None,
            "stalled": int(stalled[0]) if stalled else None,
            **throttles,
        }

    def _cpu(self, cpu: int) -> Path:
        return self._root / f"sys/devices/system/cpu/cpu{cpu}"

    def _throttles(self, name: str) -> int | None:
        """How often the CPUs were slowed down by heat, those of one package together where that is what is counted."""
        found = [number(self._cpu(cpu) / "thermal_throttle" / name) for cpu in self._cpus]
        known = [count for count in found if count is not None]
        return (sum(known) if name.startswith("core") else max(known)) if known else None

    def _quota(self) -> int | None:
        """How often this process's control group had used up its CPU time."""
        own = [line.rpartition("::")[2].strip("/") for line in read(self._root / "proc/self/cgroup").splitlines()]
        group = self._root / "sys/fs/cgroup"
        for place in (group / (own[-1] if own else "") / "cpu.stat", group / "cpu.stat", group / "cpu" / "cpu.stat"):
            for line in read(place).splitlines():
                if line.startswith("nr_throttled"):
                    return int(line.split()[1])
        return None

    def _clock(self) -> list[float]:
        """MHz of the CPU that this is running on, which has just been at work; others may idle at their slowest."""
        after = read(self._root / "proc/self/stat").rpartition(")")[2].split()
        cpu = int(after[36]) if len(after) > 36 else self._cpus[0]
        kilohertz = number(self._cpu(cpu) / "cpufreq/scaling_cur_freq")
        if kilohertz is not None:
            return [kilohertz / 1e3]
        parts = [line.partition(":") for line in read(self._root / "proc/cpuinfo").splitlines()]
        clocks = [float(value) for name, _, value in parts if name.strip() == "cpu MHz"]
        return clocks[cpu : cpu + 1]

    def _hottest(self) -> float | None:
        found = [number(zone) for zone in self._root.glob("sys/class/thermal/thermal_zone*/temp")]
        known = [degrees / 1e3 for degrees in found if degrees is not None and 0 < degrees < 200_000]
        return max(known, default=None)

    def _cooling(self) -> bool:
        """Whether the CPU is slowed down right now to cool it, or for want of power."""
        for device in self._root.glob("sys/class/thermal/cooling_device*"):
            if any(word in read(device / "type") for word in ("cpufreq", "Processor")) and number(device / "cur_state"):
                return True
        flags = read(self._root / "sys/devices/platform/soc/soc:firmware/get_throttled")  # Raspberry Pi
        try:
            return bool(int(flags, 16) & 0xF)  # what was, and is not now, is in the bits above
        except ValueError:
            return False
