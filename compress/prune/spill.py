"""Spill: tensors that are wanted again later wait in a file, and not in memory."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
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
        self._file = TemporaryFile(buffering=0)  # noqa: SIM115 - open as long as this object is
        self._end = 0
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        """Places that are free, by their bytes: the next tensor of the same size goes there."""

    def put(self, values: Tensor) -> Spilled:
        """Raises OSError where the disk is full."""
        data = _bytes(torch.empty_like(values, device="cpu").copy_(values))
        free = self._free[len(data)]
        start = free.pop() if free else self._end
        self._file.seek(start)
        written = 0
        while written < len(data):
            written += self._file.write(data[written:])
        self._end = max(self._end, start + len(data))
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
