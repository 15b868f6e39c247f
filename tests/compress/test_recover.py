"""Distillation brings back what was lost, mends what goes wrong, and goes on after it was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import pytest
import torch
from edgepress.benchmarks import charts
from edgepress.compress.prune.allocate import by_ratio
from edgepress.compress.prune.reconstruct import reconstruct
from edgepress.compress.prune.schedule import gradual
from edgepress.compress.recover import DivergedError, lora, recover
from edgepress.compress.recover.flow import MOST, Flow
from edgepress.compress.recover.losses import TERMS, look, objective
from edgepress.errors import EdgepressError, InputError, UsageError
from edgepress.models import metrics, surgery
from edgepress.models.checkpoint import read_tensors
from edgepress.models.data import Batch, Data
from edgepress.plan import PruningPlan, Unit

COLUMNS = ("--columns", "text=review,label=stars")


def _equal(first: Any, second: Any) -> bool:
    ours, theirs = first.module.state_dict(), second.module.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _events(recovered: Any) -> list[tuple[str, str]]:
    return [(event["kind"], event["done"]) for entry in recovered.trace for event in entry["events"]]


@pytest.fixture(scope="module")
def pruned(workload: Any) -> Any:
    return ep.prune(workload, ep.score(workload, "random"), ratio=0.6)


def test_distillation_brings_outputs_closer_and_is_deterministic(workload: Any, pruned: Any, output_error: Any) -> None:
    first, second = (ep.recover(pruned, workload, steps=30, batch=16, lr=1e-3) for _ in range(2))
    assert output_error(workload, first.workload) < 0.85 * output_error(workload, pruned)
    assert [entry["step"] for entry in first.trace] == list(range(1, 31))
    assert _equal(first.workload, second.workload)
    assert first.layers == ("outside the blocks", *(f"bert.encoder.layer.{i}" for i in range(3)))
    assert all(len(entry["norms"]) == 4 for entry in first.trace)
    assert all(entry["grad_norm"] == pytest.approx(np.linalg.norm(entry["norms"])) for entry in first.trace)


# ---- losses


@pytest.mark.parametrize("term", TERMS)
def test_every_loss_falls_and_is_nothing_where_nothing_differs(with_rows: Any, term: str) -> None:
    workload = with_rows("bert", 48)
    kwargs = {"losses": (term,), "batch": 16, "lr": 2e-3}
    damaged = surgery.prune(workload, PruningPlan.of([Unit("head", 0, 1), Unit("ffn", 1, 3), Unit("ffn", 1, 4)]))
    losses = [entry["loss"] for entry in recover(damaged, workload, steps=40, **kwargs).trace]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    if term != "labels":
        untouched = recover(surgery.prune(workload, PruningPlan()), workload, steps=1, **kwargs)
        assert untouched.trace[0]["loss"] == pytest.approx(0, abs=1e-12)


def test_shares_of_a_batch_add_up(with_rows: Any) -> None:
    workload = with_rows("bert", 12)
    student = surgery.prune(workload, PruningPlan.of([Unit("head", 0, 0), Unit("ffn", 0, 3)]))
    goal = objective(student, workload, TERMS, temperature=2.0)
    whole = next(iter(workload.data.train.batches(12)))

    def parts(mine: slice) -> Any:
        inputs = {name: tensor[mine] for name, tensor in whole.inputs.items()}
        batch = Batch(whole.rows[mine], inputs, whole.labels[mine])
        return goal(workload.task, batch, look(student, batch, goal.watched(0)), look(workload, batch, goal.watched(1)))

    errors, sizes, weights = parts(slice(None))
    assert sum(weights) == pytest.approx(len(TERMS))
    for place, values in enumerate((errors, sizes)):
        added = sum(parts(slice(rank, None, 3))[place] for rank in range(3))
        torch.testing.assert_close(added, values, rtol=1e-9, atol=0)


def test_blocks_are_compared_with_what_the_next_one_should_read(workload: Any) -> None:
    student = surgery.prune(workload, PruningPlan.of([Unit("block", 1, 0)]))
    goal = objective(student, workload, ("layers", "hidden"), temperature=1.0)
    layer = "bert.encoder.layer"
    assert goal.pairs["layers"] == ((f"{layer}.0", f"{layer}.1"), (f"{layer}.1", f"{layer}.2"))
    assert goal.pairs["hidden"] == ((f"{layer}.1", f"{layer}.2"),)


def test_narrower_streams_are_compared_where_they_are_left(with_rows: Any) -> None:
    workload = with_rows("bert", 32)
    narrow = surgery.prune(workload, PruningPlan.of([Unit("hidden", 0, i) for i in range(16)]))
    trace = recover(narrow, workload, steps=30, batch=16, lr=2e-3, losses=("layers",)).trace
    assert trace[-1]["loss"] < 0.8 * trace[0]["loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": ("hope",)}, "no loss 'hope'"),
        ({"losses": ()}, "no loss"),
        ({"precision": "int3"}, "no precision 'int3'"),
        ({"patience": 2}, "needs evaluate_every"),
        ({"rank": 900}, "larger than the adapters' rank 900"),
    ],
)
def test_options_that_make_no_sense(workload: Any, pruned: Any, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recover(pruned, workload, steps=1, **options)


def test_losses_that_a_model_cannot_have(with_rows: Any) -> None:
    net = with_rows("wide", 20)
    with pytest.raises(UsageError, match="no blocks"):
        recover(net, net, steps=1, losses=("hidden",))
    unlabelled = replace(net, data=replace(net.data, train=replace(net.data.train, labels=None)))
    with pytest.raises(UsageError, match="needs rows with labels"):
        recover(net, unlabelled, steps=1, losses=("labels",))


# ---- trouble


def _with_nan(workload: Any, share: float) -> Any:
    """``workload`` with a NaN in some of its training rows."""
    rows = workload.data.train
    name, values = next(iter(rows.inputs.items()))
    values = np.array(values)
    values[: round(share * len(values))] = np.nan
    return replace(workload, data=Data(replace(rows, inputs={name: values}), workload.data.calibration, rows))


@pytest.fixture(scope="module")
def net(with_rows: Any) -> tuple[Any, Any]:
    """A network on 240 rows of numbers, and the same with half of its units gone."""
    whole = with_rows("wide", 240)
    return whole, surgery.prune(whole, by_ratio(whole.structure, torch.zeros(whole.structure.num_units), 0.5))


def test_a_row_that_is_not_finite_is_survived(net: tuple[Any, Any], output_error: Any) -> None:
    whole, half = net
    poisoned = _with_nan(whole, 1 / 240)
    recovered = recover(half, poisoned, steps=60, batch=16, lr=3e-3)
    assert set(_events(recovered)) == {("not finite", "skipped")}
    assert all(torch.isfinite(parameter).all() for parameter in recovered.workload.module.parameters())
    assert output_error(whole, recovered.workload) < 0.7 * output_error(whole, half)
    assert "not finite, the loss: skipped" in charts.training(recovered.trace), "the report tells"
    assert charts.norms(recovered.layers, recovered.trace).count("<rect") == 48 * len(recovered.layers)


def test_rows_that_are_never_finite_are_one_sentence(net: tuple[Any, Any]) -> None:
    whole, half = net
    with pytest.raises(DivergedError, match=f"so it did {MOST} times before") as caught:
        recover(half, _with_nan(whole, 1.0), steps=60, batch=16)
    assert isinstance(caught.value, EdgepressError)
    with pytest.raises(DivergedError, match="could not take a single step"):
        recover(half, _with_nan(whole, 1.0), steps=3, batch=16)


def test_a_pruned_model_that_is_not_finite_is_refused(workload: Any, pruned: Any) -> None:
    broken = surgery.prune(pruned, PruningPlan())
    with torch.no_grad():
        broken.module.get_submodule("bert.encoder.layer.0.intermediate.dense").bias.fill_(float("nan"))
    with pytest.raises(InputError, match=r"layer\.0\.intermediate\.dense\.bias' are NaN"):
        recover(broken, workload, steps=2)


@pytest.mark.parametrize("lr", [0.3, 10.0])
def test_a_rate_that_explodes_is_survived(workload: Any, pruned: Any, lr: float, output_error: Any) -> None:
    recovered = recover(pruned, workload, steps=60, batch=16, lr=lr)
    assert ("diverging", "went back") in _events(recovered)
    assert recovered.trace[-1]["lr"] < 1e-2 * lr
    assert output_error(workload, recovered.workload) < 0.9 * output_error(workload, pruned)


def test_what_the_monitor_sees() -> None:
    random = np.random.default_rng(0)

    def fed(steps: int = 60) -> Flow:
        flow = Flow(("a", "b"))
        for step in range(steps):
            noise = random.lognormal(0, 0.25, size=3)
            assert not flow.judge(step, 0.98**step * noise[0], [noise[1], 10 * noise[2]]), "nothing is wrong"
        return flow

    assert fed().healthy
    flow = fed()
    seen = [flow.judge(60 + later, 30.0, [1, 10]) for later in range(2)]
    assert [(e["kind"], e["done"]) for events in seen for e in events] == [("spike", "noted"), ("spike", "rate halved")]
    assert flow.rate == 0.5
    flow = fed()
    seen = flow.judge(60, 0.3, [1e-4, 1e4])
    assert [(e["kind"], e["where"][0]) for e in seen] == [("vanishing", "a"), ("exploding", "b")]
    assert not flow.judge(61, 0.3, [1e-4, 10]), "what goes on is not told again"
    flow = fed()
    assert [e["done"] for e in flow.judge(60, float("nan"), [1, 1])] == ["skipped"]
    assert [(e["where"], e["done"]) for e in flow.judge(61, 0.3, [float("inf"), 1])] == [("a", "went back")]
    assert flow.rate == 0.1
    assert Flow.from_json(json.loads(json.dumps(flow.to_json()))) == flow


# ---- killed and resumed

SCRIPT = """
import sys, torch, edgepress as ep
model, rows, state = sys.argv[1:]
whole = ep.load(model, rows, columns={"text": "review", "label": "stars"}, max_length=64)
from edgepress.models.checkpoint import read
from pathlib import Path
half = read(Path(state).with_name("half"), whole.data)
ep.recover(half, whole, checkpoint=Path(state), **{OPTIONS})
"""
OPTIONS = {"steps": 100, "batch": 16, "lr": 1e-3, "evaluate_every": 25}


@pytest.mark.chain
def test_killed_and_resumed_to_the_last_bit(
    workload: Any, pruned: Any, model_folder: Path, reviews_csv: Path, tmp_path: Path
) -> None:
    from edgepress.models import checkpoint

    checkpoint.save(pruned, tmp_path / "half")
    path = tmp_path / "state.safetensors"
    code = SCRIPT.replace("{OPTIONS}", repr(OPTIONS))
    command = [sys.executable, "-c", code, model_folder, reviews_csv, path]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    steps: list[int] = []
    resumed = recover(pruned, workload, checkpoint=path, progress=lambda done, *_: steps.append(done), **OPTIONS)
    assert 20 < steps[0] < 100, "it went on from where it was"
    straight = recover(pruned, workload, **OPTIONS)
    assert _equal(resumed.workload, straight.workload)
    assert json.dumps(resumed.trace) == json.dumps(straight.trace)
    again = recover(pruned, workload, checkpoint=path, progress=lambda *_: pytest.fail("it was finished"), **OPTIONS)
    assert _equal(again.workload, straight.workload)
    with pytest.raises(UsageError, match="another recovery"):
        recover(pruned, workload, checkpoint=path, **{**OPTIONS, "lr": 2e-3})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="does not hold the state"):
        recover(pruned, workload, checkpoint=path, **OPTIONS)
    path.unlink()
    assert [entry.name for entry in tmp_path.iterdir()] == ["half"]


def test_a_state_resumes_after_trouble(net: tuple[Any, Any], tmp_path: Path) -> None:
    """What the monitor has done is part of the state."""
    whole, half = net
    poisoned = _with_nan(whole, 1 / 240)
    options: dict[str, Any] = {"steps": 60, "batch": 16, "lr": 10.0, "checkpoint": tmp_path / "state.safetensors"}

    class Stopped(Exception):  # noqa: N818 - no error
        pass

    def stop(done: int, total: int, note: str) -> None:
        if done == 55:
            raise Stopped

    with pytest.raises(Stopped):
        recover(half, poisoned, progress=stop, **options)
    resumed = recover(half, poisoned, **options)
    straight = recover(half, poisoned, **{**options, "checkpoint": None})
    assert {"diverging", "not finite"} <= {kind for kind, _ in _events(straight)}
    assert _equal(resumed.workload, straight.workload)


# ---- several processes


TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2")
FSDP = ("accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2")


@pytest.mark.chain
@pytest.mark.parametrize("launcher", [TORCHRUN, FSDP], ids=["whole", "sharded"])
def test_two_processes_train_as_one_and_one_of_them_writes(
    edgepress: Any, model_folder: Path, reviews_csv: Path, tmp_path: Path, launcher: tuple[str, ...]
) -> None:
    rows = tmp_path / "few.csv"
    rows.write_text("".join(reviews_csv.read_text().splitlines(keepends=True)[:400]))
    job = ["prune", model_folder, "--data", rows, *COLUMNS, "--method", "magnitude", "--recover", "distill"]
    job += ["--ratio", "head=0.5,ffn=0.8,block=0.34", "--steps", "60", "--lr", "1e-3", "--json", "-o"]
    alone = edgepress(*job, tmp_path / "alone")
    launch = [sys.executable, "-m", *launcher, "-m", "edgepress"]
    command = [*launch, *map(str, job), str(tmp_path / "both")]
    both = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (alone.returncode, both.returncode) == (0, 0), alone.stderr + both.stderr
    ours, theirs = json.loads(both.stdout), json.loads(alone.stdout)
    assert ours["plan"] == theirs["plan"]
    assert ours["quality"]["value"] == pytest.approx(theirs["quality"]["value"], abs=0.5)
    first, second = (read_tensors(tmp_path / name / "model.safetensors") for name in ("alone", "both"))
    assert first.keys() == second.keys()
    _assert_close(second, first)
    assert any(not torch.equal(second[name], tensor) for name, tensor in first.items()), "added up in another order"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "both", "few.csv"]
    assert both.stderr.count("distill …") == 1, "one process prints"


SHARDED = """
import os, sys, torch, edgepress as ep
from pathlib import Path
from edgepress.compress.recover import recover
from edgepress.errors import UnavailableError
from edgepress.models import checkpoint
from torch.optim.optimizer import register_optimizer_step_post_hook

