"""Spill: tensors that are wanted again later wait in a file, and not in memory.

It lies where temporary files do (``TMPDIR`` says where). Where that is in memory itself, so are they.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from tempfile import TemporaryFile

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spilled:
    """A tensor in the file."""

    start: int
    like: Tensor
    """Its shape, strides and type; on the device "meta"."""
    device: torch.device


class Spill:
    """An unnamed file in the folder for temporary ones, gone with this object."""

    def __init__(self) -> None:
        self._end = 0
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        """Places that are free, by their bytes: the next tensor of the same size goes there."""

    @cached_property
    def _file(self) -> FileIO:
        file = TemporaryFile(buffering=0)  # noqa: SIM115 - open as long as this object is
        weakref.finalize(self, file.close)
        return file

    def put(self, values: Tensor) -> Spilled:
        """Raises OSError where there is no folder for temporary files, or no room in it."""
        data = _bytes(torch.empty_like(values, device="cpu").copy_(values))
        free = self._free[len(data)]
        start = free[-1] if free else self._end
        self._file.seek(start)
        written = 0
        while written < len(data):
            written += self._file.write(data[written:])
        if free:
            free.pop()
        else:
            self._end += len(data)
        return Spilled(start, torch.empty_like(values, device="meta"), values.device)

    def read(self, spilled: Spilled) -> Tensor:
        found = torch.empty_like(spilled.like, device="cpu")
        data = _bytes(found)
        self._file.seek(spilled.start)
        read = 0
        while read < len(data):
            read += self._file.readinto(data[read:])
        return found.to(spilled.device)

    def free(self, spilled: Spilled) -> None:
        self._free[spilled.like.nbytes].append(spilled.start)


def _bytes(values: Tensor) -> memoryview:
    """The memory of a tensor that fills it."""
    return values.as_strided((values.numel(),), (1,)).view(torch.uint8).numpy().data
