"""One edgepress at a time works in a run folder, and what it made there goes where nothing was to be run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from edgepress import pipeline, stages, sweep
from edgepress.errors import InputError, UsageError
from edgepress.recipe import Recipe


def test_a_second_run_in_a_folder_is_refused_and_leaves_the_first_alone(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with stages.at_work(out):
        writing = out / "stages" / ".01-baseline.half"
        writing.mkdir(parents=True)
        (out / "recipe.yaml").write_text("model: zoo:vit-fashion\n")
        for again in (
            lambda: pipeline.compress(Recipe(model="zoo:none"), out),
            lambda: sweep.sweep([], out, sweep.local, lambda key, now: None),
        ):
            with pytest.raises(UsageError, match=f"Another edgepress is at work in {out}"):
                again()
        assert writing.is_dir()
        assert (out / "recipe.yaml").read_text() == "model: zoo:vit-fashion\n"
    with pytest.raises(UsageError, match="no zoo model"):
        pipeline.compress(Recipe(model="zoo:none"), out)
    assert not writing.exists(), "what a killed run was writing"


def test_folders_that_were_made_for_nothing_go(tmp_path: Path) -> None:
    with pytest.raises(UsageError), stages.at_work(tmp_path / "a" / "b"):
        raise UsageError("nothing to run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    for place, said in (
        ("file", "is a file; give a folder"),
        ("file/below", "below cannot be written: Not a directory"),
    ):
        with pytest.raises((UsageError, InputError), match=said), stages.at_work(tmp_path / place):
            pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such signal")
def test_a_cell_ends_with_the_process_that_began_it() -> None:
    told, tell = os.pipe()
    parent = os.fork()
    if not parent:
        child = subprocess.Popen(["/bin/sleep", "60"], preexec_fn=sweep._ends_with_us)  # noqa: PLW1509
        os.write(tell, str(child.pid).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    child_id = int(os.read(told, 20))
    os.close(told)
    os.close(tell)
    for _ in range(100):
        if not psutil.pid_exists(child_id) or psutil.Process(child_id).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    os.kill(child_id, signal.SIGKILL)
    pytest.fail("it outlived its parent")
