"""Merged tokens: what a slow loop merges, and known to surgery, checkpoints, counts and export."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import pytest
import torch
from edgepress.compress.prune.reconstruct import reconstruct
from edgepress.compress.prune.token_merging import counts, merge_tokens
from edgepress.errors import InputError, UnavailableError, UsageError
from edgepress.export.backends.onnx import open_session
from edgepress.models import checkpoint, surgery
from edgepress.models import token_merging as merging
from edgepress.models.inspect import inspect
from edgepress.plan import PruningPlan, Unit
from torch.utils.flop_counter import FlopCounterMode

FAMILIES = ("vit", "deit", "dinov2")


def _slowly(
    keys: torch.Tensor, x: torch.Tensor, sizes: list[float], r: int, special: int
) -> tuple[list[torch.Tensor], list[float]]:
    """One image, token by token, as the paper's section 3 says it: the result in the order of the tokens that stay."""
    free = range(special, len(x))
    sources, others = [i for i in free if i % 2 == 0], [i for i in free if i % 2 == 1]
    edges = []
    for i in sources:
        likeness = [float(keys[i] @ keys[j] / (keys[i].norm() * keys[j].norm())) for j in others]
        edges.append((max(likeness), i, others[likeness.index(max(likeness))]))
    groups = {i: [i] for i in range(len(x))}
    for _, i, j in sorted(edges, reverse=True)[:r]:
        groups[j].append(i)
        del groups[i]
    made, weights = [], []
    for members in groups.values():
        total = sum(sizes[i] for i in members)
        made.append(torch.stack([x[i] * sizes[i] for i in members]).sum(dim=0) / total)
        weights.append(total)
    return made, weights


@pytest.mark.parametrize("special", [0, 1, 2])
@pytest.mark.parametrize("tokens", [8, 17])
def test_it_is_what_a_slow_loop_merges(special: int, tokens: int) -> None:
    random = torch.Generator().manual_seed(tokens + special)
    x, keys = (torch.randn(3, tokens, width, generator=random, dtype=torch.float64) for width in (5, 4))
    sizes = torch.randint(1, 5, (3, tokens), generator=random).double()
    for r in range(1, merging.most(tokens, special) + 1):
        places = merging.assignment(keys, r, special)
        merged, weights = merging.average(x, sizes, places, tokens - r)
        for row in range(3):
            slow, heavy = _slowly(keys[row], x[row], sizes[row].tolist(), r, special)
            torch.testing.assert_close(merged[row], torch.stack(slow))
            assert weights[row].tolist() == heavy
            assert places[row, :special].tolist() == list(range(special))
            assert sorted(set(places[row].tolist())) == list(range(tokens - r))


def _slow_forward(model: Any, block: Any, x: torch.Tensor, sizes: list[float], r: int, special: int) -> Any:
    """One image through one ViT block, head by head, with the sizes in the softmax."""
    attention = block.attention
    inner = block.layernorm_before(x)
    q, k, v = (layer(inner) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    width, parts, keys = attention.head_dim, [], []
    for head in range(attention.num_attention_heads):
        own = slice(head * width, (head + 1) * width)
        scores = q[:, own] @ k[:, own].T / math.sqrt(width)
        weights = scores.exp() * torch.tensor(sizes)
        parts.append(weights / weights.sum(dim=1, keepdim=True) @ v[:, own])
        keys.append(k[:, own])
    x = x + attention.o_proj(torch.cat(parts, dim=1))
    made, sizes = _slowly(torch.stack(keys).mean(dim=0), x, sizes, r, special)
    x = torch.stack(made)
    return x + block.mlp(block.layernorm_after(x)), sizes


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_the_whole_model_is_what_a_slow_loop_computes(with_rows: Any, name: str) -> None:
    workload = with_rows(name)
    small = merge_tokens(workload, 3)
    base = getattr(workload.module, name)
    row = next(workload.data.calibration.batches(1)).inputs["pixel_values"]
    with torch.no_grad():
        x = base.embeddings(row)[0]
        sizes = [1.0] * len(x)
        for block, r in zip(base.layers, merging.merged(small.module), strict=True):
            x, sizes = _slow_forward(workload, block, x, sizes, r, 2 if name == "deit" else 1)
        wanted = workload.module.classifier(base.layernorm(x)[0])
        torch.testing.assert_close(small.forward({"pixel_values": row})[0], wanted, rtol=0, atol=1e-9)


def test_patches_come_back_in_their_places(with_rows: Any) -> None:
    """DINOv2's head takes the mean over the patches: merged ones count as many times as they were made of."""
    small = merge_tokens(with_rows("dinov2"), 4)
    seen: list[torch.Tensor] = []
    last = small.module.dinov2.encoder.layer[-1]
    with (
        last.added.register_forward_hook(lambda _, __, out: seen.append(out)),
        small.module.dinov2.encoder.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state)),
        torch.no_grad(),
    ):
        small.forward(next(small.data.calibration.batches(4)).inputs)
    merged, whole = seen
    sizes = last.merging.tokens.sizes
    assert merged.shape[1] == 17 - 8
    assert whole.shape[1] == 17
    torch.testing.assert_close(whole[:, 0], merged[:, 0])
    mean = (merged * sizes[..., None])[:, 1:].sum(dim=1) / 16
    torch.testing.assert_close(whole[:, 1:].mean(dim=1), mean)


@pytest.mark.parametrize("name", FAMILIES)
def test_costs_are_those_of_torchs_counter(with_rows: Any, name: str) -> None:
    workload = with_rows(name)
    small = merge_tokens(workload, 4)
    module = small.module
    module.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small.forward(small.example)
    assert small.macs == counter.get_total_flops() // 2
    assert small.macs < workload.macs


