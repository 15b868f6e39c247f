"""CTranslate2's ``model.bin``, version 6: arrays by name, read without CTranslate2.

Every length in the file is checked against what is left of it before it is believed.

Source  ``python/ctranslate2/specs/model_spec.py`` of OpenNMT/CTranslate2, where the format is written: a version, the
        name and the revision of the model's kind, the variables (name, sizes, type, bytes), and the aliases. Numbers
        are little-endian; a name has its length before it and a zero byte at its end.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import InputError

VERSION = 6
TYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}
MOST_AXES = 8


class _Stream:
    def __init__(self, path: Path) -> None:
        self.name, self.content, self.at = path.name, path.read_bytes(), 0

    def take(self, count: int) -> bytes:
        if count > len(self.content) - self.at:
            left = len(self.content) - self.at
            raise InputError(f"{self.name} is cut short: {count} bytes are wanted at {self.at}, and {left} are left.")
        self.at += count
        return self.content[self.at - count : self.at]

    def number(self, code: str) -> int:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        return int(value)

    def text(self) -> str:
        return self.take(self.number("H")).rstrip(b"\0").decode("ascii", errors="replace")


def read(path: Path, kind: str) -> dict[str, NDArray[Any]]:
    """The arrays of a model of this ``kind`` (``WhisperSpec``); aliases are names of the same array.

    Raises InputError for a file of another format or kind, or one that contradicts itself.
    """
    stream = _Stream(path)
    version = stream.number("I")
    if version != VERSION:
        raise InputError(f"{path.name} has version {version} of CTranslate2's format; version {VERSION} is read.")
    found = stream.text()
    if found != kind:
        raise InputError(f"{path.name} holds a '{found}', not a '{kind}'.")
    stream.number("I")  # the revision of that kind
    arrays: dict[str, NDArray[Any]] = {}
    for _ in range(stream.number("I")):
        name = stream.text()
        arrays[name] = _array(stream, name)
    for _ in range(stream.number("I")):
        alias, name = stream.text(), stream.text()
        if name not in arrays:
            raise InputError(f"{path.name}: '{alias}' stands for '{name}', which is not there.")
        arrays[alias] = arrays[name]
    if stream.at != len(stream.content):
        raise InputError(f"{path.name} has {len(stream.content) - stream.at} bytes after its end.")
    return arrays


def _array(stream: _Stream, name: str) -> NDArray[Any]:
    axes = stream.number("B")
    if axes > MOST_AXES:
        raise InputError(f"{stream.name}: '{name}' has {axes} axes; at most {MOST_AXES} are read.")
    shape = [stream.number("I") for _ in range(axes)]
    code, size = stream.number("B"), stream.number("I")
    if code not in TYPES:
        raise InputError(f"{stream.name}: '{name}' has the type {code}, which is not read.")
    kind, count = np.dtype(TYPES[code]), 1
    for length in shape:
        count *= length
    if count * kind.itemsize != size or not count:
        raise InputError(f"{stream.name}: '{name}' has {size} bytes for an array of shape {shape} and type {kind}.")
    return np.frombuffer(stream.take(size), dtype=kind).reshape(shape)
