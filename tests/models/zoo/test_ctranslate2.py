"""CTranslate2's format: what is written by the book is read back; anything else is one sentence."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgepress.errors import InputError
from edgepress.models.zoo import ctranslate2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ARRAYS = {
    "encoder/conv1/weight": np.arange(24, dtype=np.float16).reshape(2, 3, 4),
    "encoder/num_heads": np.array(6, dtype=np.int16),
    "decoder/bias": np.linspace(-1, 1, 5, dtype=np.float32),
    "decoder/codes": np.array([-3, 3], dtype=np.int8),
}
CODES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


def _text(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def _written(arrays: dict[str, Any], aliases: dict[str, str], version: int = 6, kind: str = "WhisperSpec") -> bytes:
    parts = [struct.pack("<I", version), _text(kind), struct.pack("<II", 3, len(arrays))]
    for name, array in arrays.items():
        sizes = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        parts += [_text(name), sizes, struct.pack("<BI", CODES[array.dtype.name], array.nbytes), array.tobytes()]
    parts.append(struct.pack("<I", len(aliases)))
    parts += [_text(alias) + _text(name) for alias, name in aliases.items()]
    return b"".join(parts)


WHOLE = _written(ARRAYS, {"decoder/tied": "decoder/bias"})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ctranslate2") / "model.bin"


def test_what_is_written_is_read(path: Path) -> None:
    path.write_bytes(WHOLE)
    found = ctranslate2.read(path, "WhisperSpec")
    assert set(found) == {*ARRAYS, "decoder/tied"}
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert found["decoder/tied"] is found["decoder/bias"]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, len(WHOLE) - 1))
def test_a_file_that_is_cut_short(path: Path, length: int) -> None:
    path.write_bytes(WHOLE[:length])
    with pytest.raises(InputError, match="cut short"):
        ctranslate2.read(path, "WhisperSpec")


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_a_file_with_a_wrong_byte(path: Path, place: int, change: int) -> None:
    """It is read, with another value or name, or it is refused in a sentence: never anything else."""
    path.write_bytes(WHOLE[:place] + bytes([WHOLE[place] ^ change]) + WHOLE[place + 1 :])
    try:
        found = ctranslate2.read(path, "WhisperSpec")
    except InputError:
        return
    assert sum(array.nbytes for array in found.values()) <= 2 * len(WHOLE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_written(ARRAYS, {}, version=5), "version 5"),
        (_written(ARRAYS, {}, kind="TransformerSpec"), "'TransformerSpec', not a 'WhisperSpec'"),
        (_written(ARRAYS, {"a": "nothing"}), "stands for 'nothing', which is not there"),
        (WHOLE + b"more", "4 bytes after its end"),
        (_written({"a": np.zeros((1,) * 9, dtype=np.int8)}, {}), "9 axes; at most 8"),
        (WHOLE.replace(struct.pack("<BI", 4, 48), struct.pack("<BI", 9, 48)), "the type 9"),
        (
            WHOLE.replace(struct.pack("<BI", 4, 48), struct.pack("<BI", 4, 46)),
            r"46 bytes for an array of shape \[2, 3, 4\]",
        ),
    ],
)
def test_what_contradicts_itself_is_said(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        ctranslate2.read(path, "WhisperSpec")
