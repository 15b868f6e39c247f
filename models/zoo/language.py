"""Rows of a language model, for several entries: tokens in succession, each labelled with the one after it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..data import NO_LABEL, Ints, Rows, key_of


def rows(windows: Iterable[Ints], pad_id: int) -> Rows:
    """A row for each window of token ids; the last token of one has no label."""
    ids = tuple(np.asarray(window, dtype=np.int64) for window in windows)
    labels = tuple(np.append(window[1:], NO_LABEL) for window in ids)
    return Rows({"input_ids": ids}, labels, tuple(map(key_of, ids)), {"input_ids": float(pad_id)})
