"""Memory: what has been freed goes back to the operating system.

The allocator of the GNU C library keeps freed blocks between others that are still in use. After many tensors of many
sizes such holes add up to more than all that is in use.
"""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Return the holes, where the C library can: it takes some milliseconds, so this is for now and then."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)
