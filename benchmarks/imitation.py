"""Imitation: a target held to fewer CPUs and less memory than it has, to stand for a smaller device.

It imitates what a small device has of these, and nothing else of it: not its processor, caches, clock or memory's
speed. What comes of it is said to be an imitation wherever it is shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EdgepressError, UsageError
from . import imitate

if TYPE_CHECKING:
    from ..export.artifact import Artifact

SOURCE = Path(imitate.__file__)
UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
LEAST_MEMORY = 10**6


class DoesNotFitError(EdgepressError):
    """What needs more memory than the imitated device has. ``fitting`` are the artifacts that do not."""

    fitting: tuple[Artifact, ...] = ()


@dataclass(frozen=True)
class Imitation:
    """The CPUs that may be used, by number, and the bytes of memory that a process may have; of neither is all."""

    cpus: tuple[int, ...] = ()
    memory: int = 0

    def __bool__(self) -> bool:
        return bool(self.cpus or self.memory)

    @property
    def query(self) -> str:
        """As :func:`take` reads it."""
        parts = [f"memory={shown(self.memory).replace(' ', '')}"] if self.memory else []
        parts += [f"cpus={','.join(map(str, self.cpus))}"] if self.cpus else []
        return "&".join(parts)

    @property
    def told(self) -> str:
        """For tables: that it is an imitation, and of what."""
        parts = [f"CPU {' and '.join(map(str, self.cpus))} alone"] if self.cpus else []
        parts += [f"{shown(self.memory)} of memory"] if self.memory else []
        return f"an imitation of a smaller device: {', '.join(parts)}"

    def to_json(self, *, by: str | None) -> dict[str, Any]:
        """For the environment of a measurement, with what held the memory; nothing of none."""
        return {"cpus": list(self.cpus), "memory_bytes": self.memory, "memory_by": by} if self else {}

    def run(
        self,
        host: Any,
        place: str,
        command: Sequence[str],
        on_line: Callable[[str], None] | None,
        *,
        processes: int = 1,
    ) -> tuple[Any, str | None]:
        """The JSON that ``command`` prints, held to these limits on ``host``, where ``imitate.py`` is in ``place``; and
        what held its memory, for as many ``processes`` as it stands for.

        Raises DoesNotFitError, and UsageError where there are no such CPUs.
        """
        if not self:
            return json.loads(host.run(command, on_line)), None
        limits = json.dumps({"cpus": list(self.cpus), "memory": self.memory * processes})
        told = json.loads(host.run(["python", f"{place}/{SOURCE.name}", limits, *command], on_line))
        if "refused" in told:
            raise UsageError(f"The target cannot be imitated: {told['refused']}.")
        if "unfit" in told:
            raise DoesNotFitError(
                f"in {shown(self.memory)} on the imitated device: held by {told['by']} it {told['unfit']}"
            )
        return told["done"], told["by"]


def take(query: str) -> tuple[Imitation, str]:
    """The imitation that ``memory=512MB&cpus=0,1`` asks for, and what else is in ``query``; UsageError for nonsense."""
    asked: dict[str, str] = {}
    rest = []
    for part in query.split("&"):
        name, _, value = part.partition("=")
        if name in {"memory", "cpus"} and name not in asked:
            asked[name] = value
        else:
            rest.append(part)
    cpus = _cpus(asked["cpus"]) if "cpus" in asked else ()
    return Imitation(cpus, _memory(asked["memory"]) if "memory" in asked else 0), "&".join(rest)


def _memory(text: str) -> int:
    match = re.fullmatch(r"(\d{1,13}(?:\.\d{1,3})?)([KMG]i?B|)", text, re.ASCII | re.IGNORECASE)
    size = round(float(match[1]) * UNITS[match[2].lower()]) if match else 0
    if size < LEAST_MEMORY:
        raise UsageError(f"'memory={text}' is not an amount of memory from 1MB on, like memory=512MB.")
    return size


def _cpus(text: str) -> tuple[int, ...]:
    match = re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text, re.ASCII)
    found: set[int] = set()
    for part in text.split(",") if match else []:
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    if not found:
        raise UsageError(f"'cpus={text}' is not a list of CPUs by number, like cpus=0,1 or cpus=0-3.")
    return tuple(sorted(found))


def shown(size: int) -> str:
    """``512 MB``, in the largest unit that it is a whole number of."""
    units = (unit for unit in ("GB", "GiB", "MB", "MiB", "kB", "KiB") if size % UNITS[unit.lower()] == 0)
    unit = next(units, "")
    return f"{size // UNITS[unit.lower()]} {unit}".rstrip()
