"""Factored layers: the least error that any two factors reach, known to surgery, checkpoints, counts and export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import onnx
import pytest
import torch
from edgepress.compress.prune.inputs import linear_layers, moments
from edgepress.compress.prune.low_rank import allocate, errors, factorise
from edgepress.compress.prune.reconstruct import reconstruct
from edgepress.errors import InputError, UsageError
from edgepress.export.backends.onnx import open_session
from edgepress.models import checkpoint, low_rank, surgery
from edgepress.plan import PruningPlan, Unit

FAMILIES = ("bert", "vit", "dinov2", "gpt2", "llama", "t5, gated", "bart", "albert", "deberta-v2, separate")


def _inputs(workload: Any) -> dict[str, torch.Tensor]:
    return dict(next(workload.data.calibration.batches(6)).inputs)


def _all(workload: Any, rank: int = 5) -> dict[str, int]:
    return {
        name: rank for name in linear_layers(workload) if low_rank.pays(workload.module.get_submodule(name)) >= rank
    }


def _units(workload: Any) -> PruningPlan:
    """A unit of every kind, and the first block of every stack that can lose one."""
    units = [site.units[-1] for site in workload.structure.sites if site.kind not in {"block", "hidden"}]
    units += [Unit("hidden", 0, 3)] if "hidden" in workload.structure.kinds else []
    units += [Unit("block", s.start, 0) for s in workload.structure.stacks if s.count > 1 and not s.shared]
    return PruningPlan.of(units)


@pytest.mark.parametrize("biased", [True, False])
def test_no_two_factors_do_better(with_rows: Any, biased: bool) -> None:
    """Against a numeric optimum: alternating least squares over U, V and the bias from many starts."""
    workload = with_rows("bert")
    name = "bert.encoder.layer.0.intermediate.dense"
    layer = workload.module.get_submodule(name)
    if not biased:
        layer.bias = None
    rank = 4
    seen: list[torch.Tensor] = []
    small = factorise(workload, {name: rank})
    with layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        for batch in workload.data.calibration.batches(32):
            workload.forward(batch.inputs)
    x = seen[0][next(workload.data.calibration.batches(32)).inputs["attention_mask"].bool()].detach()
    y = layer(x).detach()
    found = (y - small.module.get_submodule(name)(x)).square().sum(dim=1).mean().item()
    if biased:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    best = float("inf")
    for start in range(4):
        v = torch.randn(rank, seen[0].shape[-1], generator=torch.Generator().manual_seed(start), dtype=x.dtype)
        for _ in range(300):
            features = x[:, : v.shape[1]] @ v.T
            features = torch.cat([features, x[:, v.shape[1] :]], dim=1)
            u = torch.linalg.lstsq(features, y).solution
            rest = y - x[:, v.shape[1] :] @ u[rank:]
            v = (torch.linalg.pinv(x[:, : v.shape[1]]) @ rest @ torch.linalg.pinv(u[:rank])).T
        features = torch.cat([x[:, : v.shape[1]] @ v.T, x[:, v.shape[1] :]], dim=1)
        best = min(best, (y - features @ torch.linalg.lstsq(features, y).solution).square().sum(dim=1).mean().item())
    assert found == pytest.approx(best, rel=1e-3)
    curve = errors(workload, [name])[0]
    spread = (y - y.mean(dim=0) * biased).square().sum(dim=1).mean().item()
    assert curve.errors[rank - 1] * spread == pytest.approx(found, rel=1e-6)


def test_it_beats_the_svd_of_the_weights(workload: Any) -> None:
    name = "bert.encoder.layer.1.output.dense"
    layer = workload.module.get_submodule(name)
    small = factorise(workload, {name: 12}).module.get_submodule(name)
    u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    moment = moments(workload, [name], rows=128)[name].covariance(centred=True)
    plain, ours = (layer.weight - m for m in (u[:, :12] * s[:12] @ v[:12], small.weight))
    ours, plain = (torch.trace(d.double() @ moment @ d.double().T) for d in (ours, plain))
    assert ours < 0.9 * plain


def test_errors_fall_to_nothing_and_costs_are_true(workload: Any) -> None:
    for curve in errors(workload, rows=32):
        assert np.all(np.diff(curve.errors) <= 0)
        assert curve.errors[-1] == 0
        assert np.all(curve.params[:-1] < curve.params[-1])
    ranks = {curve.name: int(curve.ranks[3]) for curve in errors(workload, rows=32)}
    small = factorise(workload, ranks, rows=32)
    of = {curve.name: curve for curve in errors(workload, rows=32)}
    for what in ("params", "macs"):
        saved = sum(getattr(of[name], what)[-1] - getattr(of[name], what)[3] for name in ranks)
        assert getattr(small, what) == getattr(workload, what) - saved


def test_allocation_keeps_the_share_and_loses_the_least(workload: Any) -> None:
    curves = errors(workload, ["bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.2.output.dense"], rows=32)
    cost = {c.name: dict(zip(c.ranks.tolist(), c.params.tolist(), strict=True)) for c in curves}
    loss = {c.name: dict(zip(c.ranks.tolist(), c.errors.tolist(), strict=True)) for c in curves}
    for keep in (0.3, 0.6, 0.9):
        chosen = {c.name: int(c.ranks[-1]) for c in curves} | allocate(curves, keep)
        size = sum(cost[name][rank] for name, rank in chosen.items())
        assert size <= keep * sum(c.params[-1] for c in curves)
        a, b = curves
        best = min(
            loss[a.name][i] + loss[b.name][j]
            for i in cost[a.name]
            for j in cost[b.name]
            if cost[a.name][i] + cost[b.name][j] <= size
        )
        assert sum(loss[name][rank] for name, rank in chosen.items()) == pytest.approx(best)
    assert allocate(curves, 1.0) == {}
    with pytest.raises(UsageError, match="cannot be kept"):
        allocate(curves, 0.001)


@pytest.mark.parametrize("name", FAMILIES)
def test_masked_is_removed_and_it_comes_back(with_rows: Any, name: str, tmp_path: Path) -> None:
    """Factored then pruned, reloaded bit for bit; and pruned then factored."""
    workload = with_rows(name)
    small = factorise(workload, _all(workload))
    assert small.params < workload.params
    plan = _units(small)
    with torch.no_grad(), surgery.masked(small.module, small.structure, plan):
        masked = small.forward(_inputs(small))
    pruned = surgery.prune(small, plan)
    with torch.no_grad():
        torch.testing.assert_close(pruned.forward(_inputs(small)), masked, rtol=0, atol=1e-9)
    again = surgery.prune(workload, plan)
    other = factorise(again, _all(again, 2))
    for number, model in enumerate((pruned, other)):
        single = model.with_module(model.module.float(), model.structure, model.plan)
        example = {n: t.float() if t.is_floating_point() else t for n, t in model.example.items()}
        single = replace(single, example=example)
        back = checkpoint.read(checkpoint.save(single, tmp_path / str(number)), workload.data)
        assert back.macs == model.macs
        assert low_rank.ranks(back.module) == low_rank.ranks(model.module)
        assert [(s.kind, s.layer, s.count) for s in back.structure.sites] == [
            (s.kind, s.layer, s.count) for s in model.structure.sites
        ]
        kept, found = single.module.state_dict(), back.module.state_dict()
        assert kept.keys() == found.keys()
        assert all(torch.equal(kept[key], found[key]) for key in kept)


def test_a_whole_feed_forward_goes(with_rows: Any, tmp_path: Path) -> None:
    workload = with_rows("bert")
    small = factorise(workload, _all(workload))
    plan = PruningPlan.of(small.structure.site("ffn", 1).units)
    with torch.no_grad(), surgery.masked(small.module, small.structure, plan):
        masked = small.forward(_inputs(small))
    pruned = surgery.prune(small, plan)
    with torch.no_grad():
        torch.testing.assert_close(pruned.forward(_inputs(small)), masked, rtol=0, atol=1e-9)
    checkpoint.read(checkpoint.save(pruned, tmp_path / "c"), workload.data)


def test_reconstruction_keeps_the_rank_and_comes_nearer(workload: Any) -> None:
    small = factorise(workload, _all(workload, 12), rows=64)
    pruned = surgery.prune(small, PruningPlan.of([*small.structure.site("ffn", 0).units[::2], Unit("head", 1, 0)]))
    mended = reconstruct(small, pruned, rows=64)
    assert low_rank.ranks(mended.module) == low_rank.ranks(pruned.module)
    batch = next(workload.data.calibration.batches(64)).inputs
    with torch.no_grad():
        wanted, before, after = (model.forward(batch) for model in (small, pruned, mended))
    assert (after - wanted).square().mean() < (before - wanted).square().mean()


def test_costs_of_units_are_what_they_take_along(workload: Any) -> None:
    small = factorise(workload, _all(workload, 12), rows=32)
    for kind in ("head", "ffn"):
        site = small.structure.site(kind, 1)
        pruned = surgery.prune(small, PruningPlan.of(site.units[:1]))
        assert small.params - pruned.params == site.params
        assert small.macs - pruned.macs == site.macs


def test_it_comes_back_bit_for_bit(workload: Any, tmp_path: Path) -> None:
    plan = PruningPlan.of([Unit("block", 0, 0), Unit("head", 1, 2), Unit("ffn", 2, 5)])
    small = surgery.prune(factorise(workload, _all(workload, 12), rows=32), plan)
    folder = checkpoint.save(small, tmp_path / "c")
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".txt"}
    with torch.inference_mode():
        assert torch.equal(
            checkpoint.read(folder, workload.data).forward(_inputs(small)), small.forward(_inputs(small))
        )
    with pytest.raises(UsageError, match="factored"):
        checkpoint.save(small, tmp_path / "plain", plain=True)


def test_the_file_computes_it_in_float_and_in_integers(workload: Any, tmp_path: Path) -> None:
    small = surgery.prune(factorise(workload, _all(workload, 12), rows=32), PruningPlan.of([Unit("head", 0, 1)]))
    written = ep.export(small, tmp_path / "fp32")
    name = "bert.encoder.layer.0.intermediate.dense"
    products = {node.name for node in onnx.load(written.model_file).graph.node if node.op_type == "MatMul"}
    assert {f"{name}.down/MatMul", f"{name}.up/MatMul"} <= products
    plan = ep.quantize(small, "int8-dynamic")
    assert {f"{name}.down", f"{name}.up"} <= plan.weights.keys()
    integers = ep.export(small, tmp_path / "int8", plan)
    assert integers.manifest.operators["MatMulIntegerToFloat"] == len([n for n in plan.weights if ".layer." in n])
    inputs = _inputs(small)
    with open_session(written) as session, torch.no_grad():
        (got,) = session.run({name: tensor.numpy() for name, tensor in inputs.items()})
        np.testing.assert_allclose(got, small.forward(inputs).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"bert.encoder.layer.0.output.dense": 0}, "at ranks 1 to 42, not 0"),
        ({"bert.encoder.layer.0.output.dense": 43}, "at ranks 1 to 42, not 43"),
        ({"bert.encoder.layer.0.output.dense": 10**12}, "not 1000000000000"),
        ({"bert.encoder.layer.0.output.dense": True}, "not True"),
        ({"bert.encoder.layer.0.output.dense": "3"}, "not '3'"),
        ({"bert.encoder.layer.7.output.dense": 3}, "has 2 blocks"),
        ({"bert.encoder.layer.__init__.output.dense": 3}, "has 2 blocks"),
        ({"bert.embeddings.word_embeddings": 3}, "not a linear layer"),
        ({"__class__": 3}, "not a linear layer"),
        ([1], "'ranks' is missing or of another type"),
    ],
)
def test_hostile_records_are_refused(workload: Any, tmp_path: Path, ranks: Any, message: str) -> None:
    folder = checkpoint.save(surgery.prune(workload, PruningPlan.of([Unit("block", 1, 0)])), tmp_path / "c")
    meta = json.loads((folder / "edgepress.json").read_text())
    (folder / "edgepress.json").write_text(json.dumps({**meta, "ranks": ranks}))
    with pytest.raises(InputError, match=message):
        checkpoint.read(folder, workload.data)


def test_what_cannot_be_factored_is_refused(workload: Any, with_rows: Any) -> None:
    with pytest.raises(InputError, match="at ranks 1 to 42, not 64"):
        factorise(workload, {"bert.encoder.layer.0.output.dense": 64})
    with pytest.raises(InputError, match="models with blocks only"):
        factorise(with_rows("wide"), {"2": 3})
    tied = with_rows("gpt2")
    with pytest.raises(InputError, match="matrix of its own"):
        factorise(tied, {"lm_head": 3})
