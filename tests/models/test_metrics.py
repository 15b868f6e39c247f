"""Metrics: intervals against brute force, pairs against pairs."""

from __future__ import annotations

import numpy as np
import pytest
from edgepress.errors import UsageError
from edgepress.models import metrics


def test_the_interval_agrees_with_a_plain_bootstrap() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 400)
    logits = random.normal(size=(400, 2)).astype(np.float32)
    found = metrics.quality("accuracy", logits, labels)
    per_row = (logits.argmax(1) == labels) * 100.0
    plain = [per_row[random.integers(0, 400, 400)].mean() for _ in range(4000)]
    assert found.value == pytest.approx(per_row.mean())
    assert [found.low, found.high] == pytest.approx(np.percentile(plain, [2.5, 97.5]), abs=0.8)


def test_the_drop_is_paired() -> None:
    labels = np.zeros(1000, dtype=np.int64)
    original = np.tile([[1.0, 0.0]], (1000, 1)).astype(np.float32)
    original[:300] = [0.0, 1.0]
    changed = original.copy()
    changed[300:310] = [0.0, 1.0]
    found = metrics.quality("accuracy", changed, labels, original=original)
    assert found.drop == pytest.approx(1.0)
    assert found.drop_low is not None
    assert found.drop_high is not None
    assert 0 < found.drop_low < 1 < found.drop_high < 2
    assert found.high - found.low > 3 * (found.drop_high - found.drop_low)


def test_unknown_metrics_are_refused() -> None:
    with pytest.raises(UsageError, match="accuracy"):
        metrics.get("quality")
