"""What commands show: progress on stderr, documents and tables on stdout."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..files import check_new_folder

if TYPE_CHECKING:
    from ..models.workload import Progress, Workload


class Screen:
    """Progress on stderr: one line for the stage at work, with its step, rate and time left."""

    def __init__(self, stack: ExitStack) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Left

        self.console = Console(stderr=True, quiet=not first())
        spinner, stage = SpinnerColumn(), TextColumn("[bold]{task.description:<12}")
        figures = TextColumn("{task.fields[note]}")
        columns = (
            spinner,
            stage,
            BarColumn(24),
            TaskProgressColumn(show_speed=True),
            figures,
            TimeElapsedColumn(),
            Left(),
        )
        self._bars = stack.enter_context(Progress(*columns, console=self.console, transient=True))
        self._shown: dict[str, tuple[str, Any]] = {}

    def progress(self, stage: str, lane: str = "") -> Progress:
        """What shows the steps of ``stage``, in the place of the stage before it in the same ``lane``."""

        def step(done: int, total: int, note: str) -> None:
            shown, task = self._shown.get(lane, ("", None))
            if stage != shown:
                if task is not None:
                    self._bars.remove_task(task)
                task = self._bars.add_task(stage, total=None, note="")
                self._shown[lane] = stage, task
                if not self.console.is_terminal:
                    self.say(f"{stage} …")
            figures = f"{done:,}/{total:,} {note}" if total else note
            self._bars.update(task, completed=done, total=total or None, note=figures)

        return step

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)


def first() -> bool:
    """Whether this is the process that writes and prints, of those that torchrun or accelerate launch started."""
    return os.environ.get("RANK", "0") == "0"


def print_json(document: Any) -> None:
    print(json.dumps(document, indent=2))


def load(
    stack: ExitStack,
    model: str,
    data: str | None,
    columns: str | None,
    seed: int,
    trusted: bool,
    metric: str | None = None,
) -> tuple[Workload, Screen]:
    from .. import recipe
    from ..models import workload

    if columns and not data:
        raise UsageError("--columns is of --data; give both.")
    screen = Screen(stack)
    mapping = recipe.columns(columns) if columns else None
    loaded = workload.load(
        model, data, columns=mapping, seed=seed, trust_remote_code=trusted, progress=screen.progress("load")
    )
    if metric and not len(loaded.data.evaluation):
        raise UsageError(f"--metric judges rows, and {model} comes with none: give them with --data.")
    return loaded.judged_by(metric), screen


def table(original: dict[str, Any], results: list[dict[str, Any]], chosen: str | None) -> None:
    from ..benchmarks.imitation import take
    from ..benchmarks.tables import rich_table, terminal

    imitated, _ = take(str(original["target"]).partition("?")[2])
    if imitated:
        print(imitated.told)
    terminal().print(rich_table(original, results, chosen))


def check_out(out: Path, model: str, data: str | None) -> None:
    """Refuse, before anything is loaded, a folder ``out`` that cannot be written, or must not be replaced."""
    check_new_folder(out, model, model.partition("@")[2], data)  # of a function's checkpoint, FUNCTION@FOLDER


def unfinished(out: Path) -> Path:
    """Where the state of a distillation is until its checkpoint is written."""
    place = out.resolve()
    return place.with_name(f"{place.name}.unfinished.safetensors")
