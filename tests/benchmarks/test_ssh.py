"""Devices over ssh, through a real sshd on this machine that has keys and a configuration of its own."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import edgepress as ep
import onnx
import pytest
from edgepress.benchmarks import device, environment, load, targets
from edgepress.benchmarks.targets import ssh
from edgepress.errors import EdgepressError, ParityError, UnavailableError, UsageError
from edgepress.export.artifact import Artifact, open_artifact, seal
from onnx import numpy_helper

pytestmark = pytest.mark.chain

PAGE = Path(__file__).parents[2] / "docs" / "devices.md"
QUICK: dict[str, Any] = {"sequence": 16, "min_queries": 60}
LONG: dict[str, Any] = {"sequence": 16, "min_queries": 10**6, "min_seconds": 3.0, "memory": False}


# ---- measuring


def test_artifacts_are_measured_over_there(there: Any, artifacts: list[Artifact]) -> None:
    seen: list[str] = []
    taken = load.benchmark(
        artifacts, target=there.target(word="/cpu"), progress=lambda *step: seen.append(step[2]), **QUICK
    )
    cpus = targets.usable_cpus()
    assert [len(one.samples) for one in taken] == [60, 60]
    assert all(one.samples.min() > 0 and one.load_ms and (one.peak_rss_bytes or 0) > 1 << 20 for one in taken)
    assert taken[0].target == there.target(word=f"/cpu:{cpus}")
    wanted = environment.fingerprint(cpus)
    assert taken[0].environment["packages"] == wanted["packages"]
    assert taken[0].environment["cpu"] == wanted["cpu"]
    assert ep.compare(taken)[1]["speedup"]["value"] > 0
    assert there.left == []
    assert there.ended("device.py")


def test_scenarios_work_over_there(there: Any, artifacts: list[Artifact]) -> None:
    for options in ({"scenario": "offline"}, {"scenario": "server", "rate": 50.0, "deadline_ms": 9.0}):
        first, second = load.benchmark(artifacts, target=there.target(), memory=False, **QUICK, **options)
        assert len(first.samples) == len(second.samples) == 60
        assert first.scenario == second.scenario == options["scenario"]
        assert first.environment["clock_overhead_ns"] > 0
        assert bool(first.loads) == (options["scenario"] == "server") == (first.within is not None)
        assert ep.compare([first, second])[1]["speedup"]["value"] > 0


def test_what_did_not_arrive_whole_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what earlier connections left of the same file, when it is sent again."""
    content = b"a model" * 1000
    digest = hashlib.sha256(content).hexdigest()
    files = tmp_path / "files"

    def sent(content: bytes) -> Any:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        with redirect_stdout(io.StringIO()) as said:
            device.receive(str(tmp_path), digest)
        return json.loads(said.getvalue())

    assert sent(content[:100]) == {"end": True, "whole": False}
    assert not list(files.iterdir())
    (files / f"{digest}.1").write_bytes(content[:100])
    (files / "another.1").write_bytes(b"")
    assert sent(content) == {"end": True, "whole": True}
    assert sorted(path.name for path in files.iterdir()) == sorted([digest, "another.1"])
    assert (files / digest).read_bytes() == content


def test_a_device_that_computes_something_else_is_an_error(
    there: Any, artifacts: list[Artifact], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artifacts[0].folder, folder)
    graph = onnx.load(folder / "model.onnx")
    for weight in graph.graph.initializer:
        array = numpy_helper.to_array(weight)
        if array.ndim == 2 and "embeddings" not in weight.name:
            weight.CopyFrom(numpy_helper.from_array((array / 2).astype(array.dtype), weight.name))
    onnx.save(graph, folder / "model.onnx")
    seal(folder, open_artifact(artifacts[0].folder).manifest, {})
    with pytest.raises(ParityError, match="does not compute on device what it computed where it was proven"):
        load.benchmark([open_artifact(folder)], target=there.target(), **QUICK)
    assert there.left == []


