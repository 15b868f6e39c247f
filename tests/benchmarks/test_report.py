"""The report, in a real browser: it renders, says nothing to the console, and shows what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgepress.benchmarks import charts
from edgepress.benchmarks.compare import rows as compared
from edgepress.benchmarks.measurement import Measurement
from edgepress.benchmarks.report import write_report
from edgepress.errors import InputError


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

    same = charts.pareto([row(1, 20), row(2, 20)], None)
    assert "nan" not in same
    assert same.count("<circle") == 2
    frontier = charts.pareto([row(1, 30), row(2, 40), row(3, 20)], None).split('class="frontier" points="')[1]
    assert len(frontier.split('"')[0].split()) == 2, "the second is slower than the first and worse"


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