model, rows, folder, stop = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
whole = ep.load(model, rows, columns={"text": "review", "label": "stars"}, max_length=64)
half = checkpoint.read(folder / "half", whole.data)

def held(optimizer, *_):
    parts = [t.to_local() for t in optimizer.param_groups[0]["params"]]
    parts += [state["exp_avg"].to_local() for state in optimizer.state.values()]
    (folder / f"held{os.environ['RANK']}").write_text(str(sum(part.numel() for part in parts)))

def progress(done, *_):
    with (folder / "steps").open("a") as file:
        print(done, file=file)
    if done == stop:
        os._exit(9)

watch = register_optimizer_step_post_hook(held)
full = recover(half, whole, checkpoint=folder / "state", progress=progress, **{OPTIONS})
watch.remove()
adapted = recover(half, whole, rank=3, steps=5, batch=15, lr=5e-3)
try:
    recover(half, whole, losses=("relations",))
except UnavailableError as error:
    (folder / "refused").write_text(str(error))
if os.environ["RANK"] == "1":  # every process has all of the result
    for name, recovered in (("full", full), ("adapted", adapted)):
        checkpoint.save(recovered.workload, folder / name)
"""


@pytest.mark.chain
def test_sharded_training_goes_on_after_it_was_killed(
    workload: Any, pruned: Any, model_folder: Path, reviews_csv: Path, tmp_path: Path
) -> None:
    from edgepress.models import checkpoint

    checkpoint.save(pruned, tmp_path / "half")
    options = {"steps": 40, "batch": 15, "lr": 1e-3, "evaluate_every": 15}
    script = tmp_path / "script.py"
    script.write_text(SHARDED.replace("{OPTIONS}", repr(options)))

    def run(stop: int) -> Any:
        command = [sys.executable, "-m", *FSDP, script, model_folder, reviews_csv, tmp_path, str(stop)]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=300)

    assert run(35).returncode != 0
    after = run(0)
    assert after.returncode == 0, after.stderr
    steps = (tmp_path / "steps").read_text().split()
    assert steps == [str(step) for step in (*range(1, 36), *range(21, 41))], "it went on from where it was"
    assert "'relations' alone" in (tmp_path / "refused").read_text()
    parts = [int((tmp_path / f"held{rank}").read_text()) for rank in range(2)]
    tables = sum(p.numel() for name, p in pruned.module.named_parameters() if "embeddings." in name and p.dim() == 2)
    assert sum(parts) == 2 * (pruned.params - tables), "weights and their momenta"
    assert max(parts) < 0.51 * sum(parts), "each holds a half"
    alone = recover(pruned, workload, **options)
    _assert_close(read_tensors(tmp_path / "full" / "model.safetensors"), alone.workload.module.state_dict())
    adapted = recover(pruned, workload, rank=3, steps=5, batch=15, lr=5e-3)
    _assert_close(read_tensors(tmp_path / "adapted" / "model.safetensors"), adapted.workload.module.state_dict())


def _assert_close(found: Any, wanted: Any) -> None:
    for name, tensor in found.items():
        if not name.endswith("key.bias"):  # its gradient is nothing but rounding, which Adam makes whole steps of
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-4, msg=name)


# ---- adapters, precision, held-out rows, rounds


def test_adapters_alone_are_trained_and_merged(workload: Any, pruned: Any, tmp_path: Path, output_error: Any) -> None:
    path = tmp_path / "state.safetensors"
    recovered = recover(pruned, workload, steps=40, batch=16, lr=5e-3, rank=4, checkpoint=path)
    assert output_error(workload, recovered.workload) < 0.9 * output_error(workload, pruned)
    held = read_tensors(path)
    assert all(name.endswith(("weight.0.a", "weight.0.b")) for name in held)
    assert sum(tensor.numel() for tensor in held.values()) < 0.5 * 3 * pruned.params
    before, after = pruned.module.state_dict(), recovered.workload.module.state_dict()
    assert before.keys() == after.keys(), "the adapters are merged"
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.endswith("weight") and before[name].dim() == 2 and "embeddings" not in name for name in moved)


def test_merged_adapters_compute_the_same(with_rows: Any) -> None:
    for name in ("bert", "gpt2"):
        workload = with_rows(name)
        trained = lora.adapt(workload.module, 2, seed=1)
        batch = next(iter(workload.data.train.batches(8)))
        with torch.no_grad():
            plain = workload.forward(batch.inputs)
            for parameter in trained:
                parameter.add_(0.1)
            adapted = workload.forward(batch.inputs)
            lora.merge(workload.module)
            merged = workload.forward(batch.inputs)
        assert not torch.allclose(plain, adapted)
        assert torch.equal(adapted, merged)


def test_bfloat16_stays_near_float32(workload: Any, pruned: Any) -> None:
    options: dict[str, Any] = {"steps": 10, "batch": 16, "lr": 1e-3}
    half, single = (recover(pruned, workload, precision=name, **options) for name in ("bf16", "fp32"))
    assert {tensor.dtype for tensor in half.workload.module.parameters()} == {torch.float32}
    assert not _equal(half.workload, single.workload)
    assert half.trace[-1]["loss"] == pytest.approx(single.trace[-1]["loss"], rel=0.1)


def _divergence(workload: Any, changed: Any) -> float:
    """From the original's answers, on the rows that are held out."""
    rows = workload.data.train.pick(np.arange(round(0.1 * len(workload.data.train))))
    found, wanted = (metrics.answers(item, rows, metric="kl") for item in (changed, workload))
    return metrics.quality("kl", found, None, original=wanted).value


