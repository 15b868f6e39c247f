"""Memory: what has been freed goes back to the operating system.

The allocator of the GNU C library keeps freed blocks between others that are still in use. After many tensors of many
sizes such holes add up to more than all that is in use.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def give_back() -> None:
    """Return the holes, where the C library can: it takes some milliseconds, so this is for now and then."""
    if _trim:
        _trim(0)


def giving_back(items: Iterable[Item], *, every: int = 8) -> Iterator[Item]:
    """``items``, such as batches: their sizes differ, so that they leave holes, returned before every so many."""
    for number, item in enumerate(items):
        if number % every == 0:
            give_back()
        yield item
