"""Energy and the watch on the machine, read from trees of files as the kernel writes them, and from this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edgepress.benchmarks import compare, environment, load, meters, runner
from edgepress.export.artifact import Artifact


def tree(root: Path, files: Mapping[str, Any]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def rapl(root: Path) -> Path:
    """Two packages, one with zones inside it; a zone of the platform; and the first package by another way."""
    zone = "sys/class/powercap/intel-rapl"
    zones = {"0": "package-0", "0:0": "core", "0:1": "dram", "1": "package-1", "2": "psys"}
    files: dict[str, Any] = {"sys/class/powercap/intel-rapl/enabled": 1}
    for number, name in zones.items():
        files |= {f"{zone}:{number}/{key}": value for key, value in (("name", name), ("energy_uj", 1000))}
        files[f"{zone}:{number}/max_energy_range_uj"] = 5_000_000
    files |= {f"{zone}-mmio:0/{key}": value for key, value in (("name", "package-0"), ("energy_uj", 1000))}
    return tree(root, files)


def test_packages_are_added_up_and_counted_once(tmp_path: Path) -> None:
    (meter,), why = meters.find(str(rapl(tmp_path)))
    assert meter.name == "RAPL package-0 and package-1"
    assert meter.joules() == 0
    for zone in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
        tree(tmp_path, {f"sys/class/powercap/{zone}/energy_uj": 3_001_000})
    assert meter.joules() == 3.0
    assert "Jetson" in why


def test_a_counter_that_begins_anew_goes_on(tmp_path: Path) -> None:
    (meter,), _ = meters.find(str(rapl(tmp_path)))
    for reading, total in ((4_901_000, 4.9), (100_000, 5.099), (4_000_000, 8.999), (0, 9.999)):  # over 5 J, twice
        tree(tmp_path, {"sys/class/powercap/intel-rapl:0/energy_uj": reading})
        assert meter.joules() == pytest.approx(total)


def test_a_counter_that_may_not_be_read_is_said(tmp_path: Path) -> None:
    counter = rapl(tmp_path) / "sys/class/powercap/intel-rapl:1/energy_uj"
    counter.unlink()
    counter.mkdir()  # the kernel's answer to others than root is an error too, which root in a test never gets
    found, why = meters.find(str(tmp_path))
    assert found == []
    assert f"{counter} cannot be read" in why


def jetson(root: Path, **rails: tuple[int, int]) -> Path:
    chip = "sys/class/hwmon/hwmon1"
    files: dict[str, Any] = {
        "sys/class/hwmon/hwmon0/name": "thermal",
        f"{chip}/name": "ina3221",
        f"{chip}/in7_label": "sum",
    }
    for channel, (label, (millivolts, milliamperes)) in enumerate(rails.items(), 1):
        files |= {f"{chip}/in{channel}_label": label, f"{chip}/in{channel}_input": millivolts}
        files[f"{chip}/curr{channel}_input"] = milliamperes
    return tree(root, files)


@pytest.mark.parametrize(
    ("rails", "name", "watts"),
    [
        ({"VDD_IN": (5000, 1000), "VDD_CPU_GPU_CV": (5000, 400)}, "rails VDD_IN", 5.0),
        (
            {"VDD_GPU_SOC": (20000, 100), "VDD_CPU_CV": (20000, 50), "NC": (0, 0)},
            "rails VDD_GPU_SOC and VDD_CPU_CV",
            3.0,
        ),
    ],
)
def test_rails_are_sampled(tmp_path: Path, rails: Any, name: str, watts: float) -> None:
    found, why = meters.find(str(jetson(tmp_path, **rails)))
    assert [meter.name for meter in found] == [name]
    assert "RAPL" in why
    assert found[0].watts() == watts
    with meters.reading(found) as joules:
        before, begin = joules(), time.monotonic()
        time.sleep(0.1)
        after, end = joules(), time.monotonic()
    assert after - before == pytest.approx(watts * (end - begin), rel=0.2)


def job(artifacts: list[Artifact], folder: Path, **more: Any) -> dict[str, Any]:
    jobs = []
    for at, artifact in enumerate(artifacts):
        np.savez(folder / f"{at}.npz", **load.arbitrary(artifact, 1, 16))  # type: ignore[arg-type]
        model, feeds = str(artifact.model_file), str(folder / f"{at}.npz")
        told = {"runtime": "onnx", "model": model, "feeds": feeds, "inputs": list(artifact.manifest.inputs)}
        jobs.append({**told, "disabled_optimizers": list(artifact.manifest.session.disabled_optimizers)})
    return {"threads": 1, "artifacts": jobs, **more}


def test_millijoules_of_a_run(artifacts: list[Artifact], tmp_path: Path) -> None:
    """A module that takes five watts whatever it does: what a run costs is what it takes, and idling costs the same."""
    root = jetson(tmp_path / "root", VDD_IN=(5000, 1000))
    told = runner.energy(job(artifacts, tmp_path, root=str(root), seconds=0.1))
    assert told["meter"] == "rails VDD_IN"
    assert told["idle_watts"] == pytest.approx(5.0, rel=0.2)
    assert min(told["runs"]) > 0
    for each, count in zip(told["millijoules"], told["runs"], strict=True):
        assert each * count == pytest.approx(1e3 * 5.0 * 0.1 * runner.SLICES, rel=0.5)


def test_no_meter_is_a_reason(artifacts: list[Artifact], tmp_path: Path) -> None:
    told = runner.energy(job(artifacts, tmp_path, root=str(tmp_path / "none"), seconds=0.1, device="cuda"))
    assert told["millijoules"] is None
    assert "RAPL" in told["why"]
    assert "Jetson" in told["why"]


@pytest.mark.gpu
def test_a_gpu_counts_its_joules() -> None:
    meter = meters.Nvml(Path("/"))
    time.sleep(0.5)
    assert meter.joules() > 1
    meter.close()


# ---- the machine


def machine(root: Path, *, busy: int, idle: int, steal: int = 0, **more: Any) -> Path:
    """Two CPUs of ours that are alike, and one that is not ours and always busy."""
    ours = f"{busy} 0 0 {idle} 0 0 0 {steal} 0 0"
    return tree(
        root,
        {
            "proc/stat": f"cpu  9 9 9 9\ncpu0 {ours}\ncpu1 {ours}\ncpu2 9999 0 0 0 0 0 0 0 0 0\nintr 1\n",
            "proc/vmstat": f"nr_free_pages 1\npswpin {more.get('swapped', 0)}\npswpout 5",
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/a/b/cpu.stat": f"usage_usec 1\nnr_periods 9\nnr_throttled {more.get('quota', 0)}",
            "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": more.get("core", 0),
            "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count": more.get("package", 0),
            "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": 3,
            "sys/devices/system/cpu/cpu1/thermal_throttle/package_throttle_count": more.get("package", 0),
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": more.get("clock", 2_400_000),
            "proc/self/stat": "7 (a b) c) S " + "0 " * 35 + "0 0",
            "sys/class/thermal/thermal_zone0/temp": 1000 * more.get("degrees", 50),
            "sys/class/thermal/thermal_zone1/temp": -274000,
        },
    )


def watch(root: Path, after: Mapping[str, Any], own_seconds: float = 1.0) -> dict[str, Any]:
    """What is seen of a second in which the machine went on as ``after`` says, and this process worked for so long."""
    own = iter([10.0, 10.0 + own_seconds])
    watched = meters.Watch(str(machine(root, busy=100, idle=100)), cpus=(0, 1), own=lambda: next(own))
    machine(root, **after)
    return watched.result()


def test_a_quiet_machine_is_fit(tmp_path: Path) -> None:
    found = watch(tmp_path, {"busy": 150, "idle": 150})  # its own second, of two
    assert found["other_load"] == 0
    assert found["steal"] == 0
    assert found["clock_mhz"] == [2400, 2400]
    assert found["temperature_c"] == [50, 50]
    assert found["throttled"] == 0
    assert environment.warnings({"watch": found, "governor": "performance"}) == []


@pytest.mark.parametrize(
    ("after", "sentence"),
    [
        ({"busy": 200, "idle": 100}, "other processes took 50% of the CPUs' time during the run"),
        ({"busy": 150, "idle": 140, "steal": 10}, "the hypervisor kept 10.0% of the CPUs' time for others"),
        ({"busy": 150, "idle": 150, "core": 4, "package": 2, "degrees": 95}, "heat or want of power 6 times during"),
        ({"busy": 150, "idle": 150, "core": 1, "degrees": 95}, "at up to 95 degrees Celsius"),
        ({"busy": 150, "idle": 150, "quota": 8}, "the control group's CPU quota ran out 8 times"),
        ({"busy": 150, "idle": 150, "swapped": 5000}, "5,000 pages of memory went to or from swap"),
    ],
)
def test_a_machine_that_is_not_fit_to_measure_is_told(tmp_path: Path, after: Any, sentence: str) -> None:
    found = environment.warnings({"watch": watch(tmp_path, after)})
    assert len(found) == 1
    assert sentence in found[0]


def test_a_clock_that_moves_and_memory_that_is_short_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "LOOK_SECONDS", 0.0)
    root = machine(tmp_path, busy=100, idle=100)
    stalled = tree(root, {"proc/pressure/memory": "some avg10=0.00 total=1000\nfull avg10=0.00 total=0"})
    watched = meters.Watch(str(stalled), cpus=(0, 1))
    watched.look()
    tree(root, {"proc/pressure/memory": "some avg10=0.00 total=9001000\nfull avg10=0.00 total=0"})
    machine(root, busy=100, idle=100, clock=1_200_000)
    found = watched.result()
    assert found["clock_mhz"] == [1200, 2400]
    said = environment.warnings({"watch": found, "governor": "schedutil"})
    assert said[0] == "the CPU governor is 'schedutil'; 'performance' gives steadier figures"
    assert said[1] == "the CPU's clock moved between 1,200 and 2,400 MHz during the run"
    assert said[2].startswith("processes waited for memory in ")


@pytest.mark.parametrize(
    "cooling",
    [
        {
            "sys/class/thermal/cooling_device0/type": "thermal-cpufreq-0",
            "sys/class/thermal/cooling_device0/cur_state": 3,
        },
        {"sys/devices/platform/soc/soc:firmware/get_throttled": "50005"},
    ],
)
def test_a_board_that_slows_down_is_seen(tmp_path: Path, cooling: dict[str, Any]) -> None:
    fan = {"sys/class/thermal/cooling_device1/type": "pwm-fan", "sys/class/thermal/cooling_device1/cur_state": 4}
    tree(tmp_path, {**fan, "proc/stat": "cpu0 1 0 0 1 0 0 0 0 0 0"})
    assert meters.Watch(str(tmp_path), cpus=(0,)).result()["throttled"] is None
    assert meters.Watch(str(tree(tmp_path, cooling)), cpus=(0,)).result()["throttled"] == 1


def test_this_machine_is_watched_while_it_is_timed(artifacts: list[Artifact]) -> None:
    (taken,) = load.benchmark(artifacts[:1], target="cpu:1", sequence=16, min_queries=60, memory=False, energy=True)
    found = taken.environment["watch"]
    assert 0 <= found["other_load"] <= 1
    assert 0 <= found["steal"] <= 1
    row = compare.row(taken, None)
    assert (row["energy_mj"] is None) == row["energy_note"].startswith("not available: there is no RAPL")
    assert compare.energy_note(SimpleNamespace(environment={}, energy_mj=None)) == "not measured"  # type: ignore[arg-type]