def test_the_best_weights_on_held_out_rows_are_kept(workload: Any, pruned: Any) -> None:
    judged = replace(workload, data=replace(workload.data, metric="kl"))
    recovered = recover(pruned, judged, steps=60, batch=16, lr=1e-3, evaluate_every=20)
    values = {entry["step"]: entry["held_out"] for entry in recovered.trace if "held_out" in entry}
    assert list(values) == [20, 40, 60]
    assert _divergence(workload, recovered.workload) == pytest.approx(min(values.values()), rel=1e-4)


def test_training_ends_where_it_gets_no_better(workload: Any, pruned: Any) -> None:
    solved = recover(pruned, workload, steps=30, batch=16, lr=1e-3).workload
    judged = replace(workload, data=replace(workload.data, metric="kl"))
    recovered = recover(solved, judged, steps=100, batch=16, lr=3e-2, evaluate_every=2, patience=3)
    values = [entry["held_out"] for entry in recovered.trace if "held_out" in entry]
    best = int(np.argmin(values))
    assert len(values) == best + 4, "three judgements after the best one"
    assert len(recovered.trace) < 100
    assert _divergence(workload, recovered.workload) == pytest.approx(min(values), rel=1e-4)


def test_pruning_in_rounds(workload: Any) -> None:
    def plan_for(current: Any, ratio: dict[str, float]) -> PruningPlan:
        return by_ratio(current.structure, ep.score(current, "magnitude").values, ratio)

    seen: list[int] = []  # channels after each round

    def restore(current: Any) -> Any:
        seen.append(sum(site.count for site in current.structure.of_kind("ffn")))
        return recover(reconstruct(workload, current), workload, steps=5, batch=16).workload

    ratio = {"head": 0.5, "ffn": 0.5}
    slow = gradual(workload, plan_for, restore, ratio=ratio, rounds=3)
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) == 3
    at_once = surgery.prune(workload, plan_for(workload, ratio))
    kinds = {kind: [sum(s.count for s in w.structure.of_kind(kind)) for w in (slow, at_once)] for kind in ratio}
    assert kinds["head"][0] == kinds["head"][1]
    assert abs(kinds["ffn"][0] - kinds["ffn"][1]) <= 3 * 16
    assert slow.plan.indices("ffn", 0), "one plan, in the original's numbering"
    with pytest.raises(UsageError, match="0 rounds"):
        gradual(workload, plan_for, restore, ratio=ratio, rounds=0)
