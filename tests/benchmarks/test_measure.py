"""Measurements are raw samples; statistics and verdicts follow from them and from nothing else."""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import pytest
from edgepress.benchmarks import compare, environment, runner, tables, targets
from edgepress.benchmarks.measurement import RESAMPLES, Measurement, resampled_rounds
from edgepress.cli import findings
from edgepress.errors import InputError, UnavailableError, UsageError
from edgepress.export.backends import openvino as openvino_backend
from edgepress.plan import QuantizationPlan

ENVIRONMENT = environment.fingerprint(2)


def made_up(samples: Any, **changes: Any) -> Measurement:
    base = Measurement(
        name="a",
        artifact="a",
        target="cpu:2",
        precision="fp32",
        params=10,
        macs=20,
        size_bytes=30,
        load_ms=1.5,
        peak_rss_bytes=40,
        batch=1,
        sequence=128,
        samples_ms=tuple(float(s) for s in samples),
        environment=ENVIRONMENT,
    )
    return replace(base, **changes)


def drifting(rounds: int = 1200) -> np.ndarray[Any, Any]:
    """A machine that slows down by half over the run, with noise and spikes."""
    random = np.random.default_rng(0)
    spikes = 1 + 4 * (random.random(rounds) < 0.01)
    return np.linspace(1, 1.5, rounds) * np.exp(random.normal(0, 0.02, rounds)) * spikes


def test_statistics_are_those_of_the_samples() -> None:
    samples = drifting()
    found = made_up(samples)
    assert [found.p50, found.p90, found.p95, found.p99] == pytest.approx(np.percentile(samples, [50, 90, 95, 99]))
    for percent in (50, 90, 95, 99):
        low, high = found.interval(percent)
        assert high
        assert low < np.percentile(samples, percent) < high
    assert found.throughput == pytest.approx(1000 / found.p50)


def test_intervals_of_many_samples_take_little_memory() -> None:
    """And are what all resamples at once gave."""
    few = drifting(200)
    starts = np.random.default_rng(0).integers(0, 200, size=(RESAMPLES, 10))
    rounds = ((starts[:, :, None] + np.arange(21)) % 200).reshape(RESAMPLES, -1)[:, :200]
    at_once = np.concatenate([*resampled_rounds(200, 0)])
    assert (at_once == rounds).all()
    many = made_up(np.tile(few, 100))
    tracemalloc.start()
    low, high = many.interval()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert high
    assert low <= many.p50 <= high
    assert peak < 80e6, "all of them at once are 320 MB"


def test_p99_needs_a_thousand_samples() -> None:
    assert made_up(drifting(999)).p99 is None
    assert made_up(drifting(1000)).p99 is not None


def test_json_is_lossless() -> None:
    found = made_up(drifting())
    assert Measurement.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize("hostile", [{}, [], {"name": 1}, {**made_up([1]).to_json(), "samples_ms": [-1]}])
def test_other_json_is_refused(hostile: Any) -> None:
    with pytest.raises(InputError):
        Measurement.from_json(hostile)


def test_the_same_thing_twice_is_no_difference() -> None:
    samples = drifting()
    noise = np.exp(np.random.default_rng(1).normal(0, 0.02, len(samples)))
    found = compare.speedup(made_up(samples), made_up(samples * noise))
    assert found.low < 1 < found.high
    assert found.verdict == "no difference"


@pytest.mark.parametrize(("factor", "verdict"), [(0.8, "faster"), (1.25, "slower")])
def test_drift_does_not_hide_a_difference(factor: float, verdict: str) -> None:
    samples = drifting()
    noise = np.exp(np.random.default_rng(1).normal(0, 0.02, len(samples)))
    found = compare.speedup(made_up(samples), made_up(samples * factor * noise))
    assert found.verdict == verdict
    assert found.low < 1 / factor < found.high


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 8},
        {"sequence": 32},
        {"target": "cpu:1"},
        {"environment": {**ENVIRONMENT, "cpu": "another"}},
        {"environment": {**ENVIRONMENT, "threads": 1}},
        {"samples_ms": (1.0, 2.0)},
    ],
)
def test_what_is_not_comparable_is_not_compared(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="cannot be compared"):
        compare.speedup(made_up(drifting()), made_up(drifting(), **change))