def test_a_decoder_s_step_is_held_to_its_reference_too(there: Any, tmp_path: Path) -> None:
    """Its references leave out the keys and values of no tokens."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=300, n_positions=64)).save_pretrained(model)
    step = ep.export(ep.load(str(model)), tmp_path / "step", cache=48)
    taken = load.benchmark([step], target=there.target(), past=8, **{**QUICK, "sequence": 1})
    assert len(taken[0].samples) == 60


def test_what_is_there_is_not_sent_again(
    there: Any, artifacts: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    real = ssh.Device._send

    def watched(device: ssh.Device, path: Path, *rest: Any) -> None:
        sent.append(path.name)
        real(device, path, *rest)

    monkeypatch.setattr(ssh.Device, "_send", watched)
    with targets.connect(targets.parse(there.target())) as (host, _):
        load.benchmark(artifacts, target=there.target(), **QUICK)
        load.benchmark(artifacts, target=there.target(), **QUICK)
        assert sorted(sent).count("model.onnx") == 2
        assert sent.count("runner.py") == 1
        load.benchmark(artifacts[:1], target=there.target(), **QUICK)
        assert {path.read_bytes() for path in Path(host._folder).glob("place*/model.onnx")} == {
            artifacts[0].model_file.read_bytes()
        }  # the other one went
    assert "tokenizer.json" not in sent
    assert there.left == []


def test_odd_names_are_only_names(there: Any, artifacts: list[Artifact], tmp_path: Path) -> None:
    odd = type(there)(tmp_path / 'o\'dd $(touch pwned) `touch pwned`; touch "pwned" & %h')
    odd.folder.mkdir()
    folder = tmp_path / "a b; touch pwned'"
    shutil.copytree(artifacts[0].folder, folder)
    (taken,) = load.benchmark([open_artifact(folder)], target=odd.target(), **QUICK)
    assert len(taken.samples) == 60
    assert str(targets.parse(taken.target)) == taken.target
    assert odd.left == []
    assert not list(tmp_path.rglob("pwned"))
    assert not (Path.home() / "pwned").exists()


# ---- what goes wrong


def once(action: Callable[[], None]) -> Callable[[int, int, str], None]:
    """A progress that acts on the first rounds that it hears of."""
    acted: list[bool] = []

    def step(_done: int, _total: int, note: str) -> None:
        if note == "rounds" and not acted:
            acted.append(True)
            action()

    return step


def test_a_lost_connection_is_survived(there: Any, artifacts: list[Artifact]) -> None:
    address = targets.parse(there.target()).address
    assert address
    masters: list[int] = []
    runners: list[list[int]] = []

    def cut() -> None:
        master = ssh._open[address]._master
        assert master
        masters.append(master.pid)
        runners.append(there.processes("runner.py"))
        master.kill()

    with targets.connect(targets.parse(there.target())) as (host, _):
        taken = load.benchmark(artifacts, target=there.target(), progress=once(cut), **LONG)
        assert host._master.pid != masters[0]
        assert len(list(Path(host._folder).glob("*.lock"))) == 3  # two answers and one measurement: nothing ran twice
    assert len(runners[0]) >= 1
    assert len(taken[0].samples) == len(taken[1].samples) > 100
    assert there.left == []


@pytest.mark.parametrize(("word", "said"), [("runner.py", "was killed by signal 9"), ("work", "was killed: where")])
def test_a_process_that_is_killed_over_there(there: Any, artifacts: list[Artifact], word: str, said: str) -> None:
    def kill() -> None:
        for process in there.processes("runner.py"):
            if word == "work":
                os.killpg(os.getpgid(process), signal.SIGKILL)
            elif "work" not in Path(f"/proc/{process}/cmdline").read_text().split("\0"):
                os.kill(process, signal.SIGKILL)

    with pytest.raises(EdgepressError, match=said) as raised:
        load.benchmark(artifacts, target=there.target(), progress=once(kill), **LONG)
    assert raised.value.exit_code == 2
    assert there.left == []


def test_ctrl_c_leaves_nothing(there: Any, artifacts: list[Artifact]) -> None:
    targets_ = [word for host in ("device", "other") for word in ("--target", there.target(host))]
    heeding = ["env", "--default-signal=INT"]  # where the tests themselves run in the background, it is not heeded
    command = [*heeding, sys.executable, "-m", "edgepress", "bench", artifacts[0].folder, *targets_]
    client = subprocess.Popen(
        [*command, "--seq", "16", "--queries", "1000000", "--seconds", "300"], stderr=subprocess.PIPE
    )
    end = time.monotonic() + 120
    while len(there.processes('"latency"')) < 2 and time.monotonic() < end:  # one on each host
        time.sleep(0.1)
    client.send_signal(signal.SIGINT)
    client.communicate(timeout=60)
    assert client.returncode == 130
    assert there.left == []
    assert there.ended("runner.py")


def test_a_client_that_is_killed_takes_its_connection_along(there: Any) -> None:
    code = "from edgepress.benchmarks.targets import ssh; device = ssh.Device(ssh.Address('device')); "
    code += "print(device._local, flush=True); input()"
    client = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert client.stdout
    control = client.stdout.readline().strip()

    def connections() -> int:
        found = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        return sum(b"ControlPath=" + control in line for line in found)

    assert connections() == 1
    client.kill()
    client.communicate()
    end = time.monotonic() + 30
    while connections() and time.monotonic() < end:
        time.sleep(0.1)
    assert connections() == 0
    shutil.rmtree(control.decode())


def test_a_client_that_is_gone_leaves_nothing(there: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "LEASE_SECONDS", 2.0)
    device = ssh.Device(targets.parse(there.target()).address or pytest.fail())
    try:
        device.claim()
        device._call("start", "job", sys.executable, "-c", "import time; time.sleep(600)  # runner.py", device._folder)
        assert len(there.left) == 1
        end = time.monotonic() + 60
        while there.left and time.monotonic() < end:
            time.sleep(0.2)
        assert there.left == []
        assert there.ended("runner.py")
        device.renew()  # one that was only asleep begins anew
        assert len(there.left) == 1
    finally:
        device.close()
    assert there.left == []


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("impostor", "The host key of impostor is not the one in known_hosts"),
        ("stranger", "The host key of stranger is not known here: 'ssh stranger' shows it"),
        ("closed", "closed refuses your key: 'ssh-copy-id closed' brings it there"),
        ("nobody-there", "nobody-there cannot be reached"),
        ("no-such-host.invalid", "There is no host 'no-such-host.invalid'"),
    ],
)
@pytest.mark.usefixtures("there")
def test_hosts_that_are_not_to_be_had(here: Any, sshd: Path, host: str, said: str) -> None:
    done = here("targets", f"ssh://{host}")
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (sshd / "known_nobody").exists()  # nobody was trusted on the way


def test_a_device_without_a_runtime(here: Any, there: Any, artifacts: list[Artifact], tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = tmp_path / "bare" / "bin" / "python"
    target = there.target(python=str(python))
    done = here("bench", artifacts[0].folder, "--target", target)
    assert done.returncode == 2
    wanted = f"There is no numpy and no onnxruntime on device: 'ssh device {python} -m pip install numpy onnxruntime'"
    assert wanted in done.stderr
    done = here("bench", artifacts[0].folder, "--target", there.target(python="/no/python"))
    assert done.returncode == 2
    assert "There is no '/no/python' on device" in done.stderr
    done = here("bench", artifacts[0].folder, "--target", there.target(word="/cpu:4096"))
    assert done.returncode == 2
    assert "asks for 4096 threads; device has" in done.stderr
    done = here("bench", artifacts[0].folder, "--target", f"ssh://device?python={sys.executable}&folder=/no/such")
    assert done.returncode == 2
    assert "no folder can be made in /no/such" in done.stderr
    assert there.left == []


def test_a_python_that_the_system_keeps_to_itself(here: Any, there: Any) -> None:
    """Debian's own refuses pip, so a virtual environment is what helps."""
    if not list(Path("/usr/lib").glob("python3*/EXTERNALLY-MANAGED")) or not Path("/usr/bin/python3").exists():
        pytest.skip("no Python of a distribution that manages its packages alone (PEP 668) is installed")
    done = here("targets", there.target(word="", python="/usr/bin/python3"), "--json")
    assert done.returncode == 0, done.stderr
    missing = [row["note"] for row in json.loads(done.stdout)["targets"] if not row["available"]]
    assert missing
    assert all("/usr/bin/python3 -m venv venv && venv/bin/python -m pip install" in note for note in missing)


