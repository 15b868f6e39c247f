"""Runs, sweeps and artifacts side by side: what is dominated, what may not be compared, and every form of it."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from edgepress import sweep
from edgepress.benchmarks import frontier


def row(name: str, p50: float, size: float, accuracy: float, *, wide: float = 0.01) -> dict[str, Any]:
    quality = {"metric": "accuracy", "value": accuracy, "low": accuracy - 1, "high": accuracy + 1}
    return {
        "name": name,
        "latency_ms": {"p50": p50},
        "latency_interval_ms": [p50 - wide, p50 + wide],
        "size_bytes": size * 1e6,
        "quality": quality,
    }


def test_who_is_on_the_frontier() -> None:
    rows = [row("a", 4, 4, 90), row("b", 2, 5, 88), row("c", 3, 3, 80), row("d", 5, 1, 70), row("e", 2, 5, 88)]
    found = dict(zip("abcde", frontier.places(rows), strict=True))
    assert found["a"].on == ("latency", "size")
    assert found["b"].on == found["e"].on == ("latency",), "equals do not dominate each other"
    assert found["c"].on == ("size",)
    assert found["d"].on == ("size",)
    assert not any(place.dominated_by for place in found.values())
    worse = [*rows, row("f", 4.5, 5, 85)]
    last = frontier.places(worse)[-1]
    assert (last.on, last.dominated_by, last.doubtful) == ((), "a", False)
    assert frontier.told(worse, frontier.places(worse)) == [
        "f is dominated by a: 4.00 against 4.50 ms, 4.0 against 5.0 MB, accuracy 90.00 against 85.00."
    ]


def test_beaten_by_one_in_speed_and_by_another_in_size() -> None:
    rows = [row("a", 1, 9, 90), row("b", 9, 1, 90), row("c", 5, 5, 90)]
    place = frontier.places(rows)[2]
    assert (place.on, place.dominated_by) == ((), None), "neither of the two is better in everything"
    assert place.text == "off"
    assert frontier.told(rows, frontier.places(rows)) == []


def test_intervals_that_overlap_leave_a_doubt() -> None:
    rows = [row("a", 2, 1, 90.5, wide=1), row("b", 2.5, 1, 90, wide=1)]
    assert frontier.places(rows)[1].doubtful
    assert "though their intervals overlap" in frontier.told(rows, frontier.places(rows))[0]


def test_less_is_better_where_it_is() -> None:
    rows = [row("a", 1, 1, 20), row("b", 2, 2, 30)]
    for one in rows:
        one["quality"]["metric"] = "perplexity"
    assert frontier.places(rows)[1].dominated_by == "a"


@pytest.fixture
def other(finished_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the run, changed."""

    def make(name: str, **changed: Any) -> Path:
        run = tmp_path / name
        shutil.copytree(finished_run, run, ignore=shutil.ignore_patterns("stages"))
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps({**summary, **changed}))
        return run

    return make


@pytest.fixture
def swept(finished_run: Path, tmp_path: Path) -> Path:
    """The results of a sweep: the finished run as one cell, and one that failed."""
    path = tmp_path / "sweep" / "results.sqlite"
    path.parent.mkdir()
    grid = tmp_path / "grid.yaml"
    grid.write_text("recipe: {model: zoo:minilm-reviews}\ngrid: {seed: [1, 2]}\n")
    first, second = sweep.read(grid)
    with closing(sweep._opened(path, new=True)) as store:
        sweep._record(store, first, sweep.Ending("done", "", 1.0), finished_run)
        sweep._record(store, second, sweep.Ending("failed", "it rained", 1.0), tmp_path / "nowhere")
    return path


