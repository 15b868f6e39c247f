"""The run folder: stages that are found again, so that a run that was killed or is started again goes on behind them.

Each stage is a folder in ``stages``, named after the sha256 of everything it depends on and written in one step.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from . import recipe as recipes
from .errors import EdgepressError, InputError, UsageError
from .files import new_folder, write_text
from .models.workload import Progress
from .plan import read_json
from .recipe import Recipe


class Display(Protocol):
    """Where a run tells how far it is."""

    def progress(self, stage: str) -> Progress: ...

    def say(self, text: str) -> None: ...


class Silent:
    def progress(self, stage: str) -> Progress:
        return lambda done, total, note: None

    def say(self, text: str) -> None:
        pass


@contextmanager
def at_work(out: Path) -> Iterator[None]:
    """Hold the folder ``out``, which is made where there is none, for this process alone; what it made and what is
    empty in the end is removed.

    The kernel lets go of the lock however its holder ends. Raises UsageError where another holds it or ``out`` is a
    file, and InputError where it cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder for the run with -o.")
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}.") from error
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"Another edgepress is at work in {out}; wait for it, or give another folder.") from error
        except OSError:
            pass  # a disk over a network that locks no folders
        yield
    finally:
        os.close(folder)
        with suppress(OSError):  # not empty
            for one in new:
                one.rmdir()


@contextmanager
def claimed(out: Path, recipe: Recipe) -> Iterator[None]:
    """Make ``out``, which this process holds, a run folder, and unmake it where the block finds that there is nothing
    to run.

    Raises UsageError where ``out`` holds something else.
    """
    path = out / "recipe.yaml"
    if any(out.iterdir()) and not path.is_file():
        raise UsageError(f"{out} holds other files and is not a run folder; give another one with -o.")
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    write_text(path, recipe.to_yaml())
    for leftover in (out / "stages").glob(".*"):  # what a killed run was writing
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        yield
    except EdgepressError:
        if before is not None:
            write_text(path, before)
        else:
            path.unlink()
        raise


class Stages:
    """The stages of the run in ``out``; ``facts`` are what all of them depend on, ``done`` those that were passed."""

    def __init__(self, out: Path, facts: Mapping[str, Any], show: Display) -> None:
        self.out, self.facts, self.show = out, facts, show
        self.done: list[dict[str, Any]] = []

    def key(self, name: str, depends: Mapping[str, Any]) -> str:
        """The address of a stage: all that it depends on."""
        facts = {"stage": name, **self.facts, **depends}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    def run(
        self, name: str, depends: Mapping[str, Any], make: Callable[[Path, Progress], dict[str, Any]]
    ) -> tuple[str, Path, dict[str, Any]]:
        """The key, folder and result of a stage; ``make`` fills the folder unless a finished one is there."""
        key = self.key(name, depends)
        begin = time.monotonic()
        number = len(self.done) + 1
        found = sorted((self.out / "stages").glob(f"*-{name}-{key}"))
        folder = found[0] if found else self.out / "stages" / f"{number:02d}-{name}-{key}"
        if not found:
            with new_folder(folder) as place:
                result = make(place, self.show.progress(name))
                (place / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
        self.done.append({"name": name, "seconds": round(time.monotonic() - begin, 2), "reused": bool(found)})
        return key, folder, read_json(folder / "result.json")

    def forget(self, name: str) -> None:
        """Remove the finished stages of that name, so that they are made anew."""
        for stale in (self.out / "stages").glob(f"*-{name}-*"):
            shutil.rmtree(stale)


def read_summary(run: Path) -> dict[str, Any]:
    """The summary of a finished run; InputError where ``run`` is not one."""
    if not (run / "summary.json").is_file():
        raise InputError(f"{run} is not a finished run: it has no summary.json.")
    summary = read_json(run / "summary.json")
    if not isinstance(summary, dict) or "original" not in summary:
        raise InputError(f"{run / 'summary.json'} is not the summary of a run.")
    return summary


def resumed_recipe(run: Path) -> dict[str, Any]:
    """The recipe that a run folder was started with."""
    if not (run / "recipe.yaml").is_file():
        raise UsageError(f"There is no run to resume in {run}: it has no recipe.yaml.")
    return recipes.read(run / "recipe.yaml")
