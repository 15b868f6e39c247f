"""Mixed precision from the command line and in a recipe, on a BERT in which one product cannot be rounded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from edgepress.benchmarks import mixed
from edgepress.compress import quantize as quantizers
from edgepress.errors import ParityError, UsageError
from edgepress.export.artifact import open_artifact
from edgepress.models.metrics import Quality
from edgepress.recipe import Recipe
from edgepress.stages import Silent
from edgepress.workshop import Workshop
from safetensors.torch import load_file, save_file

from .test_cli import COLUMNS, refused

pytestmark = pytest.mark.chain

SPOILT = "bert.encoder.layer.1.attention.output.dense"
RUINED = "bert.encoder.layer.2.output.dense"
UNLABELLED = ("--columns", "text=review,label=-")
ALLOWED = 1e-4
"""Nats from the original's answers, of which rounding the spoilt product takes some times as many."""


@pytest.fixture(scope="module")
def spoilt(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of one layer's values much larger, and the product that reads them as much smaller: the same function.

    Rounded in one range with them, of the other half little is left.
    """
    folder = tmp_path_factory.mktemp("spoilt") / "model"
    shutil.copytree(model_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    value = SPOILT.replace("output.dense", "self.value")
    for name in (f"{value}.weight", f"{value}.bias"):
        tensors[name][::2] *= 150
    tensors[f"{SPOILT}.weight"][:, ::2] /= 150
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def ruined(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A channel of the last feed-forward that is huge and read by nobody, and the others of more weight: in one range
    with it they are rounded away, and so is most of the answer."""
    folder = tmp_path_factory.mktemp("ruined") / "model"
    shutil.copytree(model_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{RUINED.replace('output', 'intermediate')}.bias"][0] = 3e6
    tensors[f"{RUINED}.weight"] *= 30
    tensors[f"{RUINED}.weight"][:, 0] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def few(reviews_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("few") / "reviews.csv"
    path.write_text("".join(reviews_csv.read_text().splitlines(keepends=True)[:400]))
    return path


def test_sensitivity_as_a_table_and_a_chart(here: Any, spoilt: Path, few: Path, tmp_path: Path) -> None:
    args = ("sensitivity", spoilt, "--data", few, *COLUMNS, "--scheme", "int8-dynamic", "--rows", 8)
    found = json.loads(here(*args, "--json", "-o", tmp_path / "chart.svg").stdout)
    assert found["rows"] == 8
    assert found["operators"][0]["name"] == SPOILT
    assert found["operators"][0]["all_but_it"] < found["whole"] / 2
    assert "bert.encoder.layer.0" in here(*args).stdout
    names = {entry["name"] for entry in found["operators"]}
    assert len(names) == 3 * 6 + 1
    tips = re.findall("<title>(.*?)</title>", (tmp_path / "chart.svg").read_text())
    assert {tip.rsplit(" alone: ", 1)[0] for tip in tips if " alone: " in tip} == names
    assert {re.sub(r"all but (.*): .*", r"\1", tip) for tip in tips if tip.startswith("all but ")} == names


def test_the_worst_stay_in_float(here: Any, spoilt: Path, few: Path, tmp_path: Path) -> None:
    """Whether it pays is a matter of measured times: exit code 3 says that it does not, and the file is written."""
    limits = ("--metric", "kl", "--max-drop", ALLOWED, "--target", "cpu:1", "--seq", 32)
    args = ("quantize", spoilt, "--data", few, *UNLABELLED, *limits, "-o", tmp_path / "out", "--json")
    done = here(*args)
    assert done.returncode == 0 or (done.returncode == 3 and "is slower" in done.stderr), done.stderr
    found = json.loads(done.stdout)
    assert SPOILT in found["mixed"]["in_float"]
    assert found["quality"]["metric"] == "kl"
    assert found["quality"]["drop"] <= ALLOWED
    original, whole, best = found["rows"]
    assert original["quality"]["drop"] is None
    assert whole["quality"]["drop"] > ALLOWED
    assert whole["size_bytes"] < best["size_bytes"] < original["size_bytes"]
    costs = found["mixed"]["costs"]
    assert costs["milliseconds"].keys() == costs["alone"].keys() == costs["without"].keys()
    assert min(costs["milliseconds"].values()) > 0
    manifest = open_artifact(tmp_path / "out").manifest
    assert manifest.name == "out"
    assert not manifest.quantized.keys() & set(found["mixed"]["in_float"])
    assert manifest.operators["MatMulIntegerToFloat"] == len(manifest.quantized) - 1


def test_nothing_stays_in_float_where_nothing_must(here: Any, model_folder: Path, few: Path, tmp_path: Path) -> None:
    limits = ("--max-drop", "50%", "--target", "cpu:1", "--seq", 32)
    done = here("quantize", model_folder, "--data", few, *COLUMNS, *limits, "-o", tmp_path / "out")
    assert done.returncode == 0 or (done.returncode == 3 and "is slower" in done.stderr), done.stderr
    assert "in float   nothing (0 of 19 operators)" in done.stdout


def test_a_recipe_keeps_operators_in_float(
    here: Any, spoilt: Path, few: Path, small_recipe: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    lines = [line for line in small_recipe.read_text().splitlines() if not line.startswith(("levels", "limits"))]
    recipe.write_text("\n".join([*lines, "levels: []", "metric: kl", f"limits: {{max_drop: {ALLOWED}}}"]))
    args = ("compress", spoilt, "--data", few, *UNLABELLED, "--recipe", recipe, "--json")
    done = here(*args, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    refusals = {entry["stage"]: entry for entry in found["refused"]}
    assert refusals["int8-dynamic"]["drop"] > ALLOWED
    if refusals["int8-dynamic"]["speedup"]["verdict"] != "faster":
        return  # what stays in float cannot make it faster
    (kept,) = json.loads((tmp_path / "run/summary.json").read_text())["mixed"]
    assert SPOILT in kept["in_float"]
    assert found["results"][0]["name"] == kept["variant"]
    assert found["results"][0]["quality"]["drop"] <= ALLOWED
    assert f"- {SPOILT}" in (tmp_path / "run/report.md").read_text()
    assert 'id="in-float"' in (tmp_path / "run/report.html").read_text()


def test_a_recipe_trains_with_rounding_in_the_loop(
    here: Any, spoilt: Path, few: Path, small_recipe: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    lines = [line for line in small_recipe.read_text().splitlines() if not line.startswith(("le", "li", "quantize"))]
    more = "quantize: {scheme: int8-dynamic, steps: 25, mixed: false}"
    recipe.write_text("\n".join([*lines, "levels: []", "metric: kl", f"limits: {{max_drop: {ALLOWED}}}", more]))
    args = ("compress", spoilt, "--data", few, *UNLABELLED, "--recipe", recipe, "--json")
    done = here(*args, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    refusals = {entry["stage"]: entry for entry in found["refused"]}
    if refusals["int8-dynamic"]["speedup"]["verdict"] != "faster":
        return
    kept = {row["name"]: row["quality"]["drop"] for row in found["results"]}
    kept |= {entry["variant"]: entry["drop"] for entry in found["refused"]}
    assert kept["int8-dynamic only, distilled"] < 0.7 * refusals["int8-dynamic"]["drop"]
    assert not list((tmp_path / "run").rglob("unfinished"))


def test_steps_train_with_rounding_in_the_loop(here: Any, spoilt: Path, few: Path, tmp_path: Path) -> None:
    args = ("quantize", spoilt, "--data", few, *UNLABELLED, "--json")
    assert here(*args, "-o", tmp_path / "before").returncode == 0
    done = here(*args, "--steps", 25, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["precision"] == "int8-dynamic"
    assert found["parity"]["cosine"] > 0.99
    before, after = (open_artifact(tmp_path / name).manifest for name in ("before", "out"))
    assert before.quantized == after.quantized
    assert before.files["model.onnx"] != after.files["model.onnx"]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def test_a_file_that_is_not_proven_keeps_in_float_what_it_must(
    here: Any, ruined: Path, few: Path, tmp_path: Path
) -> None:
    done = here("quantize", ruined, "--data", few, *COLUMNS, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert f"in float: {RUINED}\n" in done.stderr
    manifest = open_artifact(tmp_path / "out").manifest
    assert RUINED not in manifest.quantized
    assert len(manifest.quantized) == 3 * 6
    assert manifest.parity is not None
    assert manifest.parity.cosine > 0.95
    refused(here("quantize", ruined, "-o", tmp_path / "no"), "tried on rows: give them with --data")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_rotated_values(here: Any, model_folder: Path, few: Path, tmp_path: Path) -> None:
    args = ("quantize", model_folder, "--data", few, *COLUMNS, "--json")
    plain, turned = here(*args, "-o", tmp_path / "plain"), here(*args, "--rotate", "-o", tmp_path / "turned")
    assert "residual stream" not in plain.stderr
    assert "The residual stream of model cannot be rotated" in turned.stderr.replace("tiny-bert", "model")
    first, second = (open_artifact(tmp_path / name).manifest for name in ("plain", "turned"))
    assert first.files["model.onnx"] != second.files["model.onnx"]
    assert first.quantized == second.quantized
    assert second.parity is not None
    assert second.parity.cosine > 0.99
    refused(here("quantize", "any.onnx", "--rotate"), "takes --data with an .npz file")


def test_the_seed_reaches_calibration_and_rotation(
    here: Any, model_folder: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the command and a recipe plan with is looked at, and no file is written."""
    seeds: list[int] = []

    def plan(workload: Any, scheme: str, **options: Any) -> Any:
        seeds.append(options["seed"])
        raise UsageError("That is all.")

    monkeypatch.setattr(quantizers, "quantize", plan)
    for command in ("quantize", "export"):
        source = (command, model_folder, "--data", few, *COLUMNS)
        ended = here(*source, "--scheme", "int8", "--seed", 7, "-o", tmp_path / "o")
        assert "That is all." in ended.stderr
    run = Workshop.__new__(Workshop)
    run.recipe, run.show = Recipe(model=str(model_folder), seed=9), Silent()
    with pytest.raises(UsageError, match="That is all"):
        run._plan(None, "int8")  # type: ignore[arg-type] # nothing looks at it
    assert seeds == [7, 7, 9]


def test_within_a_drop_too(here: Any, ruined: Path, few: Path, tmp_path: Path) -> None:
    limits = ("--max-drop", "5%", "--target", "cpu:1", "--seq", 32)
    done = here("quantize", ruined, "--data", few, *COLUMNS, *limits, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0 or (done.returncode == 3 and "none (another function), 1 (" in done.stderr), done.stderr
    found = json.loads(done.stdout)
    assert found["mixed"]["in_float"] == [RUINED]
    assert len(found["rows"]) == 2  # there is no file with all of them quantized to be measured


def test_compress_goes_on_with_a_mix(here: Any, ruined: Path, few: Path, small_recipe: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    lines = [line for line in small_recipe.read_text().splitlines() if not line.startswith(("le", "li", "quantize"))]
    more = "quantize: {scheme: int8-dynamic, rotate: true}"
    recipe.write_text("\n".join([*lines, "levels: []", "metric: kl", "limits: {max_drop: 0.05}", more]))
    done = here("compress", ruined, "--data", few, *UNLABELLED, "--recipe", recipe, "-o", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "residual stream" in done.stderr  # of a BERT the values alone are rotated
    refusals = {entry["stage"]: entry for entry in found["refused"]}
    assert "the int8-dynamic artifact is" in refusals["int8-dynamic"]["reason"]
    assert refusals["int8-dynamic"]["drop"] is None
    if "mixed-int8-dynamic" in refusals:
        assert "slower" in refusals["mixed-int8-dynamic"]["reason"]
        assert "none (another function), 1 (" in refusals["mixed-int8-dynamic"]["reason"]
    else:
        (kept,) = json.loads((tmp_path / "run/summary.json").read_text())["mixed"]
        assert kept["in_float"] == [RUINED]
        assert found["results"][0]["name"] == kept["variant"]


def test_what_was_tried_is_named(here: Any, spoilt: Path, few: Path, tmp_path: Path) -> None:
    limits = ("--metric", "kl", "--max-drop", 0, "--target", "cpu:1", "--seq", 32)
    done = here("quantize", spoilt, "--data", few, *UNLABELLED, *limits, "-o", tmp_path / "out")
    assert done.returncode == 3
    assert re.search(
        r"18 of 19 operators in float it .* operators left in float: none \(.*, 1 \(.*, 18 \(", done.stderr
    )
    assert open_artifact(tmp_path / "out").manifest.quantized


def costs() -> mixed.Costs:
    alone = {"a": 3.0, "b": 2.0, "c": 1.0}
    return mixed.Costs(mixed.Sensitivity(6.0, alone, dict.fromkeys(alone, 6.0)), {})


def test_attempts_that_are_not_proven_are_worse_than_any_that_is() -> None:
    def attempt(in_float: tuple[str, ...]) -> Told:
        if len(in_float) < 2:
            raise ParityError(f"{len(in_float)} in float: 0.9 away.")
        return Told(2.0)

    for limit in (None, 2.5):
        found = mixed.search(attempt, costs, limit)
        assert found.in_float == ("a", "b")
        assert "none (another function), 1 (another function), 2 (2.00 points lost)" in found.tried
    assert mixed.search(attempt, costs, 1.0).best.quality.drop == 2.0

    def never(in_float: tuple[str, ...]) -> Told:
        raise ParityError(f"{len(in_float)} in float: 0.9 away.")

    with pytest.raises(ParityError, match=r"2 in float: 0\.9 away\. No mix .*: none \(.*, 1 \(.*, 2 \(another"):
        mixed.search(never, costs)
    whole = Told(0.5)
    assert mixed.search(lambda _: whole, lambda: pytest.fail("nothing need be weighed"), 1.0).best is whole


class Told:
    def __init__(self, drop: float) -> None:
        self.quality = Quality("accuracy", 90, 89, 91, 100, drop, drop, drop)


def test_where_even_one_quantized_operator_is_too_much_the_last_attempt_is_given() -> None:
    kept, trial = mixed.fewest(["a", "b", "c"], lambda in_float: Told(5.0 - len(in_float)), Told(5.0), 1.0)
    assert kept == ("a", "b")
    assert trial.quality.drop == 3.0
    assert mixed.fewest(["a", "b", "c"], lambda in_float: Told(5.0 - len(in_float)), Told(5.0), 3.5)[0] == ("a", "b")
    whole = Told(0.5)
    assert mixed.fewest(["a"], lambda _: Told(0.0), whole, 1.0) == ((), whole)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("sensitivity", "zoo:minilm-reviews", "-o", "chart.png"), "not a file that ends in .svg"),
        (("quantize", "zoo:minilm-reviews", "--max-drop", "lots"), "'lots' is not a drop"),
        (("quantize", "zoo:minilm-reviews", "--max-drop", "1%", "--scheme", "int4"), "not of int4"),
        (("quantize", "zoo:minilm-reviews", "--max-drop", "1%", "--target", "toaster"), "no target 'toaster'"),
        (("quantize", "zoo:minilm-reviews", "--target", "cpu"), "give both"),
        (("quantize", "zoo:minilm-reviews", "--steps", 5, "--scheme", "int4"), "trains for int8"),
        (("quantize", "zoo:minilm-reviews", "--steps", 5, "--max-drop", "1%"), "leave --max-drop"),
    ],
)
def test_bad_use(here: Any, tmp_path: Path, args: tuple[str, ...], message: str) -> None:
    refused(here(*args, cwd=tmp_path), message)
    assert not list(tmp_path.iterdir())


def test_without_rows_nothing_can_be_tried(here: Any, model_folder: Path, tmp_path: Path) -> None:
    refused(here("sensitivity", model_folder), "give them with --data")
    refused(here("quantize", model_folder, "--max-drop", "1%", "-o", tmp_path / "out"), "give them with --data")