def test_other_versions_of_what_ran_it_are_not_compared() -> None:
    def with_(**packages: str) -> dict[str, Any]:
        return {**ENVIRONMENT, "packages": {**ENVIRONMENT["packages"], **packages}}

    for package, runtime in (
        ("onnxruntime", "onnx"),
        ("onnxruntime", ""),
        ("openvino", "openvino"),
        ("executorch", "executorch"),
        ("tensorrt", "tensorrt"),
        ("tensorrt", "onnx cuda tensorrt"),
        ("tensorrt_rtx", "tensorrt"),
        ("torch", "torch cuda compile"),
    ):
        old, new = with_(**{package: "1"}), with_(**{package: "2"})
        assert environment.differences(old, new, [runtime]) == [f"{package} is 1 and 2"]
        assert not environment.differences(old, new, ["torch" if runtime != "torch cuda compile" else "onnx"])
    other = made_up(drifting(), runtime="torch", environment=with_(torch="0"))
    with pytest.raises(UsageError, match=r"torch is .* and 0"):
        compare.speedup(made_up(drifting(), runtime="onnx"), other)


def test_a_server_is_not_doubted_for_its_queue() -> None:
    """p90 is 2.4 times p50 of a queue that nothing is wrong with."""
    waited = np.random.default_rng(0).exponential(size=1000) + 1.0
    alone, served = made_up(waited), made_up(waited, scenario="server", rate=10.0, loads=(0.5,) * 4)
    assert any("other work" in doubt for doubt in findings.doubts([alone]))
    assert not any("other work" in doubt or "moved from" in doubt for doubt in findings.doubts([served]))


def test_rows_a_second_are_those_of_the_scenario() -> None:
    served = made_up(drifting(), scenario="server", rate=10.0, loads=(0.5,) * 4, batch=3)
    assert tables.costs(compare.row(served, None))[1] == "30.0"
    spread = np.tile([1.0, 3.0, 1.0], 100)
    offline = made_up(spread, scenario="offline", per_slice=3)
    assert tables.costs(compare.row(offline, None))[1] == "600.0"
    assert tables.costs(compare.row(made_up(spread), None))[1] == "1,000.0"


def test_throttling_and_other_load_are_seen() -> None:
    assert any("moved from" in sign for sign in environment.unsteady(drifting()))
    random = np.random.default_rng(0)
    busy = np.where(random.random(1000) < 0.2, 3.0, 1.0)
    assert any("p90" in sign for sign in environment.unsteady(busy))
    assert not environment.unsteady(1 + 0.01 * random.random(1000))


def test_every_run_follows_every_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SETTLED_NS", 0)
    came: list[int] = []
    samples = runner.interleaved([lambda which=which: came.append(which) for which in range(3)], 200, 60.0)
    assert [len(taken) for taken in samples] == [200] * 3
    twice = np.array(came[-1200:]).reshape(200, 3, 2)
    assert (twice[..., 0] == twice[..., 1]).all()  # once with its caches to be filled, and once timed
    rounds = twice[..., 1]
    assert (np.sort(rounds, axis=1) == np.arange(3)).all()
    pairs = {(a, b): int(((rounds[:, :-1] == a) & (rounds[:, 1:] == b)).sum()) for a in range(3) for b in range(3)}
    assert all(40 < count < 95 for (a, b), count in pairs.items() if a != b)  # 67 of each, but for chance


