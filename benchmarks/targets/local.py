"""This machine: a command is a process of its own."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import EdgepressError
from ..environment import fingerprint

Progress = Callable[[int, int, str], None]


class Local:
    def __init__(self) -> None:
        self.verified: set[str] = set()

    def put(self, folder: Path, names: Sequence[str] | None = None, progress: Progress | None = None) -> str:
        """The path of ``folder`` over there; nothing has to move."""
        return str(folder.resolve())

    def environment(self, threads: int) -> dict[str, Any]:
        return fingerprint(threads)

    def run(self, argv: Sequence[str], on_line: Callable[[str], None] | None = None) -> bytes:
        """What ``argv`` prints on stdout; each line of its stderr goes to ``on_line``. "python" is this interpreter.

        Raises EdgepressError with the last line of stderr where the command fails.
        """
        command = [sys.executable if word == "python" else word for word in argv]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # noqa: S603 - our own words
        assert process.stdout is not None
        assert process.stderr is not None
        lines: list[str] = []
        stderr = process.stderr

        def drain() -> None:
            for raw in stderr:
                line = raw.decode(errors="replace").rstrip()
                lines.append(line)
                if on_line:
                    on_line(line)

        reader = threading.Thread(target=drain, daemon=True)
        reader.start()
        try:
            output = process.stdout.read()
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            reader.join()
        if code:
            why = next((line for line in reversed(lines) if line), "it said nothing")
            raise EdgepressError(f"The benchmark process ended with code {code}: {why}")
        return output


@contextmanager
def connect(_address: object = None) -> Iterator[Local]:
    yield Local()