@pytest.mark.parametrize("name", FAMILIES)
def test_masked_is_removed_and_it_comes_back(with_rows: Any, name: str, tmp_path: Path) -> None:
    workload = with_rows(name)
    whole = surgery.prune(workload, PruningPlan.of([Unit("ffn", 0, 1)]))
    small = merge_tokens(whole, 3)
    plan = PruningPlan.of([Unit("head", 0, 1), Unit("ffn", 1, 3), Unit("hidden", 0, 2)])
    inputs = dict(next(workload.data.calibration.batches(6)).inputs)
    with torch.no_grad(), surgery.masked(small.module, small.structure, plan):
        masked = small.forward(inputs)
    pruned = surgery.prune(small, plan)
    with torch.no_grad():
        torch.testing.assert_close(pruned.forward(inputs), masked, rtol=0, atol=1e-9)
    single = pruned.with_module(pruned.module.float(), pruned.structure, pruned.plan)
    single = replace(single, example={key: value.float() for key, value in pruned.example.items()})
    back = checkpoint.read(checkpoint.save(single, tmp_path / "c"), workload.data)
    assert back.macs == pruned.macs
    assert merging.merged(back.module) == [3, 3]
    with torch.no_grad():
        assert torch.equal(back.forward(back.example), single.forward(single.example))
    with pytest.raises(UsageError, match="merges tokens"):
        checkpoint.save(single, tmp_path / "plain", plain=True)


def test_ablation_is_that_of_the_masks(with_rows: Any) -> None:
    small = merge_tokens(with_rows("vit"), 3)
    scores = ep.score(small, "ablation").values
    batch = next(small.data.calibration.batches(32))
    with torch.no_grad():
        whole = small.losses(batch).mean()
        for place in (0, small.structure.num_units - 40):
            unit = small.structure.units[place]
            with surgery.masked(small.module, small.structure, PruningPlan.of([unit])):
                assert float(small.losses(batch).mean() - whole) == pytest.approx(float(scores[place]), abs=1e-9)


def test_scores_and_reconstruction_of_a_model_that_merges(with_rows: Any) -> None:
    small = merge_tokens(with_rows("vit"), 3)
    assert "block" not in small.structure.kinds
    scores = ep.score(small, "obs")
    assert torch.isfinite(scores.values).all()
    pruned = ep.prune(small, scores, ratio=0.5)
    mended = reconstruct(small, pruned)
    inputs = next(small.data.calibration.batches(10)).inputs
    with torch.no_grad():
        wanted, before, after = (model.forward(inputs) for model in (small, pruned, mended))
    assert (after - wanted).square().mean() < 0.7 * (before - wanted).square().mean()
    with pytest.raises(UsageError, match="merge then"):
        reconstruct(with_rows("vit"), small)


def test_inspect_of_a_model_that_merges(with_rows: Any) -> None:
    small = merge_tokens(with_rows("vit"), 3)
    assert inspect(small)["macs"] == small.macs
    with pytest.raises(InputError, match="merges tokens"):
        inspect(small, rows=8)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_file_computes_it_at_any_batch(with_rows: Any, name: str, tmp_path: Path) -> None:
    small = merge_tokens(with_rows(name), 4, schedule="decreasing")
    single = small.with_module(small.module.float(), small.structure, small.plan)
    single = replace(single, example={key: value.float() for key, value in small.example.items()})
    written = ep.export(single, tmp_path / "fp32")
    random = torch.Generator().manual_seed(0)
    with open_session(written) as session, torch.no_grad():
        for rows in (1, 3, 32):
            images = torch.randn(rows, 3, 16, 16, generator=random)
            (got,) = session.run({"pixel_values": images.numpy()})
            np.testing.assert_allclose(got, single.forward({"pixel_values": images}).numpy(), atol=1e-4)


def test_schedules() -> None:
    assert counts(197, 1, 12, 8) == [8] * 12
    assert sum(counts(197, 1, 12, 8, "decreasing")) == 8 * 12
    assert counts(17, 1, 4, 6) == [6, 5, 2, 1]
    with pytest.raises(UsageError, match="no schedule 'wild'"):
        counts(17, 1, 4, 6, "wild")
    with pytest.raises(UsageError, match="not 0"):
        counts(17, 1, 4, 0)


def test_models_that_cannot_are_refused(with_rows: Any) -> None:
    for name in ("bert", "beit", "swin", "clip"):
        with pytest.raises(UnavailableError, match="ViT, DeiT and DINOv2 only"):
            merge_tokens(with_rows(name), 2)
    with pytest.raises(UsageError, match="already"):
        merge_tokens(merge_tokens(with_rows("vit"), 2), 2)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "2 numbers from 0 on"),
        ([1, -1], "2 numbers from 0 on"),
        ([1, True], "2 numbers from 0 on"),
        ([1, "1"], "2 numbers from 0 on"),
        ([1, 10**9], "7 can be merged, not 1000000000"),
        ({"0": 1}, "'merged_tokens' is missing or of another type"),
    ],
)
def test_hostile_records_are_refused(with_rows: Any, tmp_path: Path, record: Any, message: str) -> None:
    folder = checkpoint.save(with_rows("vit"), tmp_path / "c")
    meta = json.loads((folder / "edgepress.json").read_text())
    (folder / "edgepress.json").write_text(json.dumps({**meta, "merged_tokens": record}))
    with pytest.raises(InputError, match=message):
        checkpoint.read(folder, with_rows("vit").data)
