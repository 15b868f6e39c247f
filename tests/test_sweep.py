"""A grid of recipes: what is finished is not done again, and what goes wrong with one cell stays there."""

from __future__ import annotations

import io
import os
import signal
import sqlite3
import sys
import threading
import time
import zipfile
from contextlib import closing, suppress
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from edgepress import cluster, sweep
from edgepress.cluster import on_ray
from edgepress.errors import InputError, UsageError

pytestmark = pytest.mark.chain


@pytest.fixture(scope="module")
def grid(model_folder: Path, reviews_csv: Path) -> dict[str, Any]:
    """A cell takes seconds: nothing is pruned, and little is measured."""
    recipe = {
        "model": str(model_folder),
        "data": str(reviews_csv),
        "columns": {"text": "review", "label": "stars"},
        "max_length": 32,
        "limits": {"max_drop": 30},
        "levels": [],
        "quantize": {"scheme": "int8-dynamic"},
        "measure": {"sequence": 32, "min_queries": 30, "min_seconds": 0.5},
    }
    return {"recipe": recipe, "grid": {"target": ["cpu:1", "cpu:2"]}}


def written(grid: Any, folder: Path) -> Path:
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid), encoding="utf-8")
    return path


def quiet(key: str, now: str) -> None:
    pass


def test_a_cell_is_its_recipe_and_nothing_else(grid: Any, tmp_path: Path) -> None:
    first = sweep.read(written(grid, tmp_path))
    assert [cell.name for cell in first] == ["target=cpu:1", "target=cpu:2"]
    wider = {**grid, "grid": {"limits.max_drop": [10, 30], "target": ["cpu:2", "cpu:1"]}}
    more = sweep.read(written(wider, tmp_path))
    assert len(more) == 4
    assert {cell.key for cell in first} <= {cell.key for cell in more}
    assert more[0].recipe.limits.max_drop == 10
    assert more[0].recipe.quantize == first[0].recipe.quantize
    assert {cell.recipe.seed for cell in sweep.read(written(grid, tmp_path), seed=7)} == {7}


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"recipes": {}}, "has 'recipes'; a grid has 'recipe' and 'grid' alone"),
        ({"recipe": [1]}, "are to be mappings"),
        (
            {"recipe": {"model": "zoo:vit-fashion"}, "grid": {"target": "cpu"}},
            "'target' in .* is to be a list",
        ),
        ({"recipe": {"model": "zoo:vit-fashion"}, "grid": {"limits.max": [1, 2]}}, "limits.max 1 .*limits.max 2 "),
        ({"recipe": {"model": "zoo:vit-fashion"}, "grid": {"model.a": [1]}}, "'model.a' .* has no fields"),
        ({"grid": {"seed": [1]}}, "model: Field required"),
        ({"recipe": {"model": date(2024, 1, 2)}}, "model: Input should be a valid string"),
        ({"recipe": {"model": "zoo:vit-fashion"}, "grid": {"model": [date(2024, 1, 2)]}}, "model 2024-01-02 .*string"),
        ({"recipe": {"model": "zoo:vit-fashion"}, "grid": {7: [1]}}, "'7' in the grid of .* is no name of a field"),
        ({"recipe": {"model": "zoo:vit-fashion", 3: 4}}, "Keys should be strings"),
        ({"recipes": {}, 5: {}}, "has '5'; a grid has"),
    ],
)
def test_grids_that_are_none(grid: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        sweep.read(written(grid, tmp_path))


def test_cells_that_fail_and_are_mended(grid: Any, edgepress: Any, reviews_csv: Path, tmp_path: Path) -> None:
    late = tmp_path / "late.csv"
    path = written({**grid, "grid": {"data": [str(late), str(reviews_csv)]}}, tmp_path)
    out = tmp_path / "sweep"
    done = edgepress("sweep", path, "-o", out)
    assert done.returncode == 2
    assert "1 of 2 cells failed; data=late.csv: " in done.stderr.splitlines()[-1]
    first = {one["name"]: one for one in sweep.results(out / sweep.RESULTS)}
    assert first["data=late.csv"]["state"] == "failed"
    assert str(late) in first["data=late.csv"]["said"]
    good = first["data=reviews.csv"]
    assert good["state"] == "done"
    assert good["results"][0]["speedup"]["value"] > 0
    # so small a model need not get faster
    assert good["chosen"] in {good["original"]["name"], good["results"][0]["name"]}

    late.write_bytes(reviews_csv.read_bytes())
    done = edgepress("sweep", path, "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    assert "data=reviews.csv" not in done.stderr  # it was finished, and stays as it is
    again = {one["name"]: one for one in sweep.results(out / sweep.RESULTS)}
    assert again["data=late.csv"]["state"] == "done"
    assert again["data=reviews.csv"] == good

    shown = edgepress("compare", out / sweep.RESULTS, env={**os.environ, "COLUMNS": "200"})
    assert shown.returncode == 0
    assert all(one["chosen"] in shown.stdout for one in again.values())
    with sqlite3.connect(out / sweep.RESULTS) as store:
        told = store.execute("SELECT COUNT(latency_p50_ms), COUNT(DISTINCT key) FROM variants WHERE chosen").fetchone()
    assert told == (2, 2)


def test_a_cell_that_is_killed_goes_on_behind_its_last_stage(grid: Any, tmp_path: Path) -> None:
    cells = sweep.read(written({**grid, "grid": {}}, tmp_path))

    def kill(key: str, now: str) -> None:
        if now == "int8-dynamic …":
            for child in psutil.Process().children():
                if "compress" in child.cmdline():
                    child.send_signal(signal.SIGKILL)

    (ended,) = sweep.sweep(cells, tmp_path / "out", sweep.local, kill)
    assert ended["state"] == "failed"
    assert "It was ended by SIGKILL after 'int8-dynamic" in ended["said"]
    told = []
    (ended,) = sweep.sweep(cells, tmp_path / "out", sweep.local, lambda key, now: told.append(now))
    assert ended["state"] == "done"
    assert not [now for now in told if now.startswith("baseline")]


@pytest.mark.parametrize("content", [b"", b"not a database at all, but long enough to be taken for one" * 4])
def test_files_that_are_no_results(content: bytes, here: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.sqlite"
    path.write_bytes(content)
    done = here("compare", path)
    assert done.returncode == 2
    assert f"{path} cannot be used as results of a sweep" in done.stderr
    assert path.read_bytes() == content
    with pytest.raises(InputError, match="There is no file of results"):
        sweep.results(tmp_path / "none.sqlite")


def test_results_that_cannot_be_written_are_told_before_anything_is_run(
    grid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = sweep.read(written({**grid, "grid": {}}, tmp_path))
    path = tmp_path / "out" / sweep.RESULTS
    sweep._opened(path, new=True).close()

    def begun(*_: Any) -> Any:
        pytest.fail("it had begun")

    monkeypatch.setattr(sweep, "PATIENCE", 0.1)
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(InputError, match=f"{path} cannot be used as results of a sweep: database is locked"):
            sweep.sweep(cells, path.parent, begun, quiet)
    whole = path.read_bytes()
    path.write_bytes(whole[:18] + b"\x03" + whole[19:])  # of a later version of SQLite, which this one may only read
    with pytest.raises(InputError, match="attempt to write a readonly database"):
        sweep.sweep(cells, path.parent, begun, quiet)
    path.write_bytes(whole)


def test_results_that_do_not_fit_on_the_disk_are_one_sentence(
    grid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = sweep.read(written({**grid, "grid": {}}, tmp_path))
    opened = sweep._opened

    def full(path: Path, **options: Any) -> sqlite3.Connection:
        store = opened(path, **options)
        store.execute("PRAGMA max_page_count = 1")  # what there is, and no page more
        return store

    def ended(cells: Any, runs: Path, tell: Any) -> Any:
        yield cells[0], sweep.Ending("failed", "much to say " * 10_000, 1.0)

    monkeypatch.setattr(sweep, "_opened", full)
    with pytest.raises(InputError, match="cannot be used as results of a sweep: database or disk is full"):
        sweep.sweep(cells, tmp_path / "out", ended, quiet)


def test_no_cluster(grid: Any, here: Any, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    done = here("sweep", written(grid, tmp_path), "-o", tmp_path / "out", "--ray", "127.0.0.1:1")
    assert done.returncode == 2
    assert "No Ray cluster answers at '127.0.0.1:1'" in done.stderr


def test_what_a_machine_keeps_of_a_cell_is_brought_home(tmp_path: Path) -> None:
    run, home = tmp_path / "run", tmp_path / "home"
    for name in ("summary.json", "artifact/model.onnx", "stages/01-baseline-a/result.json", "unfinished/state"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    cluster._unpacked(cluster._packed(run), home)
    files = {str(path.relative_to(home)): path.read_text() for path in home.rglob("*") if path.is_file()}
    assert files == {name: name for name in ("summary.json", "artifact/model.onnx")}
    hostile = io.BytesIO()
    with zipfile.ZipFile(hostile, "w") as archive:
        archive.writestr("../../outside", "mine")
    cluster._unpacked(hostile.getvalue(), home)
    assert not (tmp_path / "outside").exists()
    assert (home / "outside").read_text() == "mine"


@pytest.mark.slow
def test_a_cell_that_a_machine_cannot_run_fails_at_once(grid: Any, tmp_path: Path) -> None:
    """Its name is too long for a file; the machine is not taken to be lost."""
    ray = pytest.importorskip("ray")
    (cell,) = sweep.read(written({**grid, "grid": {}}, tmp_path))
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    told: list[str] = []
    try:
        long = replace(cell, key="x" * 300)
        (ended,) = on_ray([long], tmp_path / "runs", lambda key, now: told.append(now), address="auto")
    finally:
        ray.shutdown()
    assert ended[1].state == "failed"
    assert ended[1].said.endswith("File name too long.")
    assert ended[1].said.count("\n") == 0
    assert len(told) == 1, "it was given to a machine once"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="clusters of several nodes on one machine are Linux's alone")
def test_a_node_of_a_cluster_is_lost_and_no_result(grid: Any, tmp_path: Path) -> None:
    """Two nodes on loopback, which are one machine and so get one cell at a time; the one at work is killed."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cells = sweep.read(written({**grid, "grid": {"seed": [0, 1, 2]}}, tmp_path))
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    told: list[str] = []
    most_at_work = 0

    def compressing(node: Any) -> int:
        """How many cells are at work on a node."""
        found = 0
        for raylet in node.all_processes.get("raylet", ()):
            for worker in psutil.Process(raylet.process.pid).children(recursive=True):
                with suppress(psutil.Error):  # it has ended since
                    found += "compress" in worker.cmdline()
        return found

    def kill_one() -> None:
        """The node that is at work, as soon as one is."""
        nonlocal most_at_work
        while told != ["over"]:
            busy = {node: compressing(node) for node in nodes}
            most_at_work = max(most_at_work, sum(busy.values()))
            if len(nodes) == 2 and (node := next((node for node, count in busy.items() if count), None)):
                nodes.remove(node)
                machines.remove_node(node, allow_graceful=False)
            time.sleep(0.1)

    try:
        nodes = [machines.add_node(num_cpus=1) for _ in range(2)]
        ray.init(address=machines.address, log_to_driver=False)
        killer = threading.Thread(target=kill_one)
        killer.start()

        def tell(key: str, now: str) -> None:
            told.append(now)

        found = sweep.sweep(cells, tmp_path / "out", partial(on_ray, address=machines.address), tell)
    finally:
        lost = [now for now in told if "was lost; waiting for another machine" in now]
        told[:] = ["over"]
        killer.join()
        ray.shutdown()
        machines.shutdown()
    assert len(nodes) == 1
    assert len(lost) == 1
    assert most_at_work == 1
    assert [one["state"] for one in found] == ["done"] * 3
    assert len({one["key"] for one in sweep.results(tmp_path / "out" / sweep.RESULTS)}) == 3
