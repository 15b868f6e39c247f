"""Every score: finite, deterministic, of the right length; gradient scores against brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import edgepress as ep
import pytest
import torch
from edgepress.compress import score as scores
from edgepress.compress.score.gradients import gate_gradients
from edgepress.errors import UsageError
from edgepress.models.surgery import gated


@pytest.mark.parametrize("method", scores.METHODS)
def test_conformance(workload: Any, method: str) -> None:
    first, second = (ep.score(workload, method, rows=48, seed=1) for _ in range(2))
    assert first.values.shape == (workload.structure.num_units,)
    assert first.values.dtype == torch.float64
    assert torch.isfinite(first.values).all()
    assert torch.equal(first.values, second.values)
    assert first.values.std() > 0
    module = scores.get(method)
    assert all(heading in (module.__doc__ or "") for heading in ("What", "When", "Cost", "Source"))


def test_every_method_file_is_listed() -> None:
    folder = Path(scores.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} - {"__init__", "gradients"} == set(scores.METHODS)


def test_an_unknown_method_is_refused(workload: Any) -> None:
    with pytest.raises(UsageError, match="fisher"):
        ep.score(workload, "nope")


def test_gate_gradients_against_finite_differences(workload: Any) -> None:
    double = workload.with_module(workload.module.double(), workload.structure, workload.plan)
    try:
        rows = workload.data.calibration.take(4)
        structure = workload.structure
        (gradient,) = list(gate_gradients(double, structure, rows, None))
        batch = next(rows.batches(32))

        def losses(gates: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), gated(double.module, structure, gates):
                return torch.nn.functional.cross_entropy(double.forward(batch.inputs), batch.labels, reduction="none")

        step = 1e-5
        ones = torch.ones(structure.num_units, dtype=torch.float64)
        for unit in range(0, structure.num_units, 37):
            nudge = torch.zeros_like(ones)
            nudge[unit] = step
            slope = (losses(ones + nudge) - losses(ones - nudge)) / (2 * step)
            torch.testing.assert_close(gradient[:, unit], slope, rtol=1e-4, atol=1e-8)
    finally:
        workload.module.float()
