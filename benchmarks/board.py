"""A live table on stderr of many pieces of work, each with what it said last."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text


@contextmanager
def board(names: Mapping[str, str]) -> Iterator[Callable[[str, str], None]]:
    """What tells of the work ``key`` what it is at; ``names`` are what the keys are shown as.

    Where stderr is no terminal, what is told is a line each time that it is new.
    """
    console = Console(stderr=True)
    said = dict.fromkeys(names, "")
    since: dict[str, float] = {}
    changed: dict[str, float] = {}

    def table() -> Table:
        made = Table("cell", "now", "time", header_style="bold")
        for key, name in names.items():
            taken = f"{changed[key] - since[key]:.0f} s" if key in since else ""
            made.add_row(Text(name), Text(said[key]), taken)
        return made

    with Live(get_renderable=table, console=console, refresh_per_second=2, transient=True, auto_refresh=True) as live:

        def tell(key: str, now: str) -> None:
            changed[key] = time.monotonic()
            since.setdefault(key, changed[key])
            if said.get(key) != now:
                said[key] = now
                if not console.is_terminal:
                    console.print(f"{names[key]}: {now}", highlight=False, markup=False)

        yield tell
        live.refresh()