def test_the_lock_is_one_for_all_processes_of_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"edgepress-{os.getuid()}.lock"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for_all = Path("/", "tmp", name)
    assert runner.lock_file(str(tmp_path)) == for_all
    (tmp_path / str(os.getuid())).write_text("no folder")
    assert runner.lock_file(str(tmp_path)) == for_all
    (tmp_path / str(os.getuid())).unlink()
    (tmp_path / str(os.getuid())).mkdir()
    assert runner.lock_file(str(tmp_path)) == tmp_path / str(os.getuid()) / name
    place = tmp_path / name
    place.symlink_to(tmp_path / "of another user")
    monkeypatch.setattr(runner, "lock_file", lambda: place)
    with (
        pytest.raises(SystemExit, match=f"{place}, by which measurements take turns, cannot be opened"),
        runner.alone(),
    ):
        pass
    assert not (tmp_path / "of another user").exists()


def test_there_are_thirty_rounds_in_any_case() -> None:
    assert [len(taken) for taken in runner.interleaved([lambda: None], 10, 0.0)] == [30]


def test_measurements_of_one_machine_take_turns(workload: Any, tmp_path: Path) -> None:
    written = ep.export(workload, tmp_path / "fp32")
    said: list[str] = []

    def measure() -> None:
        ep.benchmark(
            [written], target="cpu:1", sequence=16, min_queries=30, progress=lambda *step: said.append(step[2])
        )

    other = threading.Thread(target=measure)
    with runner.alone():
        other.start()
        while not any(note.startswith("waiting for another") for note in said):
            time.sleep(0.05)
            assert other.is_alive()
        assert "rounds" not in said
    other.join(timeout=120)
    assert not other.is_alive()


def test_a_runtime_that_cannot_be_measured_is_one_sentence(workload: Any, tmp_path: Path) -> None:
    written = ep.export(workload, tmp_path / "fp32")
    for runtime in ("toaster", "torch"):  # of PyTorch's only what was loaded here is one, not what a file says it is
        strange = replace(written, manifest=written.manifest.model_copy(update={"runtime": runtime}))
        with pytest.raises(UnavailableError, match=rf"is for {runtime}, which cannot be measured yet .*onnx"):
            ep.benchmark([strange])
    engine = replace(written, manifest=written.manifest.model_copy(update={"runtime": "tensorrt"}))
    with pytest.raises(UsageError, match=r"is for tensorrt; the target 'cpu:1' is not, but tensorrt is"):
        ep.benchmark([engine], target="cpu:1")


