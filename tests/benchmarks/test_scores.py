"""What ``edgepress score`` draws and writes: a page in a real browser, heat maps on a terminal, tables on disk."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgepress.benchmarks import charts, score_screen, score_table
from edgepress.benchmarks.score_page import headline
from rich.console import Console
from scipy import stats

from .test_inspection import CROSSING

COLUMNS = ("--columns", "text=review,label=stars")
METHODS = ("masked_taylor", "fisher", "magnitude", "random")
KINDS = ("head", "ffn", "block", "hidden")
EVIL = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>$body"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, edgepress: Any, model_folder: Path, reviews_csv: Path) -> Path:
    out = tmp_path_factory.mktemp("scored")
    options = ("--method", "masked-taylor,fisher,magnitude,random", "--rows", "16", "-o", out, "--json")
    trials = ("--validate", "6", "--trial-rows", "16")
    done = edgepress("score", model_folder, "--data", reviews_csv, *COLUMNS, *options, *trials)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((out / "scores.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["scores.html", "scores.json", "scores.parquet"]
    return out


@pytest.fixture
def document(folder: Path) -> Any:
    return json.loads((folder / "scores.json").read_text())


def _open_all(page: Any) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_it_renders(open_page: Any, folder: Path, scheme: str, width: int) -> None:
    page, complaints = open_page(folder / "scores.html", scheme, width)
    _open_all(page)
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    pictures = page.locator("svg").all()
    # of each kind Spearman, curves and agreement; of two kinds sets; maps by method, or one where there is one row
    assert len(pictures) == 3 * len(KINDS) + 2 + 2 * len(METHODS) + 2
    assert all(box and box["width"] > 100 and box["height"] > 20 for box in (p.bounding_box() for p in pictures))
    assert page.evaluate(CROSSING) == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 384) == (scheme == "dark")
    page.close()


def test_it_shows_what_was_found(open_page: Any, folder: Path, document: Any) -> None:
    page, _ = open_page(folder / "scores.html")
    assert page.locator(".headline").inner_text() == headline(document)
    tips = page.locator("svg title").all_text_contents()
    heads = [unit for unit in document["units"] if unit["kind"] == "head"]
    for unit in heads:
        said = f"layer {unit['layer']}, head {unit['index']}: {unit['scores']['fisher']:.3g}"
        assert said in tips
    one, other = ([unit["scores"][method] for unit in heads] for method in ("masked_taylor", "fisher"))
    assert f"1 masked_taylor, 2: {stats.spearmanr(one, other).statistic:.3f}" in tips
    for kind in KINDS:
        for row, method in zip(page.locator(f"#trials-{kind} tbody tr").all(), METHODS, strict=True):
            texts = [row.locator("th").inner_text(), *row.locator("td").all_inner_texts()]
            entry = document["validation"][method][kind]
            assert texts[0] == method
            assert float(texts[1].split()[0].strip("*")) == pytest.approx(entry["spearman"], abs=0.006)
            assert float(texts[4].split()[0].strip("*")) == pytest.approx(entry["curve"]["area"], rel=0.01)
    assert page.locator("#sets-ffn tbody tr").count() == len(METHODS)
    assert page.locator("#sets-head").count() == 0
    page.close()


def test_hostile_names_stay_text(open_page: Any, document: Any, tmp_path: Path) -> None:
    document["name"] = EVIL
    for unit in document["units"]:
        unit["kind"] = unit["kind"] + EVIL
        unit["scores"] = {method + EVIL: value for method, value in unit["scores"].items()}
    document["validation"] = {
        method + EVIL: {kind + EVIL: entry for kind, entry in kinds.items()}
        for method, kinds in document["validation"].items()
    }
    page, complaints = open_page(score_table.write_scores(document, tmp_path))
    assert complaints == []
    assert page.locator("script").count() == 1
    assert page.locator("img").count() == 0
    assert page.locator("h1").inner_text() == EVIL
    page.close()


def test_all_methods_of_a_large_model_stay_readable(open_page: Any, document: Any, tmp_path: Path) -> None:
    """Thirty layers of units that fourteen methods score, with a curve of each, some of them nearly the same."""
    one = document["validation"]["fisher"]
    document["validation"] = {f"method_number_{number}": copy.deepcopy(one) for number in range(14)}
    random = np.random.default_rng(0)
    for entry in [entry for kinds in document["validation"].values() for entry in kinds.values()]:
        entry["curve"]["losses"] = (np.arange(1, 6) + random.normal(size=5) / 9).tolist()
    counts = {"head": 9, "ffn": 700, "block": 1}
    places = [(kind, layer, n) for layer in range(30) for kind, count in counts.items() for n in range(count)]
    document["units"] = [
        {"kind": kind, "layer": layer, "index": index, "params": 1, "macs": 1, "scores": dict.fromkeys(counts, 0.0)}
        for kind, layer, index in [*places, *(("hidden", 0, index) for index in range(576))]
    ]
    for unit, values in zip(document["units"], random.normal(size=(len(document["units"]), 14)), strict=True):
        unit["scores"] = dict(zip(document["validation"], values.tolist(), strict=True))
    page, complaints = open_page(score_table.write_scores(document, tmp_path))
    _open_all(page)
    assert complaints == []
    assert page.evaluate(CROSSING) == []
    assert (tmp_path / "scores.html").stat().st_size < 10e6
    page.close()


def _drawn(document: Any, kind: str, width: int, colours: Any = None) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=colours, force_terminal=colours is not None)
    score_screen.heat_map(console, score_table.table(document), kind, "fisher")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()[2:]  # less an empty line and the title


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_heat_map_fits_the_terminal(document: Any, width: int) -> None:
    for kind, layers in (("head", 3), ("ffn", 3), ("block", 1), ("hidden", 1)):
        lines = _drawn(document, kind, width)
        assert len(lines) == layers
        assert all(len(line) <= width for line in lines)
        assert set("".join(lines)[9:]) >= {" ", "█"}


def test_a_heat_map_is_shaded_by_rank(document: Any) -> None:
    heads = [unit for unit in document["units"] if unit["kind"] == "head"]
    values = np.array([unit["scores"]["fisher"] for unit in heads]).reshape(3, 4)
    ranks = stats.rankdata(values).reshape(3, 4) - 1
    shown = [line[len("  layer 0 ") :].ljust(16)[::4] for line in _drawn(document, "head", 80)]
    assert shown == ["".join(" ░▒▓█"[min(int(rank / 11 * 5), 4)] for rank in row) for row in ranks]
    coloured = _drawn(document, "head", 80, "truecolor")
    assert sum(line.count("\x1b[48;2;") for line in coloured) == 12
    assert "48;2;253;231;37m" in coloured[int(values.argmax() // 4)]
    assert "48;2;68;1;84m" in coloured[int(values.argmin() // 4)]


def test_a_cell_of_several_units_has_their_mean_rank(document: Any) -> None:
    units = score_table.table(document)
    grid = score_table.grid(units, "ffn", "fisher", most=50)
    assert grid.size == 3
    assert grid.columns[:3] == ("0", "3", "6")
    assert [len(row) for row in grid.shades] == [43] * 3
    ranks = stats.rankdata(units.loc[units["kind"] == "ffn", "fisher"]).reshape(3, 128)
    means = np.stack([ranks[:, start : start + 3].mean(axis=1) for start in range(0, 128, 3)], axis=1)
    expected = (stats.rankdata(means) - 1).reshape(3, 43) / (3 * 43 - 1)
    np.testing.assert_allclose(grid.shades, expected)


def test_layers_of_other_widths(document: Any) -> None:
    kept = [u for u in document["units"] if u["kind"] == "head" and not (u["layer"] == 1 and u["index"] > 0)]
    grid = score_table.grid(score_table.table({"units": kept}), "head", "fisher", most=48)
    assert [len(row) for row in grid.shades] == [4, 1, 4]
    assert grid.labels == ("layer 0", "layer 1", "layer 2")


def test_what_cannot_be_told(document: Any) -> None:
    for kinds in document["validation"].values():
        kinds["head"].update(dict.fromkeys(("spearman", "low", "high", "regret", "ceiling")))
    title, header, lines = score_table.validated(document["validation"], "head")
    assert title == "head: 6 units in trials"
    assert header == ["method", "Spearman", "Kendall", "regret", "area"]
    assert [line[1] for line in lines] == ["not known"] * len(METHODS)
    assert sum("*" in line[4] for line in lines) == 1


def test_the_headline_says_what_is_more_than_chance(document: Any) -> None:
    for method, kinds in document["validation"].items():
        for entry in kinds.values():
            entry.update(spearman=0.5, low=-0.1, high=0.8)
        if method != "random":
            kinds["ffn"].update(spearman=0.7 + len(method) / 100, low=0.4)
    said = headline(document)
    assert "closest to trials: ffn masked_taylor (0.83);" in said
    assert said.endswith("no method is closer to trials than chance for head, block, hidden.")


@pytest.mark.parametrize("places", [[5.0], [0.0, 0.0, 0.0], [90.0, 10.0, 95.0, 99.0], list(np.linspace(40, 60, 30))])
def test_labels_are_spread_in_their_order(places: list[float]) -> None:
    found = np.array(charts._spread(places, 0, 100))
    order = np.argsort(places, kind="stable")
    assert (np.diff(found[order]) > min(14, 100 / len(places)) - 1e-9).all()
    assert found.min() >= 0
    assert found.max() <= 100 + 1e-9
