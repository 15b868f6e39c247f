"""What every tool is given, and what it hands back. It runs in the tool's own environment: numpy, and no edgepress.

A job is a folder: ``job.json``, the float model as edgepress exports it (``float/model.onnx``) and as it comes out of
tracing, which is what the tools of ONNX Runtime do best on (``traced/model.onnx``), and the calibration rows
(``rows.npz``, an array by ``number/input``). A tool writes one folder a file and ``contenders.json``.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

Feeds = dict[str, Any]


@dataclass(frozen=True)
class Job:
    folder: Path
    out: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "job.json").read_text(encoding="utf-8"))
        return found

    @property
    def float_model(self) -> Path:
        return self.folder / "float" / "model.onnx"

    @property
    def traced_model(self) -> Path:
        return self.folder / "traced" / "model.onnx"

    def rows(self, length: int | None = None) -> Iterator[Feeds]:
        """One row after the other, as long as it is, or cut and padded to ``length`` tokens."""
        with np.load(self.folder / "rows.npz", allow_pickle=False) as arrays:
            for row in range(self.facts["rows"]):
                feeds = {name: arrays[f"{row}/{name}"] for name in self.facts["inputs"]}
                if length and "input_ids" in feeds:
                    feeds = {
                        n: np.pad(a[:, :length], ((0, 0), (0, max(0, length - len(a[0]))))) for n, a in feeds.items()
                    }
                yield feeds


@dataclass
class Made:
    """What a tool has written so far."""

    job: Job
    contenders: list[dict[str, Any]]
    failed: dict[str, str]

    def make(self, name: str, runtime: str, write: Callable[[Path], Any], *, disabled: tuple[str, ...] = ()) -> None:
        """Have ``write`` put the file called ``name`` at the path that it is handed; a failure becomes its line."""
        path = self.job.out / slug(name) / ("model.xml" if runtime == "openvino" else "model.onnx")
        path.parent.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        try:
            write(path)
        except Exception as error:  # a tool that fails is a line of the table
            said = str(error).strip().splitlines() or [type(error).__name__]
            self.failed[name] = said[0]
            print(f"{name}: failed, {said[0]}", file=sys.stderr, flush=True)
            return
        self.add(name, runtime, path, disabled=disabled, seconds=time.perf_counter() - begin)

    def add(
        self, name: str, runtime: str, path: Path, *, disabled: tuple[str, ...] = (), seconds: float | None = None
    ) -> None:
        row = {"name": name, "runtime": runtime, "model": str(path.relative_to(self.job.out))}
        self.contenders.append({**row, "disabled": list(disabled), "seconds": seconds})
        print(f"{name}: made", file=sys.stderr, flush=True)


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def main(tool: Callable[[Job, Made], None]) -> None:
    """Run ``tool`` as ``python TOOL.py JOB OUT``."""
    warnings.simplefilter("ignore")
    job = Job(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
    job.out.mkdir(parents=True, exist_ok=True)
    made = Made(job, [], {})
    tool(job, made)
    text = json.dumps({"contenders": made.contenders, "failed": made.failed}, indent=1)
    (job.out / "contenders.json").write_text(text + "\n", encoding="utf-8")