def test_one_run_is_as_it_always_was(here: Any, finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    document = json.loads(here("compare", finished_run, "--json").stdout)
    assert document == {name: summary[name] for name in ("original", "results", "chosen", "refused")}


def test_runs_of_one_machine_are_held_against_each_other(here: Any, finished_run: Path, other: Any) -> None:
    document = json.loads(here("compare", finished_run, other("again"), "--json").stdout)
    assert [group["comparable"] for group in document["groups"]] == [0, 0]
    assert document["apart"] == []
    assert document["original"] == document["groups"][0]["original"]
    shown = here("compare", finished_run, other("more"), "--format", "markdown").stdout
    assert "| Pareto |" in shown
    assert "is dominated by run: " in shown
    assert "between groups a machine may have changed its pace" in shown


def test_what_is_not_comparable_is_kept_apart(here: Any, finished_run: Path, other: Any) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    elsewhere = other("elsewhere", environment={**summary["environment"], "cpu": "another"})
    longer = other("longer", original={**summary["original"], "sequence": 7})
    rows = other("rows", recipe={**summary["recipe"], "data": "other.csv"})
    done = here("compare", finished_run, elsewhere, longer, rows, "--json")
    document = json.loads(done.stdout)
    assert [group["comparable"] for group in document["groups"]] == [0, 1, 2, 3]
    told = " ".join(document["apart"])
    assert "'elsewhere' is not held against 'run': cpu is" in told
    assert "sequence is 64 and 7" in told
    assert "quality is of other rows" in told
    lines = list(csv.DictReader(io.StringIO(here("compare", finished_run, elsewhere, "--format", "csv").stdout)))
    assert {line["comparable"] for line in lines} == {"0", "1"}
    assert not any((line["dominated_by"] or "").startswith("run: ") for line in lines), "each by its own"


def test_everything_at_once(here: Any, finished_run: Path, swept: Path, tmp_path: Path) -> None:
    """A run, a sweep and two artifacts that are measured now, in every form."""
    summary = json.loads((finished_run / "summary.json").read_text())
    artifacts = [finished_run / summary["original"]["artifact"], finished_run / "artifact"]
    quick = ("--target", "cpu:1", "--seq", "64", "--queries", "30", "--seconds", "0.2")
    done = here("compare", finished_run, swept, *artifacts, *quick, "-o", tmp_path / "all.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "all.json")
    document = json.loads((tmp_path / "all.json").read_text())
    titles = [group["title"] for group in document["groups"]]
    assert titles == ["run", "sweep: seed=1", "measured now on cpu:1, batch 1 x sequence 64"]
    assert document["notes"] == ["sweep: seed=2 failed: it rained"]
    now = document["groups"][2]
    assert now["original"]["latency_ms"]["n"] == 30
    assert now["results"][0]["speedup"]["value"] > 0
    lines = list(csv.DictReader(io.StringIO(here("compare", finished_run, swept, "--format", "csv").stdout)))
    assert len(lines) == 2 * (1 + len(summary["results"]))
    assert float(lines[0]["latency_p50_ms"]) == summary["original"]["latency_ms"]["p50"]
    table = here("compare", finished_run, swept, "-o", tmp_path / "all.txt")
    assert table.returncode == 0
    assert "it rained" in (tmp_path / "all.txt").read_text()


@pytest.mark.parametrize(("scheme", "width"), [("dark", 1280), ("light", 420)])
def test_the_page(
    here: Any, open_page: Any, violations: Any, finished_run: Path, other: Any, tmp_path: Path, scheme: str, width: int
) -> None:
    evil = "<img src=x onerror=alert(1)>"
    summary = json.loads((finished_run / "summary.json").read_text())
    original = {**summary["original"], "name": evil, "precision": evil}
    hostile = other("evil", original=original, environment={**summary["environment"], "cpu": evil})
    out = tmp_path / "all.html"
    done = here("compare", finished_run, other("again"), hostile, "-o", out)
    assert done.returncode == 0, done.stderr
    page, complaints = open_page(out, scheme, width)
    assert complaints == []
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("img").count() == 0
    assert page.locator("th[data-field=name]", has_text=evil).count() == 1
    assert "cpu is" in page.locator("section", has_text="Read with care").first.inner_text()
    assert page.locator("svg[aria-label^='Quality against latency. On the frontier']").count() == 2, "one a machine"
    assert page.locator("svg[aria-label^='Distribution of the latency of']").count() == 3
    page.close()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--format", "docx"], "There is no format 'docx' (there are: table, markdown, html, csv, json)"),
        (["-o", "table.xlsx"], "does not end in .txt, .md"),
        (["-o", "."], "is a folder"),
        (["--json", "--format", "csv"], "-o a file for the second"),
        (["--target", "cpu:1"], "--target, --batch, --seq, --data, --columns and --metric are of artifacts and models"),
        (["nowhere"], "nowhere is not a finished run, an artifact, a model or results of a sweep"),
    ],
)
def test_bad_use(here: Any, finished_run: Path, tmp_path: Path, args: list[str], message: str) -> None:
    done = here("compare", finished_run, *args, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


def test_a_document_on_stdout_and_a_page_in_a_file(here: Any, finished_run: Path, swept: Path, tmp_path: Path) -> None:
    done = here("compare", finished_run, "--json", "-o", tmp_path / "run.html")
    assert json.loads(done.stdout)["original"]["name"] == "original fp32"
    assert (tmp_path / "run.html").read_text().startswith("<!doctype html>")
    done = here("compare", swept, "--json", "-o", tmp_path / "sweep.txt")
    assert [cell["state"] for cell in json.loads(done.stdout)["cells"]] == ["done", "failed"]
    assert "it rained" in (tmp_path / "sweep.txt").read_text()


@pytest.mark.parametrize("changed", [{"results": 3}, {"results": [{"name": "x"}]}, {"environment": 1}, {"chosen": {}}])
def test_a_run_whose_summary_is_damaged(here: Any, other: Any, changed: dict[str, Any]) -> None:
    done = here("compare", other("damaged", **changed), "--format", "html")
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
