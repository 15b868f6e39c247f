"""What is measured again on a machine that something disturbs."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from edgepress.benchmarks.disturbance import calmest, disturbed
from edgepress.benchmarks.measurement import Measurement


def taking(*latencies_ms: float) -> list[Measurement]:
    """Measurements of one run, by their latencies."""
    plain: dict[str, Any] = {field.name: None for field in fields(Measurement) if field.init}
    return [Measurement(**{**plain, "samples_ms": (ms, ms, ms)}) for ms in latencies_ms]


def test_lots_that_something_disturbed() -> None:
    assert disturbed([10.0, 10.5, 14.0, 9.8, 11.2, 10.9]) == [2]
    assert disturbed([10.0, 13.0, 9.0, 10.0, 16.0]) == [4, 1]
    assert disturbed([10.0]) == []


@pytest.mark.parametrize(
    ("first_ms", "taken", "kept"),
    [
        ([10.0, 9.0], 1, 10.0),
        ([10.9, 9.0], 1, 10.9),  # calm enough
        ([15.0, 10.2], 2, 10.2),
        ([15.0, 17.0, 10.0], 2, 15.0),
    ],
)
def test_the_calmer_run_counts(first_ms: list[float], taken: int, kept: float) -> None:
    runs = [taking(ms, 5.0) for ms in first_ms]
    found = calmest(lambda: runs.pop(0), usual_ms=10.0)
    assert found[0].p50 == kept
    assert len(runs) == len(first_ms) - taken
