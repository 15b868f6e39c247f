"""Targets that imitate a smaller device: really fewer CPUs and less memory, and what does not fit is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edgepress.benchmarks import compare, imitate, imitation, load, targets
from edgepress.benchmarks.imitation import DoesNotFitError, Imitation
from edgepress.cli import screen
from edgepress.errors import UsageError
from edgepress.export.artifact import Artifact, open_artifact, seal

CPU = min(os.sched_getaffinity(0))
QUICK: dict[str, Any] = {"sequence": 16, "min_queries": 40}


@pytest.mark.parametrize(
    ("text", "again", "imitated"),
    [
        (f"cpu?cpus={CPU}", f"cpu:1?cpus={CPU}", Imitation((CPU,))),
        ("cpu:1?memory=0.5GB", "cpu:1?memory=500MB", Imitation((), 500_000_000)),
        (f"cpu:1?cpus={CPU}&memory=64mib", f"cpu:1?memory=64MiB&cpus={CPU}", Imitation((CPU,), 64 << 20)),
        ("cpu:1?memory=1073741825", "cpu:1?memory=1073741825", Imitation((), (1 << 30) + 1)),
        (
            "ssh://pi@host/cpu:1?python=py&cpus=3,0-1&memory=1GB",
            "ssh://pi@host/cpu:1?python=py&memory=1GB&cpus=0,1,3",
            Imitation((0, 1, 3), 10**9),
        ),
    ],
)
def test_an_imitation_is_part_of_a_target(text: str, again: str, imitated: Imitation) -> None:
    target = targets.parse(text)
    assert (str(target), target.imitation) == (again, imitated)
    assert targets.parse(again) == target


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("memory=lots", "'memory=lots' is not an amount of memory from 1MB on"),
        ("memory=1", "'memory=1' is not an amount of memory from 1MB on"),
        ("cpus=", "'cpus=' is not a list of CPUs"),
        ("cpus=3-1", "'cpus=3-1' is not a list of CPUs"),
        ("python=x", r"'\?python=x' after the target 'cpu:1' is not of"),
        ("memory=1GB&memory=2GB", r"'\?memory=2GB' after"),
    ],
)
def test_nonsense_is_refused(query: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        targets.parse(f"cpu:1?{query}")


def test_more_threads_than_imitated_cpus_are_refused() -> None:
    with pytest.raises(UsageError, match=r"asks for 2 threads; this machine has 1 usable CPUs by cpus="):
        targets.parse(f"cpu:2?cpus={CPU}")


def run(limits: dict[str, Any], *command: str) -> Any:
    """Where no control group can be made, unless ``limits`` name another root."""
    words = [sys.executable, imitate.__file__, json.dumps({"root": "/nowhere", **limits}), *command]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


def python(source: str) -> tuple[str, str, str]:
    return sys.executable, "-c", f"import json, os, resource, sys; {source}"


def test_a_command_has_the_cpus_and_the_memory_alone() -> None:
    tell = "print(json.dumps([sorted(os.sched_getaffinity(0)), resource.getrlimit(resource.RLIMIT_DATA)[0]]))"
    done = run({"cpus": [CPU], "memory": 10**8}, *python(tell))
    assert json.loads(done.stdout) == {"done": [[CPU], 10**8], "by": "RLIMIT_DATA"}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("x = bytearray(200_000_000); print(1)", "ended with 'MemoryError'"),
        ("resource.getrlimit(resource.RLIMIT_DATA)[0] > 0 and os.abort(); print(1)", "ended with 'SIGABRT'"),
        (
            "resource.getrlimit(resource.RLIMIT_DATA)[0] > 0 and sys.exit('none left'); print(1)",
            "ended with 'none left'",
        ),
    ],
)
def test_what_runs_without_the_limit_alone_does_not_fit(source: str, told: str) -> None:
    """Without a limit it is -1."""
    assert json.loads(run({"memory": 10**8}, *python(source)).stdout) == {"unfit": told, "by": "RLIMIT_DATA"}


def test_another_failure_is_the_command_s_own() -> None:
    done = run({"memory": 10**8}, *python("print('progress 1 2\\nno such file', file=sys.stderr); sys.exit(3)"))
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.splitlines()[:2] == ["progress 1 2", "no such file"]
    killed = run({"cpus": [CPU], "memory": 10**9}, *python("os.abort()"))
    assert (killed.returncode, killed.stdout) == (134, "")
    assert killed.stderr.splitlines()[-1] == "it was ended by SIGABRT"


def test_a_cpu_that_there_is_not_is_refused() -> None:
    found = json.loads(run({"cpus": [CPU, 4000]}, "true").stdout)
    assert "CPU 4000 is not one of" in found["refused"]


def test_a_host_is_held_to_an_imitation() -> None:
    place, greedy = str(imitation.SOURCE.parent), python("x = bytearray(200_000_000); print(1)")
    ended = "in 100 MB on the imitated device: held by (RLIMIT_DATA it ended with 'MemoryError'|cgroup it was ended by)"
    with targets.connect(targets.parse("cpu:1")) as (host, _):
        with pytest.raises(UsageError, match="CPU 4000 is not one of"):
            Imitation((4000,)).run(host, place, ["true"], None)
        with pytest.raises(DoesNotFitError, match=ended):
            Imitation((), 10**8).run(host, place, greedy, None)
        assert Imitation((), 10**8).run(host, place, greedy, None, processes=4)[0] == 1
        assert Imitation().run(host, place, greedy, None) == (1, None)


def unified(root: Path, controllers: str) -> Path:
    """A tree as cgroup 2 shows it to a process of the group ``/ours/mine``."""
    for name in ("proc/self", "sys/fs/cgroup/ours/mine"):
        (root / name).mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/ours/mine\n")
    (root / "sys/fs/cgroup/ours/cgroup.subtree_control").write_text(f"{controllers}\n")
    return root / "sys/fs/cgroup/ours"


def test_a_control_group_holds_memory_where_one_may_be_made(tmp_path: Path) -> None:
    ours = unified(tmp_path, "cpu memory pids")
    source = (
        f"(group,) = __import__('glob').glob('{ours}/edgepress-*'); "
        "print(json.dumps({n: open(group + '/' + n).read() for n in os.listdir(group)}))"
    )
    done = json.loads(
        run({"memory": 10**8, "root": str(tmp_path)}, *python(f"__import__('time').sleep(.5); {source}")).stdout
    )
    assert done["by"] == "cgroup"
    assert (done["done"]["memory.max"], done["done"]["memory.swap.max"]) == (str(10**8), "0")
    assert int(done["done"]["cgroup.procs"]) > 0


def test_what_the_kernel_ends_in_its_control_group_does_not_fit(tmp_path: Path) -> None:
    ours = unified(tmp_path, "memory")
    ended = f"for g in {ours}/edgepress-*; do echo 'oom 1\noom_kill 1' > $g/memory.events; done; kill -9 $$"
    done = run({"memory": 10**8, "root": str(tmp_path)}, "sh", "-c", ended)
    assert json.loads(done.stdout) == {"unfit": "was ended by the kernel", "by": "cgroup"}
    other = run({"memory": 10**8, "root": str(tmp_path)}, "sh", "-c", "kill -9 $$")
    assert other.returncode == 137


def test_groups_of_runs_that_were_killed_are_cleared_away(tmp_path: Path) -> None:
    """One of them had the number that this process has; what a living process may be about to enter stays."""
    ours = unified(tmp_path, "memory")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for number in (os.getpid(), ended.pid, os.getppid()):
        (ours / f"edgepress-{number}").mkdir()
    group = imitate.new_group(tmp_path, 10**8)
    assert group == ours / f"edgepress-{os.getpid()}"
    assert (group / "memory.max").read_text() == str(10**8)
    assert {path.name for path in ours.glob("edgepress-*")} == {group.name, f"edgepress-{os.getppid()}"}


def test_without_the_memory_controller_there_is_no_group(tmp_path: Path) -> None:
    ours = unified(tmp_path, "cpu pids")
    assert imitate.new_group(tmp_path, 10**8) is None
    assert imitate.new_group(tmp_path / "nothing", 10**8) is None
    assert [path.name for path in ours.iterdir() if path.is_dir()] == ["mine"]


def test_an_imitation_is_measured_and_is_another_machine(artifacts: list[Artifact]) -> None:
    target = f"cpu:1?memory=2GB&cpus={CPU}"
    (taken,) = load.benchmark(artifacts[:1], target=target, **QUICK)
    assert taken.target == target
    assert len(taken.samples) == 40
    told = taken.environment["imitation"]
    assert (told["cpus"], told["memory_bytes"]) == ([CPU], 2 * 10**9)
    assert told["memory_by"] in {"cgroup", "RLIMIT_DATA"}
    whole = {key: value for key, value in taken.environment.items() if key != "imitation"}
    with pytest.raises(UsageError, match="cannot be compared: imitation is None and"):
        compare.speedup(replace(taken, environment=whole), taken)


def test_what_does_not_fit_is_told_and_the_rest_measured(
    here: Callable[..., Any], artifacts: list[Artifact], large: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    target = f"cpu:1?memory=1GB&cpus={CPU}"
    words = ("--target", target, "--seq", "16", "--queries", "40")
    done = here("bench", large.folder, artifacts[1].folder, *words, "--json")
    assert done.returncode == 2
    document = json.loads(done.stdout)
    (sentence,) = document["refused"]
    assert sentence.startswith(f"{large.folder} does not fit in 1 GB on the imitated device: held by ")
    assert sentence.count("does not fit") == 1
    assert sentence in done.stderr
    (row,) = document["rows"]
    assert row["artifact"] == str(artifacts[1].folder)
    screen.table(row, [], None)
    assert f"an imitation of a smaller device: CPU {CPU} alone, 1 GB of memory" in capsys.readouterr().out


@pytest.fixture(scope="module")
def large(artifacts: list[Artifact], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny BERT with one more output, which takes 1.2 GB to compute."""
    folder = tmp_path_factory.mktemp("large") / "fp32"
    shutil.copytree(artifacts[0].folder, folder)
    model = onnx.load(folder / "model.onnx")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([300_000_000]), "many"))
    model.graph.node.append(onnx.helper.make_node("ConstantOfShape", ["many"], ["zeros"]))
    model.graph.node.append(onnx.helper.make_node("ReduceMin", ["zeros"], ["least"], keepdims=0))
    model.graph.output.append(onnx.helper.make_tensor_value_info("least", onnx.TensorProto.FLOAT, []))
    onnx.save(model, folder / "model.onnx")
    seal(folder, artifacts[0].manifest, {})
    return open_artifact(folder)


def test_a_device_imitates_a_smaller_one(there: Any, artifacts: list[Artifact]) -> None:
    target = f"{there.target()}&memory=2GB&cpus={CPU}"
    (taken,) = load.benchmark(artifacts[:1], target=target, profile=True, **QUICK)
    assert taken.environment["imitation"]["cpus"] == [CPU]
    assert taken.environment["watch"]["seconds"] > 0
    assert taken.profile
    assert taken.profile["nodes"]
    assert there.left == []
