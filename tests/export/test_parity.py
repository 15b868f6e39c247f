"""Parity cannot be passed by a reference that measures nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from edgepress.errors import ParityError
from edgepress.export import parity

LEAST = float(np.finfo(np.float32).min)


def _checked(ours: list[float], theirs: list[float], precision: str = "fp32") -> Any:
    def gives(values: list[float]) -> parity.Run:
        return lambda _: np.array(values, np.float32)

    feeds = [{"x": np.zeros((1, 4), np.float32)}]
    return parity.check(gives(ours), gives(theirs), feeds, precision=precision, reference_name="the module")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([1, 2, 3, 4], [1, 2, np.nan, 4], "not numbers"),
        ([1, 2, 3, 4], [1, 2, np.inf, 4], "rule out"),
        ([-100, 2, LEAST, 4], [1, 2, LEAST, 4], "away"),
        ([1, 2, 3, 4], [1, 2, LEAST, 4], "rule out"),
        ([1, 2, -LEAST, 4], [1, 2, LEAST, 4], "rule out"),
        ([1, LEAST, LEAST, 4], [1, 2, LEAST, 4], "away"),
        ([1, np.nan, LEAST, 4], [1, 2, LEAST, 4], "not finite"),
        ([1, 2, np.nan, 4], [1, 2, LEAST, 4], "rule out"),
    ],
)
def test_what_no_measure_can_be_taken_of_is_no_parity(
    ours: list[float], theirs: list[float], message: str, precision: str
) -> None:
    with pytest.raises(ParityError, match=message):
        _checked(ours, theirs, precision)


@pytest.mark.parametrize("least", [LEAST, -np.inf, -65504.0])
def test_what_is_ruled_out_is_no_difference(least: float) -> None:
    assert _checked([1, 2, least, 4], [1, 2, LEAST, 4.002]).max_rel == pytest.approx(0.002 / 4.002, rel=1e-3)