def test_a_full_disk_over_there(there: Any, artifacts: list[Artifact]) -> None:
    size = artifacts[0].size_bytes // 2
    mounted = subprocess.run(
        [shutil.which("mount") or "mount", "-t", "tmpfs", "-o", f"size={size}", "edgepress-test", there.folder],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(
            UnavailableError, match=r"On device the disk that holds .* is full: .*\?folder=PATH"
        ) as raised:
            load.benchmark(artifacts[:1], target=there.target(), **QUICK)
        assert raised.value.exit_code == 2
        assert there.left == []
    finally:
        subprocess.run([shutil.which("umount"), there.folder], check=True)


# ---- several, and the command line


def test_two_targets_give_two_rows(here: Any, there: Any, artifacts: list[Artifact]) -> None:
    first, second = there.target("device"), there.target("other")
    where = [word for target in (first, second, "cpu:1") for word in ("--target", target)]
    done = here("bench", artifacts[0].folder, *where, "--queries", "40", "--seq", "16", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [row["target"] for row in document["rows"]] == [first, second, "cpu:1"]
    assert set(document["environments"]) == {first, second, "cpu:1"}
    assert document["environment"] == document["environments"][first]
    assert all(row["latency_ms"]["n"] == 40 for row in document["rows"])
    assert there.left == []


def test_compare_on_two_targets(
    here: Any, there: Any, artifacts: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = load.benchmark
    monkeypatch.setattr(load, "benchmark", lambda *args, **options: real(*args, **{**options, **QUICK}))
    folders = [artifact.folder for artifact in artifacts]
    done = here("compare", *folders, "--target", there.target(), "--target", "cpu:1", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    rows = [document["original"], *document["results"]]
    assert [row["target"] for row in rows] == [there.target()] * 2 + ["cpu:1"] * 2
    assert [bool(row["speedup"]) for row in rows] == [False, True, False, True]


def test_one_target_that_fails_ends_the_command_before_anything_is_measured(
    here: Any, there: Any, artifacts: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "benchmark", lambda *_args, **_options: pytest.fail("something was measured"))
    done = here("bench", artifacts[0].folder, "--target", there.target(), "--target", "ssh://closed")
    assert done.returncode == 2
    assert "closed refuses your key" in done.stderr
    assert there.left == []


def test_hosts_work_at_the_same_time_and_targets_of_one_host_in_turn() -> None:
    meeting, turn = threading.Barrier(3), threading.Lock()
    names = ["ssh://a/cpu:1", "ssh://b/cpu:1", "cpu:1", "ssh://me@A:22/cpu:2"]

    def work(target: targets.Target) -> str:
        if target.where.lower().endswith("a"):
            assert turn.acquire(blocking=False)
            time.sleep(0.05)
            turn.release()
        if str(target) in names[:3]:
            meeting.wait(30)  # passed only if all three are here at once
        return str(target)

    assert targets.at_once([targets.parse(name) for name in names], work) == names


def test_what_a_device_is(here: Any, there: Any) -> None:
    done = here("targets", there.target(word=""), "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["environment"]["packages"]["onnxruntime"]
    rows = {row["target"]: row for row in document["targets"]}
    assert rows[there.target(word="/cpu:1")]["available"]
    assert "onnxruntime" in rows[there.target(word="/cpu:1")]["note"]
    assert here("targets", "cpu").returncode == 2
    assert there.left == []


def test_a_latency_table_is_measured_on_the_device(
    there: Any, workload: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgepress.benchmarks import latency

    monkeypatch.setattr(latency, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(latency, "POINTS", 4)
    options: dict[str, Any] = {"sequence": 16, "seconds": 0.1}
    table = latency.measure(workload, target=there.target(), **options)
    assert table.target == there.target()
    assert table.total_ms > 0
    assert latency.measure(workload, target=there.target(), **options) == table
    assert there.left == []


@pytest.mark.slow
def test_a_model_is_compressed_for_a_device(
    there: Any, here: Any, model_folder: Path, reviews_csv: Path, small_recipe: Path, tmp_path: Path
) -> None:
    """Every latency of the run is the device's, and nothing of it stays there."""
    rows = ("--data", reviews_csv, "--columns", "text=review,label=stars")
    target = ("--target", there.target(), "--recipe", small_recipe)
    done = here("compress", model_folder, *rows, *target, "-o", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert len(document["results"]) >= 2
    assert {row["target"] for row in (document["original"], *document["results"])} == {there.target()}
    assert there.left == []


# ---- words


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("ssh://pi@raspberry", "ssh://pi@raspberry/cpu"),
        ("ssh://raspberry/", "ssh://raspberry/cpu"),
        ("ssh://pi@10.0.0.7:2222/cpu:2", None),
        ("ssh://pi@[fe80::1%eth0]:22/cpu:openvino:4", None),
        ("ssh://pi@host/cpu:openvino?python=/opt/a%20b/c%2B%2B&folder=/mnt/sd", None),
        ("ssh://pi@host/cpu:1?python=python3", "ssh://pi@host/cpu:1"),
    ],
)
def test_a_target_says_what_it_is(text: str, written: str | None) -> None:
    target = targets.parse(text)
    assert str(target) == (written or text)
    assert targets.parse(str(target)) == target


@pytest.mark.parametrize(
    "text",
    [
        "ssh://",
        "ssh:///cpu",
        "ssh://-oProxyCommand=x",
        "ssh://-l@host",
        "ssh://a b",
        "ssh://host;reboot",
        "ssh://host\nother",
        "ssh://$(x)@host",
        "ssh://host:0",
        "ssh://host:99999",
        "ssh://user:password@host",
        "ssh://host/cpu:0",
        "ssh://host/gpu",
        "ssh://host/cpu/cpu",
        "ssh://host?python=",
        "ssh://host?python=a%0Ab",
        "ssh://host?shell=zsh",
    ],
)
def test_targets_that_do_not_exist(text: str) -> None:
    with pytest.raises(UsageError):
        targets.parse(text)


def test_the_runner_and_the_far_end_need_no_edgepress(tmp_path: Path) -> None:
    """Only what every device has: the standard library, and of that no more than Python 3.8 knew. Each runtime is
    imported where it is opened, ExecuTorch's with PyTorch, which it needs."""
    import ast

    from edgepress.benchmarks import device, imitate, meters, profilers, runner
    from edgepress.benchmarks.runtimes import executorch, onnx, openvino

    alone = ((device, set()), (imitate, set()), (meters, set()), (runner, {"numpy"}))
    sent = ((onnx, {"onnxruntime"}), (openvino, {"openvino"}), (executorch, {"executorch", "torch"}))
    for module, allowed in (*alone, (profilers, {"executorch", "torch"}), *sent):
        source = Path(module.__file__).read_text(encoding="ascii")
        tree = ast.parse(source, feature_version=(3, 8))
        names = {
            (alias.name if isinstance(node, ast.Import) else node.module or "").split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert names - set(sys.stdlib_module_names) <= allowed
        at_once = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        assert at_once - set(sys.stdlib_module_names) <= {"numpy"}
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]


def test_the_commands_of_the_page_run(there: Any, edgepress: Any, artifacts: list[Artifact], tmp_path: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = [line for block in blocks for line in block.splitlines() if line.startswith("edgepress ")]
    assert len(found) >= 4
    (tmp_path / "out").mkdir()
    for name, artifact in zip(("fp32", "int8"), artifacts, strict=True):
        (tmp_path / "out" / name).symlink_to(artifact.folder)
    for line in found:  # as the user that this is, and its Python
        words = shlex.split(line.replace("pi@", "").replace("venv/bin/python", sys.executable))
        done = edgepress(*words[1:], cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
