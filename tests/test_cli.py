"""The command line: every verb does its work, and bad use is one sentence and exit code 2."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

COLUMNS = ("--columns", "text=review,label=stars")
WRITING = [
    ["prune", "zoo:minilm-reviews"],
    ["export", "zoo:minilm-reviews"],
    ["quantize", "zoo:minilm-reviews"],
    ["quantize", "zoo:minilm-reviews", "--max-drop", "1%"],
]
"""What replaces a folder with what it makes."""


def refused(done: Any, message: str) -> None:
    assert done.returncode == 2, done.stderr + done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_verbs_one_after_the_other(here: Any, model_folder: Path, reviews_csv: Path, tmp_path: Path) -> None:
    data = ("--data", reviews_csv, *COLUMNS, "--json")

    def run(*args: Any) -> Any:
        done = here(*args)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    found = run("inspect", model_folder, *data)
    assert len(found["blocks"]) == 3
    scored = run("score", model_folder, *data, "--method", "taylor", "-o", tmp_path / "scores.json")
    assert len(scored["units"]) == 3 * (4 + 128 + 1) + 64
    assert json.loads((tmp_path / "scores.json").read_text()) == scored
    pruned = run("prune", model_folder, *data, "--ratio", "0.5", "-o", tmp_path / "pruned")
    assert pruned["params_after"] < pruned["params_before"]
    assert pruned["quality"]["drop"] is not None
    exported = run("export", tmp_path / "pruned", *data, "--to", "onnx", "-o", tmp_path / "fp32")
    assert exported["parity"]["max_abs"] < 1e-3
    quantized = run("quantize", tmp_path / "pruned", *data, "--scheme", "int8-dynamic", "-o", tmp_path / "int8")
    assert quantized["precision"] == "int8-dynamic"
    measure = ("--queries", 50, "--seconds", 1, "--json")
    rows = run(
        "bench", tmp_path / "fp32", tmp_path / "int8", "--target", "cpu:1", "--batch", "1,2", "--seq", "16", *measure
    )
    assert [row["batch"] for row in rows["rows"]] == [1, 1, 2, 2]
    assert rows["environment"]["cpus"] >= 1
    assert len(run("targets", "--json")["targets"]) >= 5
    listed = {(row["kind"], row["name"]) for row in run("methods", "--json")["methods"]}
    assert {("score", "fisher"), ("quantizer", "int8-dynamic"), ("runtime", "onnx"), ("family", "bert")} <= listed
    assert all(row["source"] and row["what"] for row in run("methods", "--json")["methods"])


def test_pruning_to_a_speed(here: Any, model_folder: Path, reviews_csv: Path, tmp_path: Path) -> None:
    """Out of reach: the fastest model there is is written, and exit code 3 says so."""
    args = (
        "--data",
        reviews_csv,
        *COLUMNS,
        "--method",
        "taylor",
        "--target",
        "cpu:1",
        "--seq",
        32,
        "--speedup",
        "900x",
    )
    done = here("prune", model_folder, *args, "--recover", "none", "--json", "-o", tmp_path / "out")
    assert done.returncode == 3, done.stderr
    assert "cannot be pruned to 900x; the fastest found has" in done.stderr
    found = json.loads(done.stdout)
    speed = found["speed"]
    assert speed["sequence"] == 32
    assert speed["predicted_speedup"] > 1
    assert len(found["plan"]["block"]) == 2, "all blocks but one went"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_scores_as_tables(here: Any, model_folder: Path, reviews_csv: Path, tmp_path: Path) -> None:
    import pandas as pd

    data = ("--data", reviews_csv, *COLUMNS, "--rows", "8", "--json")
    for ending, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        done = here("score", model_folder, *data, "--method", "all", "-o", tmp_path / f"scores.{ending}")
        assert done.returncode == 0, done.stderr
        units = json.loads(done.stdout)["units"]
        methods = list(units[0]["scores"])
        assert {"masked_taylor", "second_order", "block_influence", "random"} < set(methods)
        assert "ablation" not in methods
        expected = [
            (unit["kind"], unit["layer"], unit["index"], method, unit["scores"][method], unit["params"], unit["macs"])
            for method in methods
            for unit in units
        ]
        frame = read(tmp_path / f"scores.{ending}")
        assert list(frame.columns) == ["kind", "layer", "index", "method", "value", "params", "macs"]
        assert list(frame.itertuples(index=False, name=None)) == expected


def test_scores_and_their_trials(
    here: Any, model_folder: Path, reviews_csv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--method", "head-gate,ablation", "--rows", "8", "--validate", "4", "--trial-rows", "8")
    args = ("score", model_folder, "--data", reviews_csv, *COLUMNS, *options)
    document = json.loads(here(*args, "--json").stdout)
    assert (document["rows"], document["trial_rows"]) == (8, 8)
    assert list(document["units"][0]["scores"]) == list(document["validation"]) == ["head_gate", "ablation"]
    for kinds in document["validation"].values():
        assert set(kinds) == {"head", "ffn", "block", "hidden"}
        assert {"n", "spearman", "low", "high", "kendall", "regret", "ceiling", "sets", "curve"} <= set(kinds["head"])
        assert kinds["head"]["n"] == 4
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        done = here(*args)
        assert done.returncode == 0, done.stderr
        assert max(map(len, done.stdout.splitlines())) <= columns
        for kind in ("head", "ffn", "block", "hidden"):
            assert f"\n{kind}: rank correlation of methods" in done.stdout
            assert f"\n{kind}: {4 if kind != 'block' else 3} units in trials" in done.stdout
    area = document["validation"]["ablation"]["head"]["curve"]["area"]
    assert f" {area:.3g}" in done.stdout


def test_a_recipe_writes_methods_with_hyphens_too() -> None:
    from edgepress import recipe

    found = recipe.from_mapping({"model": "zoo:minilm-reviews", "score": {"method": "masked-taylor"}}, "here")
    assert found.score.method == "masked_taylor"


def test_compare_and_report_of_a_run(here: Any, finished_run: Path) -> None:
    done = here("compare", finished_run)
    assert done.returncode == 0
    assert "original fp32" in done.stdout
    (finished_run / "report.html").unlink()
    assert here("report", finished_run).returncode == 0
    assert (finished_run / "report.html").is_file()


@pytest.mark.parametrize("verb", ["inspect", "score", "prune", "targets", "methods"])
def test_tables_for_people(here: Any, model_folder: Path, reviews_csv: Path, tmp_path: Path, verb: str) -> None:
    model = () if verb in {"targets", "methods"} else (model_folder, "--data", reviews_csv, *COLUMNS)
    done = here(verb, *model, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 2


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:10000])


def _with_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _with_code(folder: Path) -> None:
    (folder / "modeling.py").write_text("raise SystemExit('ran')")


def _of_another_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))


def _with_a_bin_that_is_none(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _without_a_layer(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncated, "cannot be loaded"),
        (_with_nan, "NaN or infinite"),
        (_with_code, "does not run"),
        (_of_another_type, "'mamba'"),
        (_with_a_bin_that_is_none, "holds more than tensors"),
        (_without_a_layer, "lacks 1 of the model's tensors"),
    ],
)
def test_bad_models(
    here: Any, model_folder: Path, reviews_csv: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    damage(folder)
    done = here("compress", folder, "--data", reviews_csv, *COLUMNS, "-o", tmp_path / "run")
    refused(done, message)
    assert not (tmp_path / "run/artifact").exists()


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("review,stars\ngood,1\n", "text=review,label=rating", "no column 'rating'"),
        ("", "text=review,label=stars", "is empty"),
        (
            "review,stars\n" + "".join(f"row {i},1\n" for i in range(50)),
            "text=review,label=stars",
            "at least two labels",
        ),
        ("review,stars\n" + "".join(f"row {i},{i}\n" for i in range(50)), "text=review,label=stars", "not one of"),
        ("review,stars\na,0\nb,1\n", "text=review,label=stars", "at least 20"),
    ],
)
def test_bad_rows(here: Any, model_folder: Path, tmp_path: Path, content: str, columns: str, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content)
    refused(here("score", model_folder, "--data", path, "--columns", columns, "--json"), message)


def test_labels_the_wrong_way_round(
    here: Any, model_folder: Path, reviews_csv: Path, small_recipe: Path, tmp_path: Path
) -> None:
    import pandas as pd

    frame = pd.read_csv(reviews_csv, dtype=str)
    frame["stars"] = frame["stars"].map({"0": "1", "1": "0"})
    frame.to_csv(tmp_path / "wrong.csv", index=False)
    args = ("--data", tmp_path / "wrong.csv", *COLUMNS, "--recipe", small_recipe, "-o", tmp_path / "run")
    refused(here("compress", model_folder, *args), "labels of the rows do not match")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["compress"], "Give a MODEL"),
        (["compress", "zoo:nope"], "minilm-reviews"),
        (["compress", "nowhere"], "no model folder 'nowhere'"),
        (["compress", "zoo:minilm-reviews", "--target", "toaster"], "no target 'toaster'"),
        (["compress", "zoo:minilm-reviews", "--target", "tensorrt"], "not available yet"),
        (["compress", "zoo:minilm-reviews", "--max-drop", "lots"], "'lots' is not a drop"),
        (["compress", "zoo:minilm-reviews", "--max-size", "3 bananas"], "not a size"),
        (["compress", "zoo:minilm-reviews", "--speedup", "2x", "--max-latency", "5ms"], "not both"),
        (["compress", "zoo:minilm-reviews", "--recipe", "nowhere.yaml"], "nowhere.yaml"),
        (["compress", "--resume", "-o", "nowhere"], "no run to resume"),
        (["compress", "zoo:minilm-reviews", "-o", "/dev/null"], "is a file"),
        (["compress", "zoo:minilm-reviews", "-o", "/dev/null/run"], "cannot be written"),
        (["score", "zoo:minilm-reviews", "--method", "nope"], "no score 'nope'"),
        (["score", "zoo:minilm-reviews", "--method", "fisher,nope"], "no score 'nope'"),
        (["score", "zoo:minilm-reviews", "-o", "scores.txt"], "neither a folder nor a file that ends in .json"),
        (["score", "zoo:minilm-reviews", "-o", "/dev/null"], "neither a folder nor"),
        (["quantize", "zoo:minilm-reviews", "--scheme", "fp8"], "onnx runtime cannot write the scheme 'fp8'"),
        (["export", "zoo:minilm-reviews", "--to", "tensorrt", "--scheme", "int4"], "cannot write the scheme 'int4'"),
        (["export", "zoo:minilm-reviews", "--capability", "sm89"], "--capability is of --to tensorrt"),
        (["quantize", "zoo:minilm-reviews", "--scheme", "int3"], "no scheme 'int3'"),
        (["export", "zoo:minilm-reviews", "--to", "openvino", "--scheme", "fp8"], "cannot write the scheme 'fp8'"),
        (["prune", "zoo:minilm-reviews", "--recover", "hope"], "no recovery 'hope'"),
        (["prune", "zoo:minilm-reviews", "--speedup", "2x", "--ratio", "0.5"], "--speedup or --ratio, not both"),
        (["prune", "zoo:minilm-reviews", "--speedup", "2x", "--uniform"], "--speedup or --uniform, not both"),
        (["prune", "zoo:minilm-reviews", "--target", "cpu"], "give both"),
        (["prune", "zoo:minilm-reviews", "--speedup", "fast"], "'fast' is not a speedup"),
        (["prune", "zoo:minilm-reviews", "--speedup", "1x"], "must be above 1"),
        (["prune", "zoo:minilm-reviews", "--speedup", "2x", "--target", "toaster"], "no target 'toaster'"),
        (["prune", "zoo:minilm-reviews", "--speedup", "2x", "--precision", "int3"], "no scheme 'int3'"),
        *[
            (["prune", "zoo:minilm-reviews", option, value], f"{option} is of --speedup; give both")
            for option, value in (("--batch", "2"), ("--seq", "32"), ("--precision", "fp32"))
        ],
        (["prune", "zoo:minilm-reviews", "--steps", "9"], "--steps is of --recover distill"),
        (["prune", "zoo:minilm-reviews", "--lr", "1e-3"], "--lr is of --recover distill"),
        (["prune", "zoo:minilm-reviews", "--sparsity", "2:4", "--method", "fisher"], "--method is of --ratio"),
        (["prune", "zoo:minilm-reviews", "--ratio", "1.5"], "has 1.5; a share must be at least 0 and below 1"),
        (["prune", "zoo:minilm-reviews", "--ratio", "head=0.5,ffn=-1"], "has -1; a share"),
        (["prune", "zoo:minilm-reviews", "--ratio", "nan"], "has nan; a share"),
        (["quantize", "zoo:minilm-reviews", "--batch", "2"], "--batch is of --max-drop"),
        (["quantize", "zoo:minilm-reviews", "--seq", "32"], "--seq is of --max-drop"),
        (["quantize", "any.onnx", "--trust-remote-code"], "takes --data with an .npz file"),
        (["quantize", "any.onnx", "--seq", "32"], "takes --data with an .npz file"),
        (["score", "zoo:minilm-reviews", "--trial-rows", "9"], "--trial-rows is of --validate"),
        (["export", "nowhere", "--verify", "-o", "out"], "--verify takes an artifact folder alone"),
        (["inspect", "zoo:minilm-reviews", "--columns", "text=a"], "--columns is of --data"),
        (["compress", "zoo:minilm-reviews", "--columns", "text=a"], "--columns is of --data"),
        (["compress", "--resume", "--recipe", "r.yaml"], "leave --recipe"),
        *[([*words, "-o", "."], "current folder") for words in WRITING],
        *[([*words, "-o", "/dev/null/out"], "/dev/null/out cannot be written") for words in WRITING],
        (["score", "zoo:minilm-reviews", "-o", "/dev/null/scores"], "/dev/null/scores cannot be written"),
        (["score", "zoo:minilm-reviews", "-o", "/dev/null/scores.csv"], "/dev/null cannot be written"),
        (["inspect", "zoo:minilm-reviews", "-o", "/dev/null"], "/dev/null cannot be written"),
        (["sensitivity", "zoo:minilm-reviews", "-o", "/dev/null/a.svg"], "/dev/null cannot be written"),
        (["quantize", "any.onnx", "-o", "/dev/null/out.onnx"], "/dev/null cannot be written"),
        (["bench", "nowhere", "--profile", "-o", "/dev/null"], "/dev/null cannot be written"),
        (["compare", "zoo:minilm-reviews", "-o", "/dev/null/a.md"], "/dev/null cannot be written"),
        (["bench", "nowhere"], "no artifact folder"),
        (["bench", ".", "--batch", "x"], "not an artifact"),
        (["compare", "."], "not a finished run"),
        (["report", "."], "not a finished run"),
    ],
)
def test_bad_use(here: Any, tmp_path: Path, args: list[str], message: str) -> None:
    refused(here(*args, cwd=tmp_path), message)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_files_is_not_taken_for_a_run(here: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(here("compress", "zoo:minilm-reviews", "-o", tmp_path), "holds other files")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_is_replaced_only_where_edgepress_wrote_it(
    here: Any, model_folder: Path, reviews_csv: Path, tmp_path: Path
) -> None:
    work, smaller = tmp_path / "work", tmp_path / "smaller"
    work.mkdir()
    (work / "thesis.tex").write_text("years of work")
    for words in WRITING:
        refused(here(*words, "-o", work), f"{work} would be replaced, and holds something else")
    refused(here("prune", model_folder, "-o", model_folder), "is read from there")
    assert [path.name for path in work.iterdir()] == ["thesis.tex"]
    args = ("--data", reviews_csv, *COLUMNS, "--method", "magnitude", "--recover", "none", "--json", "-o", smaller)
    for ratio in ("0.25", "0.5"):
        done = here("prune", model_folder, *args, "--ratio", ratio)
        assert done.returncode == 0, done.stderr
    kept = json.loads(done.stdout)["plan"]
    assert json.loads((smaller / "edgepress.json").read_text())["plan"] == kept, "the later one"
    refused(here("prune", smaller, "-o", smaller), "is read from there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["smaller", "work"]


def test_kinds_of_units_are_known_before_anything_is_scored(
    here: Any, model_folder: Path, reviews_csv: Path, tmp_path: Path
) -> None:
    args = ("--data", reviews_csv, *COLUMNS, "--ratio", "heads=0.5", "-o", tmp_path / "out")
    done = here("prune", model_folder, *args)
    refused(done, "There are no 'heads' units in this model (there are: head, ffn")
    assert "score" not in done.stderr
    assert "evaluate" not in done.stderr


def test_a_metric_judges_rows(here: Any, model_folder: Path, tmp_path: Path) -> None:
    refused(here("prune", model_folder, "--metric", "accuracy", "-o", tmp_path / "out"), "--metric judges rows")


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    """Ctrl-C, while the recipe is read from a pipe into which nobody writes."""
    pipe = tmp_path / "recipe.yaml"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "edgepress", "compress", "--recipe", str(pipe), "-o", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    writer = None
    while writer is None and process.poll() is None:
        try:
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # it does not read yet
            time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    if writer is not None:
        os.close(writer)  # a read that began just before the signal came ends, too
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert err == "edgepress: interrupted; finished stages are kept, and --resume goes on from there.\n"


def test_other_commands_are_interrupted_without_it(here: Any, tmp_path: Path) -> None:
    (tmp_path / "model_of_the_impatient.py").write_text("def net():\n    raise KeyboardInterrupt\n")
    done = here("inspect", "model_of_the_impatient:net", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1] == "edgepress: interrupted."


def test_all_faults_of_a_recipe_at_once(here: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("model: zoo:minilm-reviews\nlevels: [{head: 2}]\nrecover: {steps: -1}\ncolour: red\n")
    done = here("compress", "--recipe", path, "-o", tmp_path / "run")
    refused(done, "levels.0.head")
    assert "recover.steps" in done.stderr
    assert "colour" in done.stderr


def test_a_full_disk(edgepress: Any, model_folder: Path, reviews_csv: Path, tmp_path: Path) -> None:
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    out = tmp_path / "pruned"
    args = ("--data", reviews_csv, *COLUMNS, "--recover", "none", "-o", out)
    refused(edgepress("prune", model_folder, *args, preexec_fn=small_files), "cannot be written")
    assert not list(tmp_path.iterdir())


def test_help_answers_at_once_and_without_torch() -> None:
    code = "import sys, edgepress; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    best = 9.0
    for _ in range(3):  # CPU time, not wall time; the least of three shrugs off what else the machine does
        before = os.times()
        done = subprocess.run([sys.executable, "-m", "edgepress", "--help"], capture_output=True, check=True)
        after = os.times()
        best = min(best, after.children_user + after.children_system - before.children_user - before.children_system)
        assert b"compress" in done.stdout
    assert best < 0.5