def test_two_runtimes_interleaved(workload: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    first = ep.export(workload, tmp_path / "onnx")
    second = openvino_backend.write(workload, QuantizationPlan("fp32"), tmp_path / "openvino", base=first)
    taken = ep.benchmark([first, second], target="cpu:1", sequence=16, min_queries=40)
    assert [len(item.samples) for item in taken] == [40, 40]
    assert all(item.samples.min() > 0 and item.peak_rss_bytes and item.load_ms for item in taken)
    assert "openvino" in taken[0].environment["packages"]
    assert ep.compare(taken)[1]["speedup"]["value"] > 0
    monkeypatch.setattr(targets.missing, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match=r"which is missing: pip install 'edgepress\[openvino\]'"):
        ep.benchmark([second])


@pytest.mark.parametrize(("found", "note"), [(object(), "OpenVINO$"), (None, r"edgepress\[openvino\]")])
def test_the_list_of_targets_tells_of_openvino(found: Any, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.missing, "find_spec", lambda _: found)
    rows = [row for row in targets.listing() if row["target"].startswith("cpu:openvino:")]
    assert rows
    assert all(row["available"] == bool(found) and re.search(note, row["note"]) for row in rows)
    if not found:
        with pytest.raises(UnavailableError, match=note):
            targets.parse("cpu:openvino")


def test_real_artifacts_interleaved(workload: Any, tmp_path: Path) -> None:
    first = ep.export(workload, tmp_path / "a")
    second = ep.export(workload, tmp_path / "b", ep.quantize(workload))
    seen: list[int] = []
    taken = ep.benchmark(
        [first, second],
        target="cpu:1",
        batch=2,
        sequence=16,
        min_queries=60,
        progress=lambda *step: seen.append(step[0]),
    )
    assert [len(item.samples) for item in taken] == [60, 60]
    assert all(item.samples.min() > 0 and item.peak_rss_bytes and item.load_ms for item in taken)
    rows = ep.compare(taken)
    assert rows[0]["speedup"] is None
    ratios = np.log(taken[0].samples / taken[1].samples).reshape(10, 6)
    assert rows[1]["speedup"]["value"] == pytest.approx(np.exp(np.median(ratios, axis=1).mean()))
    with pytest.raises(UsageError, match="1 to 64, not 65"):
        ep.benchmark([first], sequence=65)


@pytest.mark.parametrize("text", ["cpu:0", "cpu:999", "cpu:openvino:0", "cpu:onnx", "gpu", "", "cpu:x", "CPU", "; rm"])
def test_targets_that_do_not_exist(text: str) -> None:
    with pytest.raises(UsageError):
        targets.parse(text)


@pytest.mark.parametrize(
    ("text", "runtime"), [("cpu:1", "onnx"), ("cpu:openvino:1", "openvino"), ("cpu:openvino", "openvino")]
)
def test_a_target_says_what_it_is(text: str, runtime: str) -> None:
    target = targets.parse(text)
    assert target.runtime == runtime
    assert str(target).startswith(text)
    assert targets.parse(str(target)) == target


@pytest.mark.parametrize("text", ["cuda", "tensorrt", "torch:1", "ssh://me@host/cuda"])
def test_targets_that_are_measured_and_not_written_for(text: str) -> None:
    with pytest.raises(UnavailableError, match="not available yet"):
        targets.to_write_for(text)


def test_a_host_returns_what_was_printed_and_says_why_it_failed(tmp_path: Path) -> None:
    with targets.get("local").connect("local") as host:
        assert host.run(["python", "-c", "print('x' * 100000)"]) == b"x" * 100000 + b"\n"
        with pytest.raises(ep.errors.EdgepressError, match="code 3: why"):
            host.run(["python", "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"])


def test_bench_has_scenarios(here: Any, artifacts: Any) -> None:
    artifact = artifacts[0].folder
    common = ("bench", artifact, artifact, "--target", "cpu:1", "--seq", 16, "--queries", 40)
    served = here(*common, "--scenario", "server", "--rate", 20, "--deadline", "1000s", "--json")
    assert served.returncode == 2
    assert "'1000s' is not such as 15ms" in served.stderr
    document = json.loads(here(*common, "--scenario", "server", "--rate", 50, "--deadline", "9ms", "--json").stdout)
    for row in document["rows"]:
        assert row["scenario"] == "server"
        assert row["server"]["rate"] == 50
        assert len(row["server"]["loads"]) == 4
        assert 0 <= row["server"]["within"] <= 1
        assert row["server"]["sustained"] == (max(row["server"]["loads"]) < 1)
        assert row["latency_ms"]["p50"] <= row["latency_ms"]["p90"] <= row["latency_ms"]["p95"]
        assert row["latency_ms"]["p99"] is None
        assert row["latency_intervals_ms"]["p99"] is None
    assert document["environment"]["clock_overhead_ns"] > 0
    shown = here(*common, "--scenario", "offline", "--batch", 4)
    assert shown.returncode == 0, shown.stderr
    assert len(re.findall(r"tiny-bert: [\d,.]+ rows/s \[[\d,.]+, [\d,.]+\]", shown.stdout)) == 2
    assert re.search(r"timing a query takes \d+ ns itself, which is part of it", shown.stdout)


def test_bench_ends_early(here: Any, artifacts: Any) -> None:
    artifact = artifacts[0].folder
    common = ("bench", artifact, "--target", "cpu:1", "--seq", 16, "--confidence-width")
    for width, said in (("1", "'1' is not such as 1%"), ("0%", "is not such as"), ("200%", "between 0 and 1")):
        refused = here(*common, width)
        assert (refused.returncode, said in refused.stderr) == (2, True)
    shown = here(*common, "99%", "--queries", 5000)
    assert shown.returncode == 0, shown.stderr
    rounds = int(re.search(r"ended early, after ([\d,]+) rounds", shown.stdout)[1].replace(",", ""))  # type: ignore[index]
    assert rounds in runner.looks(5000)
    assert "p90" in shown.stdout
