"""Runtimes open what they are given and answer as it does; models stand beside artifacts, and both are judged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import pytest
import torch
from edgepress.benchmarks import device, judge, load, runner, subjects, targets
from edgepress.benchmarks.runtimes import onnx as onnx_runtime
from edgepress.errors import InputError, UnavailableError, UsageError
from edgepress.export.artifact import Artifact, open_artifact, seal
from edgepress.export.backends import onnx as onnx_backend
from edgepress.models import metrics

QUICK = ("--seq", "16", "--queries", "30", "--json")


@pytest.fixture(scope="module")
def rows(reviews_csv: Path) -> tuple[Any, ...]:
    return ("--data", reviews_csv, "--columns", "text=review,label=stars")


def refused(done: Any, message: str) -> None:
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.strip().count("\n") == 0


# ---- one runtime at a time


def test_every_runtime_is_a_file_with_an_opener_and_a_device() -> None:
    files = {path.stem for path in Path(onnx_runtime.__file__).parent.glob("*.py")} - {"__init__"}
    assert files == set(runner.RUNTIMES) == set(targets.RUNS_ON) == set(targets.TITLES)
    assert {word[0] for word in targets.WORDS} == files


def test_onnx_writes_every_run_into_the_same_buffers(artifacts: list[Artifact]) -> None:
    told = {"model": str(artifacts[0].model_file), "disabled_optimizers": []}
    feeds = load.arbitrary(artifacts[0], 2, 16)
    session = onnx_runtime.session(told, 1)
    run = onnx_runtime.bound(session, feeds, "cpu")
    wanted = session.run(None, feeds)
    for _ in range(2):
        (found,) = (runner.on_host(one) for one in run())
        np.testing.assert_array_equal(found, wanted[0])
    assert run()[0] is run()[0]


@pytest.mark.skipif("cuda" in device.providers(), reason="ONNX Runtime has its CUDA provider here")
@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("form", ["", "tensorrt"])
def test_onnx_does_not_fall_back_to_the_cpu(artifacts: list[Artifact], form: str) -> None:
    told = {"model": str(artifacts[0].model_file), "disabled_optimizers": [], "device": "cuda", "form": form}
    name = "TensorrtExecutionProvider" if form else "CUDAExecutionProvider"
    with pytest.raises(SystemExit, match=rf"does not run on its {name} here .*: pip install .* brings the libraries"):
        onnx_runtime.session(told, 1)


def test_what_libraries_print_is_no_part_of_the_answer(artifacts: list[Artifact], tmp_path: Path) -> None:
    """A runtime that talks on both streams, as ONNX Runtime does of libraries that it does not find."""
    for source in load.SHIPPED:
        shutil.copy(source, tmp_path)
    (tmp_path / "runtime_onnx.py").write_text(
        "import os\n\ndef open_model(artifact, threads, feeds):\n    print('loud')\n    os.write(1, b'louder')\n"
        "    return lambda: [next(iter(feeds.values()))]\n"
    )
    np.savez(tmp_path / "feeds.npz", **{"0.input.x": np.arange(3.0)})
    job = {"mode": "answers", "threads": 1, "values": 9, "artifacts": [{"runtime": "onnx", "feeds": "feeds.npz"}]}
    command = [sys.executable, "runner.py", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert json.loads(done.stdout) == {"answers": [[{"shape": [3], "values": [0.0, 1.0, 2.0]}]]}
    assert "louder" in done.stderr


@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("bf16", 5e-2)])
def test_pytorch_answers_as_the_module_does(workload: Any, tmp_path: Path, precision: str, limit: float) -> None:
    pruned = ep.prune(workload, ep.score(workload, "magnitude"), ratio=0.5)
    opened = subjects.original(pruned, tmp_path / "checkpoint")
    feeds = load.arbitrary(opened, 2, 16)
    told = load._told(opened, targets.Target("local", "torch", "cpu", 1, precision=precision))
    threads = torch.get_num_threads()
    (found,) = runner.open_model({**told, "model": str(opened.model_file)}, threads, feeds)()
    wanted = pruned.forward(metrics.tensors(feeds)).detach()
    assert found.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    np.testing.assert_allclose(runner.on_host(found), wanted, atol=limit * float(wanted.abs().max()))


@pytest.mark.slow  # a compiler runs
def test_pytorch_compiles(workload: Any, tmp_path: Path) -> None:
    opened = subjects.original(workload, tmp_path / "checkpoint", "zoo:mine")
    (taken,) = load.benchmark([opened], target="torch:compile:1", sequence=16, min_queries=30)
    assert (taken.runtime, taken.artifact, taken.precision) == ("torch compile", "zoo:mine", "fp32")
    assert taken.load_ms
    assert taken.size_bytes == (tmp_path / "checkpoint" / "model.safetensors").stat().st_size


# ---- side by side


def test_a_model_beside_its_artifact(
    here: Any, artifacts: list[Artifact], workload: Any, model_folder: Path, rows: Any
) -> None:
    done = here("bench", model_folder, artifacts[0].folder, "--target", "cpu:1", *rows, *QUICK)
    assert done.returncode == 0, done.stderr
    original, exported = json.loads(done.stdout)["rows"]
    assert (original["artifact"], original["runtime"], original["precision"]) == (str(model_folder), "torch", "fp32")
    assert original["params"] == workload.params
    assert exported["runtime"] == "onnx"
    assert exported["speedup"]["value"] > 0
    assert original["peak_rss_bytes"] > exported["peak_rss_bytes"] > 0
    assert original["quality"]["drop"] is None
    assert original["quality"]["value"] == metrics.of_module(workload).value
    assert exported["quality"]["drop"] == pytest.approx(0, abs=100 / exported["quality"]["n"])
    assert exported["quality"]["drop_low"] <= exported["quality"]["drop"] <= exported["quality"]["drop_high"]


def test_artifacts_alone_are_judged_on_the_rows_that_are_kept_for_it(
    artifacts: list[Artifact], workload: Any, reviews_csv: Path
) -> None:
    """The same rows as with the model, and so none that the ranges of the second were calibrated on."""
    by = judge.judge(artifacts, str(reviews_csv), columns={"text": "review", "label": "stars"})
    assert by.data.evaluation.keys == workload.data.evaluation.keys
    assert by.data.calibration.keys == workload.data.calibration.keys
    assert (by.metric, by.task) == (workload.data.metric, workload.task)
    first, second = judge.qualities(artifacts, by, targets.parse("cpu:1"))
    assert first.drop is None
    assert second.drop == pytest.approx(first.value - second.value)
    with onnx_backend.open_session(artifacts[1]) as session:
        assert second.value == metrics.of_session(session.run, workload).value


def test_a_function_s_module_is_run_because_the_user_named_it(here: Any, tmp_path: Path) -> None:
    (tmp_path / "mine_to_bench.py").write_text(
        "import torch\n\n\ndef made():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)), "
        "torch.zeros(1, 8)\n"
    )
    random = np.random.default_rng(0)
    np.savez(tmp_path / "rows.npz", input=random.standard_normal((60, 8)).astype("f"), label=np.arange(60) % 3)
    word = "mine_to_bench:made"
    try:
        done = here("export", word, "--data", "rows.npz", "-o", "small", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        done = here("bench", word, "small", "--target", "cpu:1", "--data", "rows.npz", *QUICK, cwd=tmp_path)
    finally:
        sys.modules.pop("mine_to_bench", None)
    assert done.returncode == 0, done.stderr
    original, small = json.loads(done.stdout)["rows"]
    assert (original["artifact"], original["sequence"]) == (word, 0)
    assert original["quality"]["n"] == small["quality"]["n"] == 24
    (tmp_path / "mine_to_bench.py").unlink()  # an artifact needs no code, and names none that is run
    done = here("bench", "small", "--target", "cpu:1", "--data", "rows.npz", *QUICK, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["quality"] == {**small["quality"], **dict.fromkeys(DROPS)}


DROPS = ("drop", "drop_low", "drop_high")


def test_compare_measures_the_shapes_that_are_asked_for(here: Any, artifacts: list[Artifact], rows: Any) -> None:
    folders = [one.folder for one in artifacts]
    options = ("--target", "cpu:1", "--batch", "1,2", "--seq", "8", *rows, "--metric", "f1")
    done = here("compare", *folders, *options, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    found = [document["original"], *document["results"]]
    assert [(row["batch"], row["sequence"]) for row in found] == [(1, 8), (1, 8), (2, 8), (2, 8)]
    assert {row["quality"]["metric"] for row in found} == {"f1"}
    refused(here("compare", folders[0], "--seq", "65"), "was proven for sequence 1 to 64, not 65")


# ---- what goes wrong


def test_what_cannot_be_measured_or_judged(here: Any, artifacts: list[Artifact], rows: Any, tmp_path: Path) -> None:
    folder = artifacts[0].folder
    refused(here("bench", folder, "--target", "torch:1"), "runs models in PyTorch, and none is given")
    refused(here("bench", folder, "--metric", "f1"), "--metric is of --data; give both")
    judged = ("bench", folder, "--seq", "16", *rows)
    refused(here(*judged, "--metric", "wer"), "wer needs generated text")
    refused(here(*judged, "--metric", "spearman"), "'spearman' does not judge the answers of")
    refused(here("bench", folder, "--seq", "16", "--data", tmp_path / "none.csv"), "none.csv")
    refused(here("bench", folder, *rows), "was proven for sequence 1 to 64, not 128")


def test_artifacts_of_before_and_of_other_questions(
    artifacts: list[Artifact], reviews_csv: Path, tmp_path: Path
) -> None:
    def changed(name: str, **changes: Any) -> Artifact:
        shutil.copytree(artifacts[0].folder, tmp_path / name)
        manifest = seal(tmp_path / name, artifacts[0].manifest.model_copy(update=changes), {})
        return Artifact(open_artifact(tmp_path / name).folder, manifest)

    options: dict[str, Any] = {"columns": {"text": "review", "label": "stars"}}
    with pytest.raises(InputError, match="was written before artifacts kept what tells how they are judged"):
        judge.judge([changed("old", architecture="")], str(reviews_csv), **options)
    other = changed("other", labels=("ham", "spam"))
    with pytest.raises(UsageError, match="cannot be judged together: ham, spam against negative, positive"):
        judge.judge([artifacts[0], other], str(reviews_csv), **options)
    wider = {**artifacts[0].manifest.inputs, "encoder_hidden_states": artifacts[0].manifest.inputs["input_ids"]}
    with pytest.raises(UsageError, match="takes 'encoder_hidden_states', which the rows do not have"):
        judge.judge(
            [replace(artifacts[0], manifest=changed("part", inputs=wider).manifest)], str(reviews_csv), **options
        )


@pytest.mark.parametrize("word", ["cuda", "cuda:tensorrt", "tensorrt", "torch:cuda", "torch:cuda:compile:fp16"])
@pytest.mark.skipif(device.gpu() is not None, reason="there is an NVIDIA GPU here")
def test_a_gpu_that_is_not_there_is_one_sentence(here: Any, artifacts: list[Artifact], word: str) -> None:
    done = here("bench", artifacts[0].folder, "--target", word)
    refused(done, f"The target '{word}' cannot run here: ")
    assert "NVIDIA GPU" in done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "ssh://me@host/cuda",
        "ssh://me@host/cuda:tensorrt",
        "torch:1",
        "torch",
        "torch:bf16:1",
    ],
)
def test_words_come_back(text: str) -> None:
    target = targets.parse(text)
    assert str(target).startswith(text)
    assert targets.parse(str(target)) == target


@pytest.mark.parametrize(
    "text", ["torch:0", "torch:graph", "torch:cuda:1", "torch:fp16:compile", "cuda:1", "cuda:openvino", "tensorrt:1"]
)
def test_words_that_do_not_exist(text: str) -> None:
    with pytest.raises(UsageError, match=r"There is no target|asks for 0 threads"):
        targets.parse(text)


@pytest.mark.parametrize("word", ["torch:1", "tensorrt", "torch:cuda"])
def test_what_needs_edgepress_is_measured_here_alone(word: str, workload: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="on this machine alone, not over ssh: install edgepress on me@host"):
        targets.parse(f"ssh://me@host/{word}")
    model = subjects.original(workload, tmp_path / "checkpoint")
    with pytest.raises(UsageError, match="runs in PyTorch, which is measured on this machine alone, not on me@host"):
        load.benchmark([model], target="ssh://me@host/cpu:1")


def test_the_list_of_targets_has_every_word_and_what_adds_it(here: Any) -> None:
    found = json.loads(here("targets", "--json").stdout)["targets"]
    words = {row["target"] for row in found}
    assert {"cpu:1", "torch:1", "torch:compile:1", "cuda", "cuda:tensorrt", "tensorrt", "torch:cuda"} <= words
    for row in found:
        assert row["available"] == (not row["missing"])
        assert all(lack["what"] in row["note"] for lack in row["missing"])
        assert all(lack["command"] is None or lack["command"] in row["note"] for lack in row["missing"])
    assert next(row for row in found if row["runtime"] == "onnx")["versions"]["onnxruntime"]
    if device.gpu() is None:
        gone = {lack["what"] for row in found if row["target"] == "cuda" for lack in row["missing"]}
        assert gone & {"an NVIDIA GPU", "the NVIDIA GPU's driver"}


def test_a_missing_package_is_named_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.missing, "find_spec", lambda _: None)
    for runtime in ("openvino", "executorch", "tensorrt"):
        lacks = targets.missing.here(runtime)
        assert f"pip install 'edgepress[{runtime}]' brings it." in targets.missing.sentence(lacks)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UnavailableError, match=r"a C\+\+ compiler \(no-such-compiler\) is missing: sudo apt-get"):
        targets.parse("torch:compile:1")


def test_rotary_frequencies_keep_their_precision() -> None:
    from edgepress.benchmarks.runtimes.torch import narrowed
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 50, (1, 1500))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        before = model.model.rotary_emb.inv_freq.clone()
        made = narrowed(model, "cpu", torch.bfloat16)(input_ids=ids).logits.float()
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert float((made - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
