"""What ``edgepress inspect`` writes: a page that renders in a real browser, and the same as JSON."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from edgepress.benchmarks import charts, tables
from edgepress.benchmarks.inspection import headline, write_inspection

COLUMNS = ("--columns", "text=review,label=stars")

CROSSING = """() => [...document.querySelectorAll('svg')].flatMap(picture => {
  const frame = picture.getBoundingClientRect();
  const texts = [...picture.querySelectorAll('text')].filter(text => text.textContent.trim());
  const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
  const outside = boxes.filter(([, box]) => box.left < frame.left - 1 || box.right > frame.right + 1
                                         || box.top < frame.top - 1 || box.bottom > frame.bottom + 1);
  const over = boxes.flatMap(([a, one], i) => boxes.slice(0, i).filter(([, other]) =>
    one.left < other.right - 1 && other.left < one.right - 1
    && one.top < other.bottom - 4 && other.top < one.bottom - 4).map(([b]) => [a, b]));
  return [...outside.map(([text]) => ['outside', text]), ...over];
})"""
"""Labels of the pictures that lie over each other, or outside of their picture; lines of text may touch by a little."""


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory, edgepress: Any, model_folder: Path, reviews_csv: Path) -> Path:
    out = tmp_path_factory.mktemp("inspected")
    options = ("--data", reviews_csv, *COLUMNS, "--rows", "24", "-o", out, "--json")
    done = edgepress("inspect", model_folder, *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((out / "inspect.json").read_text())
    return out


@pytest.fixture
def document(inspected: Path) -> Any:
    return json.loads((inspected / "inspect.json").read_text())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_it_renders(open_page: Any, inspected: Path, scheme: str, width: int) -> None:
    page, complaints = open_page(inspected / "inspect.html", scheme, width)
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    pictures = page.locator("svg").all()
    assert len(pictures) == 7
    assert all(box and box["width"] > 100 and box["height"] > 20 for box in (p.bounding_box() for p in pictures))
    assert page.evaluate(CROSSING) == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 384) == (scheme == "dark")
    page.close()


def test_it_shows_what_was_found(open_page: Any, inspected: Path, document: Any) -> None:
    page, _ = open_page(inspected / "inspect.html")
    known = document["statistics"]
    assert known["rows"] == 24
    rows = page.locator("#layers tbody tr").all()
    blocks = [entry for entry in known["gradient_flow"]["layers"] if entry["kind"] == "block"]
    assert len(rows) == len(blocks) == 3
    for row, block, change in zip(rows, blocks, known["representation"]["layers"], strict=True):
        texts = row.locator("td").all_inner_texts()
        assert float(texts[0]) == pytest.approx(block["gradient_norm"], rel=1e-2)
        assert float(texts[2]) == pytest.approx(change["influence"], abs=1e-3)
    tips = page.locator("svg title").all_text_contents()
    assert f"block 1, 2: {known['attention']['layers'][1]['heads'][2]['entropy']:.3f}" in tips
    assert f"0, 2: {known['representation']['cka'][0]['values'][1][3]:.3f}" in tips
    layer = known["attention"]["layers"][1]
    alike = max(value for head, value in enumerate(layer["similarity"][2]) if head != 2)
    for title, value in (("Distance", layer["heads"][2]["distance"]), ("Most alike head", alike)):
        picture = page.locator(f'svg[aria-label="{title} of each head"]')
        assert f"block 1, 2: {value:.3f}" in picture.locator("title").all_text_contents()
    assert page.locator(".headline").inner_text() == headline(document)
    page.close()


def _stretched(document: Any) -> Any:
    """The same figures in thirty blocks of twenty heads in two stacks with long names, some layers flagged."""
    large = copy.deepcopy(document)
    known = large["statistics"]
    stacks = [f"model.a_long_name_for_the_{side}.layers" for side in ("encoder", "decoder")]
    flow, changes, heads = known["gradient_flow"], known["representation"], known["attention"]
    first = [entry for entry in flow["layers"] if entry["block"] == 0]
    outside = [entry for entry in flow["layers"] if entry["block"] is None]
    flags = {3: "vanishing", 9: "exploding", 20: "zero"}
    inside = [{**entry, "block": n, "flag": flags.get(n)} for n in range(30) for entry in first]
    flow["layers"] = [{**entry, "name": f"{entry['name']}.{'long.' * 12}end"} for entry in outside] + inside
    for number, entry in enumerate(flow["layers"]):
        entry["gradient_norm"] *= 0.0 if entry["flag"] == "zero" else 10.0 ** -(number % 7)
    one = heads["layers"][0]
    twenty = {**one, "heads": (one["heads"] * 5)[:20]}
    changes["layers"] = [{**changes["layers"][0], "layer": n, "stack": stacks[n // 15]} for n in range(30)]
    kinds = [("head", range(30)), ("cross_head", range(15, 30))]
    heads["layers"] = [
        {**twenty, "layer": n, "stack": stacks[n // 15], "kind": kind} for kind, layers in kinds for n in layers
    ]
    names = [["input", *map(str, range(start, start + 15))] for start in (0, 15)]
    changes["cka"] = [
        {"stack": stack, "names": depths, "values": [[0.5, None] * 8] * 16}
        for stack, depths in zip(stacks, names, strict=True)
    ]
    return large


def test_large_models_stay_readable(open_page: Any, document: Any, tmp_path: Path) -> None:
    page, complaints = open_page(write_inspection(_stretched(document), tmp_path))
    assert complaints == []
    assert page.evaluate(CROSSING) == []
    assert page.locator("svg").count() == 12
    assert "vanishing: 6 matrices" in page.inner_text("main")
    assert "a_long_name_for_the_decoder 29" in page.inner_text("main")
    page.close()


def test_hostile_names_stay_text(open_page: Any, document: Any, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>$body"
    document["name"] = document["family"] = evil
    document["notes"] = document["statistics"]["notes"] = [evil]
    document["example"] = {evil: [1]}
    for part in ("gradient_flow", "representation", "attention"):
        for entry in document["statistics"][part]["layers"]:
            entry.update({key: f"{value}.{evil}" for key, value in entry.items() if key in {"stack", "name"}})
    for entry in document["statistics"]["representation"]["cka"]:
        entry["stack"] += f".{evil}"
        entry["names"] = [evil] * len(entry["names"])
    for entry in document["statistics"]["representation"]["layers"][1:]:
        entry["stack"] += ".other"  # two stacks, so that their names are shown
    document["statistics"]["representation"]["cka"].clear()
    page, complaints = open_page(write_inspection(document, tmp_path))
    assert complaints == []
    assert page.locator("script").count() == 1
    assert page.locator("img").count() == 0
    assert page.locator("h1").inner_text() == evil
    page.close()


def test_without_rows(open_page: Any, here: Any, model_folder: Path, tmp_path: Path) -> None:
    done = here("inspect", model_folder, "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "need rows: give --data" in done.stdout
    assert json.loads((tmp_path / "inspect.json").read_text())["statistics"] is None
    page, complaints = open_page(tmp_path / "inspect.html")
    assert complaints == []
    assert "give --data" in page.locator(".headline").inner_text()
    page.close()


def test_stacks_are_named_by_what_tells_them_apart() -> None:
    assert tables.stack_names(["bert.encoder.layer"]) == {"bert.encoder.layer": "block"}
    assert list(tables.stack_names(["m.encoder.block", "m.decoder.block"]).values()) == ["encoder", "decoder"]
    assert list(tables.stack_names(["text_model.encoder.layers", "vision_model.encoder.layers"]).values()) == [
        "text_model",
        "vision_model",
    ]
    assert list(tables.stack_names(["layers.0.blocks", "layers.1.blocks"]).values()) == ["0", "1"]


def test_remarks(document: Any) -> None:
    known = document["statistics"]
    known["gradient_flow"]["layers"][5]["flag"] = "vanishing"
    name, block = (known["gradient_flow"]["layers"][5][key] for key in ("name", "block"))
    dead = {"kind": "ffn", "layer": block, "count": 128, "zero": [1], "constant": [2], "no_gradient": [1, 3]}
    known["gradient_flow"]["dead"] = [dead]
    texts = tables.remarks(known, block)
    assert f"{name.split('.')[-1]} vanishing" in texts
    assert "3 of 128 ffn dead" in texts


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (0.03, 0.4), (1e-9, 1e4), (0.5, 2.0), (99.0, 101.0)])
def test_a_logarithmic_scale_covers_what_it_shows(low: float, high: float) -> None:
    scale = charts._decades(low, high)
    assert scale == sorted(set(scale))
    assert len(scale) >= 2
    assert scale[0] <= low <= high <= scale[-1]
