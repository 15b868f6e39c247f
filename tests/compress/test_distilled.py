"""Quantization-aware distillation trains what the file then computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import pytest
import torch
from edgepress.compress.quantize.distilled import distilled
from edgepress.compress.quantize.fake import quantized
from edgepress.compress.recover import recover
from edgepress.errors import UsageError
from edgepress.export.artifact import open_artifact
from edgepress.export.backends import onnx
from edgepress.plan import QuantizationPlan


def _distance(workload: Any, plan: QuantizationPlan, original: Any) -> float:
    """Mean squared difference of the answers to the evaluation rows."""
    total, count = 0.0, 0
    for batch in original.data.evaluation.batches(16):
        with torch.no_grad():
            wanted = original.forward(batch.inputs)
            with quantized(workload.module, plan):
                total += float((workload.forward(batch.inputs) - wanted).square().sum())
        count += wanted.numel()
    return total / count


@pytest.fixture(scope="module")
def coarse(workload: Any) -> QuantizationPlan:
    """A plan that loses a lot: every range is an eighth of what the rows need."""
    plan = ep.quantize(workload, "int8", rows=16, smooth="none", correct_bias=False)
    spans = {name: (low / 8, high / 8) for name, (low, high) in plan.activations.items()}
    return QuantizationPlan("int8", plan.weights, spans, outputs=plan.outputs)


def test_training_wins_back_what_rounding_loses(workload: Any, coarse: QuantizationPlan, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in workload.module.state_dict().items()}
    found = distilled(workload, coarse, steps=30, batch=16, lr=1e-3)
    assert all(torch.equal(before[name], tensor) for name, tensor in workload.module.state_dict().items())
    plan = found.plan
    assert _distance(found.workload, plan, workload) < 0.3 * _distance(workload, coarse, workload)
    assert plan.weights == coarse.weights
    assert set(plan.activations) == set(coarse.activations)
    assert plan.activations != coarse.activations
    spans = [plan.activations[f"bert.encoder.layer.0.attention.self.{name}"] for name in ("query", "key", "value")]
    assert len(set(spans)) == 1, "what reads one tensor has one range"
    assert set(plan.outputs) == set(coarse.outputs)
    assert [name for name, _ in found.workload.module.named_parameters()] == list(
        dict(workload.module.named_parameters())
    )
    tables = [name for name in before if "embeddings" in name and "LayerNorm" not in name]
    state = found.workload.module.state_dict()
    assert all(torch.equal(before[name], state[name]) for name in tables)

    artifact = onnx.write(found.workload, plan, tmp_path / "int8")
    rows = workload.data.evaluation
    with onnx.open_session(open_artifact(artifact.folder)) as session:
        for batch in rows.take(32, 0).batches(8):
            feeds = {name: tensor.numpy() for name, tensor in batch.inputs.items()}
            with torch.no_grad(), quantized(found.workload.module, plan):
                wanted = found.workload.forward(batch.inputs).numpy()
            assert np.abs(session.run(feeds)[0] - wanted).max() < 0.1 * np.abs(wanted).max()


def test_a_killed_run_goes_on_with_the_ranges_it_had(workload: Any, coarse: QuantizationPlan, tmp_path: Path) -> None:
    whole = distilled(workload, coarse, steps=22, batch=8)
    state = tmp_path / "state.safetensors"

    def kill(step: int, _total: int, _note: str) -> None:
        if step == 21:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distilled(workload, coarse, steps=22, batch=8, checkpoint=state, progress=kill)
    resumed = distilled(workload, coarse, steps=22, batch=8, checkpoint=state)
    assert whole.plan.activations == resumed.plan.activations
    ours, theirs = whole.workload.module.state_dict(), resumed.workload.module.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_dynamic_ranges_are_not_learned(with_rows: Callable[..., Any]) -> None:
    small = with_rows("bert")
    plan = ep.quantize(small, "int8-dynamic")
    found = distilled(small, plan, steps=2, batch=4)
    assert found.plan == plan
    assert [entry["step"] for entry in found.trace] == [1, 2]


def test_what_cannot_be_trained_is_said(workload: Any, coarse: QuantizationPlan) -> None:
    with pytest.raises(UsageError, match="not for 'int4'"):
        distilled(workload, QuantizationPlan("int4", {}))
    with pytest.raises(UsageError, match="leave the rank"):
        recover(workload, workload, quantization=coarse, rank=4)
