"""Readable: a row of a split as people read it, from what the model is given.

Rows keep no more than a model's inputs, so texts are its tokens put together again (without capitals, where the
tokenizer has none) and images are its pixels with the normalisation undone.
"""

from __future__ import annotations

import json
import struct
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .data import Rows
from .media import PROCESSORS
from .workload import VOCABULARIES, Workload

Pixels = NDArray[np.uint8]

SIDE = 64
"""Pixels of a thumbnail's longer side, at most about twice."""


class Readable:
    """Shows the rows of ``workload``; what cannot be shown, for want of a tokenizer or of pixels, is left empty."""

    def __init__(self, workload: Workload) -> None:
        self.tokenizer = _tokenizer(workload)
        self.normalised = _normalisation(workload)

    def text(self, rows: Rows, at: int) -> str:
        """The text of a row, pairs with a bar between them; empty where rows are not made of tokens."""
        ids = rows.inputs.get("input_ids")
        if ids is None or self.tokenizer is None:
            return ""
        tokenizer, row = self.tokenizer, np.asarray(ids[at])
        hidden = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        parts = np.split(row, np.flatnonzero(row == tokenizer.sep_token_id)) if tokenizer.sep_token_id else [row]
        said = (tokenizer.decode([int(one) for one in part if one not in hidden]) for part in parts)
        return " | ".join(filter(None, (" ".join(text.split()) for text in said)))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The text of each token, or its number."""
        if self.tokenizer is None:
            return [str(int(one)) for one in ids]
        return [self.tokenizer.decode([int(one)]).strip() or "␣" for one in ids]

    def thumbnail(self, rows: Rows, at: int) -> bytes:
        """A row's image as a small PNG file; empty where it has none."""
        for name, values in rows.inputs.items():
            array = np.asarray(values[at])
            if array.ndim == 3 and array.shape[0] in {1, 3} and min(array.shape[1:]) >= 8:
                return png(self._pixels(name, array))
        return b""

    def _pixels(self, name: str, array: NDArray[Any]) -> Pixels:
        """[height, width, channels] of bytes; where nobody says how the input was normalised, darkest to lightest."""
        values = array.astype(np.float64)
        if name == "pixel_values" and self.normalised:
            mean, spread = (np.resize(part, (len(values), 1, 1)) for part in self.normalised)
            values = values * spread + mean
        elif values.min() < 0 or values.max() > 1:
            values = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
        step = max(1, max(values.shape[1:]) // SIDE)
        small = np.moveaxis(values[:, ::step, ::step], 0, -1)
        result: Pixels = (255 * small.clip(0, 1)).round().astype(np.uint8)
        return result


def _tokenizer(workload: Workload) -> Any:
    """The tokenizer that came with ``workload``, None where none did or it cannot be loaded."""
    from .encode import load_tokenizer

    if not set(VOCABULARIES) & set(workload.files):
        return None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in workload.files.items():
            if not file.endswith(".py"):
                (folder / file).write_bytes(content)
        (folder / "config.json").write_text(json.dumps(dict(workload.skeleton.config)), encoding="utf-8")
        try:
            return load_tokenizer(folder)
        except InputError:
            return None


def _normalisation(workload: Workload) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """The mean and the standard deviation by which the model's processor normalises images."""
    for name in PROCESSORS:
        try:
            said = json.loads(workload.files.get(name, b"{}"))
            mean, spread = (np.asarray(said[key], dtype=np.float64) for key in ("image_mean", "image_std"))
        except (ValueError, KeyError, TypeError):
            continue
        if said.get("do_normalize", True) and mean.size and mean.shape == spread.shape:
            return mean, spread
    return None


def png(pixels: Pixels, palette: bytes = b"", opacity: bytes = b"") -> bytes:
    """``pixels`` [height, width, 1 or 3] of bytes as a PNG file (ISO/IEC 15948).

    With a ``palette`` of 3 bytes a colour, and the ``opacity`` of each, pixels [height, width, 1] are places in it.
    """
    height, width, channels = pixels.shape
    kind = 3 if palette else {1: 0, 3: 2}[channels]
    lines = b"".join(b"\0" + line.tobytes() for line in np.ascontiguousarray(pixels, dtype=np.uint8))

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))]
    parts += [chunk(b"PLTE", palette), chunk(b"tRNS", opacity)] if palette else []
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", zlib.compress(lines, 9)), chunk(b"IEND", b"")])
