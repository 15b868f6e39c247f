"""The report, in a real browser: it renders, says nothing to the console, and shows what was measured."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgepress.benchmarks import changes, charts, examples, frontier
from edgepress.benchmarks.compare import rows as compared
from edgepress.benchmarks.measurement import Measurement
from edgepress.benchmarks.report import write_report
from edgepress.errors import InputError

from .test_measure import made_up


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_it_renders(open_page: Any, finished_run: Path, scheme: str, width: int) -> None:
    page, complaints = open_page(finished_run / "report.html", scheme, width)
    assert complaints == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    pictures = page.locator("svg").all()
    assert len(pictures) >= 4
    assert all(box and box["width"] > 100 and box["height"] > 20 for box in (p.bounding_box() for p in pictures))
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 384) == (scheme == "dark")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != background
    page.close()


def test_its_figures_are_the_measured_ones(open_page: Any, finished_run: Path) -> None:
    page, _ = open_page(finished_run / "report.html")
    lines = (finished_run / "measurements.jsonl").read_text().splitlines()
    measured = [json.loads(line) for line in lines]
    shown = page.evaluate(
        """[...document.querySelectorAll('#comparison tbody tr')].map(row => Object.fromEntries(
             [...row.children].map(cell => [cell.dataset.field, cell.dataset.value ?? null])))"""
    )
    assert [row["name"] for row in shown] == [item["name"] for item in measured]
    first = np.array(measured[0]["samples_ms"])
    for row, item in zip(shown, measured, strict=True):
        samples = np.array(item["samples_ms"])
        assert float(row["p50"]) == pytest.approx(np.median(samples), rel=1e-12)
        assert float(row["p90"]) == pytest.approx(np.percentile(samples, 90), rel=1e-12)
        assert float(row["p95"]) == pytest.approx(np.percentile(samples, 95), rel=1e-12)
        assert row["p99"] is None, "200 samples are too few for a p99"
        assert float(row["quality"]) == item["quality"]["value"]
        assert int(row["size_bytes"]) == (finished_run / item["artifact"] / "model.onnx").stat().st_size
        if item is not measured[0]:
            ratios = np.median(np.log(first / samples).reshape(10, 20), axis=1)
            assert float(row["speedup"]) == pytest.approx(np.exp(ratios.mean()), rel=1e-12)
            assert float(row["drop"]) == item["quality"]["drop"]
    page.close()


def test_pictures_of_figures_that_do_not_differ_or_where_less_is_better(finished_run: Path) -> None:
    assert charts.ticks(100, 100) == [100, 120]
    lines = (finished_run / "measurements.jsonl").read_text().splitlines()
    first = compared([Measurement.from_json(json.loads(line)) for line in lines])[0]

    def row(milliseconds: float, value: float) -> dict[str, Any]:
        quality = {**first["quality"], "metric": "perplexity", "value": value, "low": value, "high": value}
        return {**first, "latency_ms": {**first["latency_ms"], "p50": milliseconds}, "quality": quality}

    same = frontier.picture([row(1, 20), row(2, 20)])
    assert "nan" not in same
    assert same.count("<circle") == 2
    joined = frontier.picture([row(1, 30), row(2, 40), row(3, 20)]).split('class="frontier" points="')[1]
    assert len(joined.split('"')[0].split()) == 2, "the second is slower than the first and worse"


def test_hostile_names_stay_text(open_page: Any, finished_run: Path, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>$body|"
    summary = json.loads((finished_run / "summary.json").read_text())
    lines = [json.loads(line) for line in (finished_run / "measurements.jsonl").read_text().splitlines()]
    lines[-1]["name"] = summary["chosen"] = summary["name"] = summary["origin"] = evil
    summary["refused"] = [{"stage": evil, "variant": evil, "reason": evil}]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "measurements.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page, complaints = open_page(write_report(tmp_path))
    assert complaints == []
    assert page.locator("script").count() == 1
    assert page.locator("img").count() == 0
    assert page.locator("h1").inner_text().startswith(evil)
    page.close()


def test_a_run_that_kept_nothing(open_page: Any, finished_run: Path, tmp_path: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    lines = (finished_run / "measurements.jsonl").read_text().splitlines()[:1]
    nothing = {"chosen": None, "removed": {}, "scores": None, "trace": {}, "kept": [], "results": []}
    (tmp_path / "summary.json").write_text(json.dumps({**summary, **nothing, "warnings": ["a noisy machine"]}))
    (tmp_path / "measurements.jsonl").write_text("\n".join(lines))
    page, complaints = open_page(write_report(tmp_path))
    assert complaints == []
    assert "the original is kept" in page.locator(".headline").inner_text()
    assert "a noisy machine" in page.inner_text("main")
    page.close()


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a finished run"):
        write_report(tmp_path)


@pytest.mark.parametrize("summary", [{}, {"original": {}}, {"chosen": None, "unmet": 3}, {"chosen": None, "name": []}])
def test_a_damaged_summary_is_refused(here: Any, tmp_path: Path, summary: dict[str, Any]) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "measurements.jsonl").write_text(json.dumps(made_up(np.ones(30)).to_json()) + "\n")
    done = here("report", tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path / 'summary.json'} is not the summary of a finished run" in done.stderr
    assert not (tmp_path / "report.html").exists()


# ---- what was kept of single rows


def test_the_listed_predictions_are_those_that_changed(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    best = next(row for row in summary["results"] if row["name"] == summary["chosen"])
    rows = [summary["original"], best]
    first, second = (np.load(finished_run / row["artifact"] / ".." / "answers.npz")["whole"] for row in rows)
    listed = changes.read(finished_run / "examples" / "changed.csv")
    assert {one.row for one in listed} == set(np.flatnonzero(first.argmax(axis=1) != second.argmax(axis=1)))
    names = summary["data"]["labels"]
    lost = sum(one.verdict == changes.LOST for one in listed) - sum(one.verdict == changes.WON for one in listed)
    assert lost * 100 / len(first) == pytest.approx(best["quality"]["drop"])
    for one in listed:
        assert (one.before, one.after) == (names[first[one.row].argmax()], names[second[one.row].argmax()])
        odds = np.exp(first[one.row] - first[one.row].max())
        assert one.before_confidence == pytest.approx(odds.max() / odds.sum(), rel=1e-5)
        assert one.text


def test_the_maps_are_the_attention_of_the_model(finished_run: Path, model_folder: Path, workload: Any) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    shown = json.loads((finished_run / "examples" / "attention.json").read_text())
    summary = json.loads((finished_run / "summary.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, attn_implementation="eager").eval()
    ids = torch.as_tensor(workload.data.evaluation.inputs["input_ids"][shown["row"]])[None, : examples.TOKENS]
    with torch.no_grad():
        known = model(input_ids=ids, output_attentions=True).attentions
    assert len(shown["layers"]) == len(known) == 3
    for entry in shown["layers"]:
        gone = summary["removed"].get("head", {}).get(str(entry["layer"]), [])
        assert len(entry["keys"]) == ids.shape[1]
        assert entry["removed"] == (str(entry["layer"]) in summary["removed"].get("block", {}))
        for number, head in enumerate(entry["heads"]):
            before = examples.unpacked(head["before"])
            assert np.abs(before - known[entry["layer"]][0, number].numpy()).max() <= head["before"]["peak"] / 255
            assert (head["after"] is None) == (entry["removed"] or number in gone)
            if head["after"]:
                assert np.allclose(examples.unpacked(head["after"]).sum(axis=1), 1, atol=0.1)


def test_the_page_lists_as_many_as_it_is_told(open_page: Any, here: Any, finished_run: Path, tmp_path: Path) -> None:
    run = _copied(finished_run, tmp_path)
    listed = changes.read(run / "examples" / "changed.csv")
    changes.write(run / "examples" / "changed.csv", listed * 5)
    assert here("report", run, "--changed", "3").returncode == 0
    page, complaints = open_page(run / "report.html")
    assert complaints == []
    assert page.locator("#changed tbody tr").count() == 3
    assert f"3 of each kind in turn are listed here. All are in {examples.FOLDER}/" in page.inner_text("main")
    page.close()


def _copied(finished_run: Path, folder: Path) -> Path:
    """The run without its stages, which a report does not need."""
    run = folder / "run"
    shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("stages"))
    return run


EVIL = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>$body| =1+1"


def test_hostile_rows_stay_text(open_page: Any, finished_run: Path, tmp_path: Path) -> None:
    run = _copied(finished_run, tmp_path)
    listed = changes.read(run / "examples" / "changed.csv")
    evil = [replace(one, text=EVIL, label=EVIL, before=EVIL, after=EVIL) for one in listed]
    changes.write(run / "examples" / "changed.csv", evil)
    path = run / "examples" / "attention.json"
    shown = json.loads(path.read_text())
    shown["text"] = EVIL
    for entry in shown["layers"]:
        entry["stack"], entry["queries"], entry["keys"] = EVIL, [EVIL] * 24, [EVIL] * 24
    path.write_text(json.dumps(shown))
    page, complaints = open_page(write_report(run))
    assert complaints == []
    assert page.locator("script").count() == 1
    assert page.locator("img:not([src^='data:image/png;base64,'])").count() == 0
    assert page.locator("#changed .text").first.inner_text() == EVIL
    page.close()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("changed.csv", "row,verdict\n1,worse\n"),
        ("changed.csv", "row,token,verdict,label,before,after,before_confidence,after_confidence,text,image\n"
         "1,,changed,,a,b,,,,../../secret.png\n"),
        ("changed.csv", "row,token,verdict,label,before,after,before_confidence,after_confidence,text,image\n"
         "x,,changed,,a,b,,,,\n"),
        ("attention.json", "{}"),
        ("attention.json", '{"row": 1, "text": "", "image": "", "cut": null, "layers": [{"stack": "s", "layer": 0, '
         '"kind": "head", "run": 0, "queries": [], "keys": [], "grid": null, "removed": false, "heads": '
         '[{"before": {"shape": [2, 2], "peak": 1, "values": "AA=="}, "after": null}]}]}'),
        ("examples.json", "{}"),
    ],
)  # fmt: skip
def test_damaged_examples_are_refused(here: Any, finished_run: Path, tmp_path: Path, name: str, content: str) -> None:
    run = _copied(finished_run, tmp_path)
    before = (run / "report.html").read_bytes()
    (run / "examples" / name).write_text(content)
    done = here("report", run)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert (run / "report.html").read_bytes() == before


def test_precision_is_read_from_the_file(open_page: Any, finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    page, _ = open_page(finished_run / "report.html")
    rows = page.locator("table.bits tbody tr").all_inner_texts()
    assert len(rows) == 3
    blocks = [int(layer) for layer in summary["removed"].get("block", {})]
    quantized = "int8" in next(r["precision"] for r in summary["results"] if r["name"] == summary["chosen"])
    for layer, row in enumerate(rows):
        if layer in blocks:
            assert "block removed" in row
        else:
            assert row.count("int8" if quantized else "fp32") == 6
    page.close()


# ---- for everybody, on any paper


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 420)])
def test_it_is_accessible(open_page: Any, violations: Any, finished_run: Path, scheme: str, width: int) -> None:
    page, _ = open_page(finished_run / "report.html", scheme, width)
    assert violations(page) == []
    page.close()


def test_a_page_that_is_not_accessible_is_found_out(open_page: Any, violations: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text('<!doctype html><title>t</title><p style="color:#ccc">pale</p><img src="data:image/png;base64,">')
    page, _ = open_page(path)
    found = " ".join(violations(page))
    assert all(rule in found for rule in ("color-contrast", "image-alt", "html-has-lang"))
    page.close()


def test_it_prints_whole(open_page: Any, finished_run: Path, tmp_path: Path) -> None:
    page, _ = open_page(finished_run / "report.html", "dark", 688)  # A4 less its margins, at 96 pixels an inch
    page.emulate_media(media="print")
    wide = page.evaluate(
        """[...document.querySelectorAll("main *")].filter(one => one.getBoundingClientRect().right > innerWidth + 1)
             .map(one => one.outerHTML.slice(0, 80))"""
    )
    assert wide == []
    assert page.locator("#theme").is_hidden()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    printed = tmp_path / "report.pdf"
    page.pdf(path=printed, format="A4")
    content = printed.read_bytes()
    assert content.startswith(b"%PDF-")
    assert content.count(b"/Type /Page\n") >= 2
    page.close()


def test_nothing_in_it_is_elsewhere(finished_run: Path) -> None:
    text = (finished_run / "report.html").read_text()
    assert not re.search(r"""(src|href|action|url)\s*[=(]\s*["']?\s*(https?:)?//""", text)
    assert set(re.findall(r'(?:src|href)="(\w+:|#)', text)) <= {"data:", "#"}
    assert "default-src 'none'" in text
