"""Every score: finite, deterministic, of the right length; against slow definitions; the same where nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgepress as ep
import pytest
import torch
from edgepress.compress import score as scores
from edgepress.compress.score import ablation, obs, second_order
from edgepress.compress.score.evidence import gate_gradients, gather, gram_groups
from edgepress.errors import InputError, UsageError
from edgepress.models import families, mapping, surgery
from edgepress.models.data import Data
from edgepress.models.layers import matrix
from edgepress.models.surgery import gated
from edgepress.plan import PruningPlan
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

FAMILIES = ("bert", "llama", "vit", "t5", "cnn", "sequence first")


@pytest.fixture(params=FAMILIES)
def small(request: pytest.FixtureRequest, with_rows: Callable[[str], Any]) -> Any:
    return with_rows(request.param)


def _values(workload: Any, method: str, **options: Any) -> Tensor:
    return ep.score(workload, method, **options).values


def _batches(workload: Any) -> Any:
    """Every calibration row as a batch of its own, in order."""
    rows = workload.data.calibration
    return [next(rows.pick([row]).batches(1)) for row in range(len(rows))]


# ---- the contract


@pytest.mark.parametrize("method", scores.METHODS)
def test_conformance(small: Any, method: str) -> None:
    first, second = (ep.score(small, method, rows=6, seed=1) for _ in range(2))
    assert first.values.shape == (small.structure.num_units,)
    assert first.values.dtype == torch.float64
    assert torch.isfinite(first.values).all()
    assert torch.equal(first.values, second.values)
    for kind in small.structure.kinds:
        of_kind = torch.tensor([value for layer in first.of(kind) for value in layer])
        assert of_kind.std() > 0, f"{method} cannot tell {kind} units apart"
    module = scores.get(method)
    assert all(heading in (module.__doc__ or "") for heading in ("What", "When", "Cost", "Source"))


def test_every_method_file_is_listed() -> None:
    files = [path for path in Path(scores.__file__).parent.glob("*.py") if "\nNEEDS = " in path.read_text("utf-8")]
    assert {path.stem for path in files} == set(scores.METHODS)


def test_all_at_once_is_one_by_one(small: Any) -> None:
    together = scores.score_all(small, scores.cheap(), rows=6)
    assert [found.method for found in together] == list(scores.cheap())
    assert len(together) >= 10
    for found in together:
        torch.testing.assert_close(found.values, _values(small, found.method, rows=6), rtol=1e-9, atol=1e-12)


def test_an_unknown_method_is_refused(workload: Any) -> None:
    with pytest.raises(UsageError, match="fisher"):
        ep.score(workload, "nope")
    with pytest.raises(UsageError, match="must be 1 or 2"):
        ep.score(workload, "magnitude", norm=3)
    with pytest.raises(UsageError, match="'absolute' or 'signed'"):
        ep.score(workload, "taylor", form="none")
    with pytest.raises(UsageError, match="from 0 to 1"):
        ep.score(workload, "masked_taylor", most=2.0)
    with pytest.raises(UsageError, match="from 0 to 1"):
        ep.score(workload, "second_order", trust=-1.0)


def test_weights_alone_need_no_rows(with_rows: Callable[..., Any]) -> None:
    empty = replace(with_rows("bert"), data=Data.empty())
    for method in ("magnitude", "lamp", "random"):
        assert torch.isfinite(_values(empty, method)).all()
    with pytest.raises(InputError, match="needs rows"):
        ep.score(empty, "fisher")


def test_a_module_is_left_as_it_was(small: Any) -> None:
    before = copy.deepcopy(small.module.state_dict())
    attributes = [set(vars(child)) for child in small.module.modules()]
    frozen = next(small.module.parameters()).requires_grad_(False)
    scores.score_all(small, scores.METHODS, rows=4)
    assert not frozen.requires_grad
    assert all(p.grad is None and (p is frozen or p.requires_grad) for p in small.module.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in small.module.state_dict().items())
    hooks = [m for m in small.module.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
    assert [set(vars(child)) for child in small.module.modules()] == attributes


# ---- against slow definitions

CERTAIN = {"masked_taylor": {"most": 0.0}, "second_order": {"trust": 0.5}}
"""Options under which these draw nothing for each row and do not ask how many rows there are."""


def _loss(workload: Any, batch: Any) -> Callable[[Tensor], Tensor]:
    """The loss of a batch of one row as a function of gates [num_units]."""

    def loss(gates: Tensor) -> Tensor:
        with gated(workload.module, workload.structure, gates):
            return workload.losses(batch).sum()

    return loss


def _gradients(workload: Any) -> Tensor:
    """The gate gradients of every row alone, by torch.func: [rows, num_units]."""
    ones = torch.ones(workload.structure.num_units, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):  # torch.func would have the mask differentiated too, which others refuse
        return torch.stack([torch.func.grad(_loss(workload, batch))(ones) for batch in _batches(workload)]).detach()


def test_gradient_scores_against_gradients_row_by_row(small: Any) -> None:
    g = _gradients(small)
    expected = {"fisher": g.square().mean(0), "taylor": g.abs().mean(0)}
    for method, values in expected.items():
        torch.testing.assert_close(_values(small, method), values, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(_values(small, "taylor", form="signed"), -g.mean(0), rtol=1e-9, atol=1e-13)
    normed = g.abs().mean(0)
    for site, place in small.structure.slices():
        normed[place] /= normed[place].norm() if site.count > 1 else 1
    torch.testing.assert_close(_values(small, "head_gate"), normed, rtol=1e-9, atol=1e-13)


def test_open_gates_have_the_gradients_of_gates_that_multiply(any_model: str, with_rows: Callable[..., Any]) -> None:
    workload = with_rows(any_model, 4)
    (batch,) = workload.data.calibration.batches(4)
    gates = torch.ones(4, workload.structure.num_units, dtype=torch.float64, requires_grad=True)
    with gated(workload.module, workload.structure, gates):
        (expected,) = torch.autograd.grad(workload.losses(batch).sum(), gates)
    torch.testing.assert_close(gate_gradients(workload, batch), expected, rtol=1e-8, atol=1e-12)


def test_masked_taylor_is_taylor_in_each_rows_own_network(small: Any) -> None:
    rows, structure = small.data.calibration, small.structure
    random = torch.Generator().manual_seed(7)
    maskable = torch.tensor([unit.kind not in {"block", "kv", "hidden"} for unit in structure.units])
    g = torch.zeros(len(rows), structure.num_units, dtype=torch.float64)
    masked = 0
    for batch in rows.batches(32):
        for row in batch.rows:
            share, *drawn = torch.rand(structure.num_units + 1, generator=random)
            gone = (torch.stack(drawn) < 0.8 * share) & maskable
            masked += int(gone.sum())
            gates = (~gone).double().requires_grad_()
            loss = _loss(small, next(rows.pick([row]).batches(1)))
            (g[row],) = torch.autograd.grad(loss(gates), gates)
    assert masked
    found = scores.score(small, "masked_taylor", seed=7, most=0.8).values
    torch.testing.assert_close(found, g.abs().mean(0), rtol=1e-9, atol=1e-13)
    whole = _values(small, "masked_taylor", most=0.0, passes=2)
    torch.testing.assert_close(whole, _values(small, "taylor"), rtol=1e-9, atol=1e-13)


def test_second_order_is_the_slope_and_half_of_fisher(small: Any) -> None:
    slope, curvature = _values(small, "taylor", form="signed"), _values(small, "fisher")
    torch.testing.assert_close(_values(small, "second_order", trust=1.0), slope + curvature / 2)
    torch.testing.assert_close(_values(small, "second_order", trust=0.0), curvature / 2)
    shrunk = _values(small, "second_order") - curvature / 2
    for kind in small.structure.kinds:
        own = torch.tensor([unit.kind == kind for unit in small.structure.units])
        found = (shrunk[own] / slope[own])[slope[own] != 0]
        assert (found - found.mean()).abs().max() < 1e-6
        assert 0 <= found.mean() < 1


def test_slopes_are_shrunk_to_the_best_guess() -> None:
    random = torch.Generator().manual_seed(0)
    for kappa, rows in ((0.02, 100), (0.0, 100), (0.5, 20)):
        scale = torch.rand(4000, generator=random) + 0.1
        true = scale * torch.randn(4000, generator=random) * kappa**0.5
        g = true + scale * torch.randn(rows, 4000, generator=random)
        found = second_order.shrinkage(g.mean(0), g.square().mean(0), rows)
        best = float((g.mean(0) * true).sum() / g.mean(0).square().sum())
        assert found == pytest.approx(best, abs=0.07)


def test_gradients_against_finite_differences(small: Any) -> None:
    step, units = 1e-5, small.structure.num_units
    slopes = torch.zeros(units, dtype=torch.float64)
    ones = torch.ones(units, dtype=torch.float64)
    chosen = range(0, units, 1 + units // 25)
    with torch.no_grad():
        for batch in _batches(small):
            loss = _loss(small, batch)
            for unit in chosen:
                nudge = torch.zeros_like(ones).index_fill_(0, torch.tensor(unit), step)
                slopes[unit] += (loss(ones + nudge) - loss(ones - nudge)) / (2 * step) / len(small.data.calibration)
    signed = -_values(small, "taylor", form="signed")
    torch.testing.assert_close(signed[list(chosen)], slopes[list(chosen)], rtol=1e-5, atol=1e-8)


def test_block_fisher_is_greedy_in_the_explicit_matrix(small: Any) -> None:
    g = _gradients(small)
    found = _values(small, "fisher_block")
    for _, place in small.structure.slices():
        matrix_ = g[:, place].T @ g[:, place] / len(g)
        gone: list[int] = []
        costs: list[float] = []
        for _ in range(len(matrix_)):
            quadratic = {}
            for unit in set(range(len(matrix_))) - set(gone):
                chosen = [*gone, unit]
                quadratic[unit] = float(matrix_[chosen][:, chosen].sum())
            unit = min(quadratic, key=lambda u: quadratic[u])
            costs.append(quadratic[unit] - (float(matrix_[gone][:, gone].sum()) if gone else 0.0))
            gone.append(unit)
        assert found[place].argsort().tolist() == gone
        rising = torch.tensor(costs, dtype=torch.float64).cummax(0).values
        torch.testing.assert_close(found[place][gone], rising, rtol=1e-6, atol=1e-9 * float(rising.abs().max()))


def test_only_so_many_rows_are_kept(with_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from edgepress.compress.score import evidence

    monkeypatch.setattr(evidence, "KEPT_ROWS", 4)
    workload = with_rows("bert")
    kept = gather(workload, ("gates_by_row",), rows=workload.data.calibration).gradients.by_row
    torch.testing.assert_close(sorted(kept.tolist()), sorted(_gradients(workload)[::3].tolist()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "cnn"])
def test_hutchinson_against_the_explicit_hessian(name: str, with_rows: Callable[..., Any]) -> None:
    workload = with_rows(name, 3)
    ones, probes = torch.ones(workload.structure.num_units, dtype=torch.float64), 60
    with sdpa_kernel(SDPBackend.MATH):
        hessians = torch.stack([torch.func.hessian(_loss(workload, batch))(ones) for batch in _batches(workload)])
    diagonal = hessians.diagonal(dim1=1, dim2=2)
    noise = (hessians.square().sum(2) - diagonal.square()).sum(0).sqrt() / (3 * probes**0.5)
    error = _values(workload, "hessian", probes=probes) - diagonal.mean(0)
    assert (error.abs() <= 5 * noise + 1e-12).all()
    assert error.square().mean() < 2 * noise.square().mean()
    assert noise.mean() < 0.5 * diagonal.mean(0).abs().mean()


def _inputs(workload: Any, name: str) -> Tensor:
    """What a layer is given over all calibration rows, each run alone and so without padding: [n, columns]."""
    seen: list[Tensor] = []
    layer = workload.module.get_submodule(name)

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        if isinstance(layer, nn.Conv2d):
            x = nn.functional.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).transpose(1, 2)
        seen.append(x.flatten(0, -2))

    handle = layer.register_forward_pre_hook(see)
    with torch.no_grad():
        for batch in _batches(workload):
            workload.forward(batch.inputs)
    handle.remove()
    return torch.cat(seen)


def _owned_columns(workload: Any, site: Any, cut: Any, unit: int) -> list[int]:
    """The columns of a reader's matrix that a gate of zero silences."""
    layer = workload.module.get_submodule(cut.layer)
    if isinstance(layer, nn.Conv2d):
        features, step = layer.in_channels, layer.weight[0, 0].numel()
    else:
        features, step = matrix(layer).shape[1], 1
    gate = torch.ones(site.count).index_fill_(0, torch.tensor(unit), 0.0)
    silent = site.multiplier(gate, cut, features) == 0
    return silent.repeat_interleave(step).nonzero().flatten().tolist()


def test_obs_is_the_error_after_least_squares(small: Any) -> None:
    found = _values(small, "obs", ridge=1e-13)
    expected = torch.zeros_like(found)
    for site, place in small.structure.slices():
        for cut in site.gates:
            layer = small.module.get_submodule(cut.layer)
            x, weight = _inputs(small, cut.layer), matrix(layer).detach()
            made = x @ weight.T
            for unit in range(0, site.count, 5):
                own = _owned_columns(small, site, cut, unit)
                kept = [column for column in range(x.shape[1]) if column not in own]
                given = x[:, kept]
                if layer.bias is not None:
                    given = torch.cat([given, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
                solved = torch.linalg.lstsq(given, made, driver="gelsd").solution
                expected[place.start + unit] += (made - given @ solved).square().sum() / len(x)
        if site.kind == "block":
            with torch.no_grad():
                expected[place] = _moved(small, site.block)
    at = expected != 0
    assert at.sum() >= len(small.structure.sites)
    torch.testing.assert_close(found[at], expected[at], rtol=1e-5, atol=1e-9 * float(expected.max()))


def _moved(workload: Any, block: str) -> float:
    changes: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        changes.append((after - args[0]).square().sum(-1).flatten())

    handle = workload.module.get_submodule(block).register_forward_hook(see)
    for batch in _batches(workload):
        workload.forward(batch.inputs)
    handle.remove()
    return float(torch.cat(changes).mean())


def test_obs_update_formula_is_least_squares_too(with_rows: Callable[..., Any]) -> None:
    """ZipLM's formula on a matrix of full rank, with λ kept: the error includes what λ charges for the change."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(50, 7, generator=random, dtype=torch.float64)
    weight = torch.randn(3, 7, generator=random, dtype=torch.float64)
    for ridge in (1e-3, 1.0):
        inverse = torch.linalg.inv(x.T @ x / 50 + ridge * torch.eye(7, dtype=torch.float64))
        gone, kept = [1, 4], [0, 2, 3, 5, 6]
        tall = torch.cat([x / 50**0.5, ridge**0.5 * torch.eye(7, dtype=torch.float64)])
        solved = torch.linalg.lstsq(tall[:, kept], tall @ weight.T).solution
        expected = (tall @ weight.T - tall[:, kept] @ solved).square().sum()
        torch.testing.assert_close(obs.errors(inverse, weight, torch.tensor([gone])), expected[None])


def test_grams_that_do_not_fit_take_passes_of_their_own(with_rows: Callable[..., Any]) -> None:
    wide = with_rows("wide")
    roomy = replace(wide, module=_padded(wide.module))
    assert len(gram_groups(roomy)) == 1
    groups = gram_groups(wide)
    assert groups == [frozenset({"2"}), frozenset({"4"})]
    assert wide.params < sum(
        matrix(wide.module.get_submodule(name)).shape[1] ** 2 for group in groups for name in group
    )
    torch.testing.assert_close(_values(wide, "obs"), _values(roomy, "obs"), rtol=1e-9, atol=1e-15)


def _padded(module: nn.Module) -> nn.Module:
    """The same module with parameters that nothing uses, and so with room for all Gram matrices."""
    larger = copy.deepcopy(module)
    larger.register_parameter("unused", nn.Parameter(torch.zeros(200, 200, dtype=torch.float64)))
    assert isinstance(larger, nn.Module)
    return larger


def test_wanda_against_its_definition(small: Any) -> None:
    found = _values(small, "wanda")
    expected = torch.zeros_like(found)
    inside: dict[str, float] = {}
    for site, place in small.structure.slices():
        for cut in site.gates:
            norms = _inputs(small, cut.layer).square().mean(0).sqrt()
            products = (matrix(small.module.get_submodule(cut.layer)).detach().abs() * norms).sum(0)
            for unit in range(site.count):
                expected[place.start + unit] += products[_owned_columns(small, site, cut, unit)].sum()
        if site.kind not in {"block", "kv"}:
            inside[site.block] = inside.get(site.block, 0.0) + float(expected[place].sum())
    for site, place in small.structure.slices():
        if site.kind == "block":
            expected[place] = inside[site.block]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_block_influence_is_the_turn_that_masking_makes(small: Any) -> None:
    """The stream with the unit against the stream with its gate at zero, seen where the family says that it is."""
    found = _values(small, "block_influence")
    chosen = [unit for unit in range(small.structure.num_units) if unit % 6 == 0]
    ones = torch.ones(small.structure.num_units, dtype=torch.float64)
    for site, place in small.structure.slices():
        for unit in set(range(place.start, place.stop)) & set(chosen) if not site.norms else ():
            without = ones.index_fill(0, torch.tensor(unit), 0.0)
            turns = [
                1 - nn.functional.cosine_similarity(a, b, dim=-1)
                for a, b in zip(_streams(small, site, ones), _streams(small, site, without), strict=True)
            ]
            assert float(found[unit]) == pytest.approx(float(torch.cat(turns).mean()), rel=1e-6, abs=1e-12)


def test_influence_of_the_stream_s_own_channels(with_rows: Callable[..., Any]) -> None:
    """Seen where norms read the stream: the direction that is left without the channel."""
    workload = with_rows("vit")
    site, place = next((site, place) for site, place in workload.structure.slices() if site.kind == "hidden")
    read = torch.cat([_inputs(workload, norm) for norm in site.norms])
    found = _values(workload, "block_influence")[place]
    for channel in range(0, site.count, 5):
        without = read.index_fill(1, torch.tensor(channel), 0.0)
        turned = 1 - nn.functional.cosine_similarity(read, without, dim=1)
        assert float(found[channel]) == pytest.approx(float(turned.mean()), rel=1e-7)


def _streams(workload: Any, site: Any, gates: Tensor) -> list[Tensor]:
    """What the units of a site are added to, by row and place, at the given gates: positions [n, features]."""
    streams: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        streams.append(args[0].flatten(0, -2))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        streams.append(states.movedim(1, -1).flatten(0, -2) if states.dim() == 4 else states.flatten(0, -2))

    module = workload.module
    with torch.no_grad(), gated(module, workload.structure, gates):
        if site.sum_at:
            handles = [module.get_submodule(site.sum_at).register_forward_pre_hook(before)]
        else:
            names = [site.block] if site.block else [cut.layer for cut in site.gates]
            handles = [module.get_submodule(name).register_forward_hook(after) for name in names]
        for batch in _batches(workload):
            workload.forward(batch.inputs)
    for handle in handles:
        handle.remove()
    return streams


def test_magnitude_counts_what_pruning_takes_away(small: Any) -> None:
    """The squares of all matrices before and after a unit has really been removed."""
    roots, ones = _values(small, "magnitude"), _values(small, "magnitude", norm=1)
    before = _powers(small.module)
    for unit in range(0, small.structure.num_units, 4):
        named = small.structure.units[unit]
        if named.kind == "block" or (named.kind == "hidden" and small.name == "bert"):
            continue  # BERT's pooler reads the stream and writes as wide a one: its diagonal is owned twice
        after = _powers(surgery.prune(small, PruningPlan.of([named])).module)
        count, first, second = (a - b for a, b in zip(before, after, strict=True))
        assert float(roots[unit]) == pytest.approx((second / count) ** 0.5, rel=1e-9)
        assert float(ones[unit]) == pytest.approx(first / count, rel=1e-9)


def _powers(module: nn.Module) -> tuple[float, float, float]:
    """The number of weights, of their sizes and of their squares the sums; without biases, norms and embeddings."""
    kinds = (nn.Linear, nn.Conv2d)
    weights = [m.weight.detach() for m in module.modules() if isinstance(m, kinds)]
    return (
        float(sum(w.numel() for w in weights)),
        float(sum(w.abs().sum() for w in weights)),
        float(sum(w.square().sum() for w in weights)),
    )


def test_lamp_against_its_definition(with_rows: Callable[..., Any]) -> None:
    workload = with_rows("llama")
    found, roots = _values(workload, "lamp"), _values(workload, "magnitude")
    for site, place in workload.structure.slices():
        if site.kind == "block":
            continue
        squares = (roots[place].square()).tolist()  # units of a layer have the same number of weights
        for own, score in zip(squares, found[place].tolist(), strict=True):
            assert score == pytest.approx(own / sum(other for other in squares if other >= own), rel=1e-9)
    blocks = found[[p.start for s, p in workload.structure.slices() if s.kind == "block"]]
    assert blocks.max() == 1
    assert blocks.min() < 1


def test_ablation_is_the_loss_without(small: Any) -> None:
    found = _values(small, "ablation")
    rows = small.data.calibration
    for unit in range(0, small.structure.num_units, 3):
        total = 0.0
        ones = torch.ones(small.structure.num_units, dtype=torch.float64)
        with torch.no_grad():
            for batch in _batches(small):
                loss = _loss(small, batch)
                total += float(loss(ones.index_fill(0, torch.tensor(unit), 0.0)) - loss(ones))
        assert float(found[unit]) == pytest.approx(total / len(rows), rel=1e-9, abs=1e-12)


def test_ablation_of_sets_in_every_family(any_model: str, with_rows: Callable[..., Any]) -> None:
    """What runs before the masked units is not run again: exactly the same losses, whatever the architecture."""
    workload = with_rows(any_model)
    structure, rows = workload.structure, workload.data.calibration
    sites = list(structure.slices())
    sets = [[place.start + i for i in range(0, site.count, 2)] for site, place in sites if site.kind != "block"]
    sets += [[place.start] for site, place in sites if site.kind == "block"]
    found = ablation.changes(workload, sets, rows=rows)
    batch = next(rows.batches(len(rows)))
    for units, changes in zip(sets, found, strict=True):
        mask = torch.ones(structure.num_units, dtype=torch.float64).index_fill_(0, torch.tensor(units), 0.0)
        with torch.no_grad(), gated(workload.module, structure, mask):
            without = workload.losses(batch)
        with torch.no_grad():
            assert torch.equal(changes[torch.from_numpy(batch.rows)], without - workload.losses(batch))


# ---- invariances


def test_rescaling_both_sides_of_a_unit_changes_no_score_of_its_function(with_rows: Callable[..., Any]) -> None:
    workload = with_rows("llama")
    methods = ("taylor", "fisher", "fisher_block", "head_gate", "block_influence", "ablation")
    before = {method: _values(workload, method) for method in methods}
    magnitude = _values(workload, "magnitude")
    with torch.no_grad():
        layer: Any = workload.module.get_submodule("model.layers.1")
        layer.mlp.up_proj.weight[5] *= 3
        layer.mlp.down_proj.weight[:, 5] /= 3
        layer.self_attn.v_proj.weight[8:16] *= 5  # the second of three key/value heads, with two query heads
        layer.self_attn.o_proj.weight[:, 16:32] /= 5
    for method, values in before.items():
        torch.testing.assert_close(_values(workload, method), values, rtol=1e-8, atol=1e-10)
    assert (_values(workload, "magnitude") != magnitude).sum() >= 4


def test_permuting_units_permutes_their_scores(with_rows: Callable[..., Any]) -> None:
    workload = with_rows("bert")
    methods = [method for method in scores.METHODS if method not in {"random", "hessian"}]
    before = {found.method: found.values for found in scores.score_all(workload, methods, options=CERTAIN)}
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        layer: Any = workload.module.get_submodule("bert.encoder.layer.1")
        up, down = layer.intermediate.dense, layer.output.dense
        up.weight.copy_(up.weight[order])
        up.bias.copy_(up.bias[order])
        down.weight.copy_(down.weight[:, order])
    place = next(p for site, p in workload.structure.slices() if (site.kind, site.layer) == ("ffn", 1))
    for found in scores.score_all(workload, methods, options=CERTAIN):
        expected = before[found.method].clone()
        expected[place] = expected[place][order]
        torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=1e-9)


def test_duplicate_rows_change_no_mean(small: Any) -> None:
    rows = small.data.calibration
    twice = rows.pick([*range(len(rows)), *range(len(rows))])
    doubled = replace(small, data=replace(small.data, calibration=twice))
    methods = [method for method in scores.METHODS if method != "hessian"]  # whose signs are drawn row by row
    found = [scores.score_all(workload, methods, options=CERTAIN) for workload in (small, doubled)]
    for once, again in zip(*found, strict=True):
        torch.testing.assert_close(once.values, again.values, rtol=1e-6, atol=1e-10)


def test_half_precision_agrees_with_float(with_rows: Callable[..., Any]) -> None:
    workload = with_rows("bert")
    exact = {found.method: found.values for found in scores.score_all(workload, ("taylor", "fisher", "wanda", "obs"))}
    half = replace(workload, module=copy.deepcopy(workload.module).bfloat16())
    for found in scores.score_all(half, tuple(exact)):
        assert torch.corrcoef(torch.stack([found.values[:-2], exact[found.method][:-2]]))[0, 1] > 0.98


# ---- health


def test_a_weight_that_is_not_a_number_is_named(with_rows: Callable[..., Any]) -> None:
    workload = with_rows("bert")
    with torch.no_grad():
        workload.module.get_submodule("bert.encoder.layer.1.output.dense").weight[0, 3] = float("nan")
    with pytest.raises(InputError, match=r"1 of 768 values of 'bert.encoder.layer.1.output.dense.weight' are NaN"):
        ep.score(workload, "wanda")


@pytest.mark.parametrize("method", ["fisher", "masked_taylor", "hessian", "wanda", "obs", "block_influence"])
def test_the_row_and_the_layer_of_an_infinity_are_named(method: str, with_rows: Callable[..., Any]) -> None:
    workload = with_rows("bert")
    rows = workload.data.calibration
    module = copy.deepcopy(workload.module).float()
    with torch.no_grad():
        module.get_submodule("bert.embeddings.word_embeddings").weight[2] = 3e38  # a token of one row alone
    texts = [ids * 0 + 2 if row == 4 else ids for row, ids in enumerate(rows.inputs["input_ids"])]
    calibration = replace(rows, inputs={"input_ids": texts})
    broken = replace(workload, module=module, data=replace(workload.data, calibration=calibration))
    with pytest.raises(
        InputError, match=r"activation that 'bert.embeddings.LayerNorm' reads is NaN .* for calibration row 4\.$"
    ):
        ep.score(broken, method)


class Root(nn.Module):
    """Its gradient is infinite where its input is zero, and its output finite everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(2, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 2)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that the rows have
        logits: Tensor = self.last(self.second(self.first(input).relu()).abs().sqrt())
        return logits


@pytest.mark.parametrize("method", ["fisher", "masked_taylor"])
def test_the_row_and_the_layer_of_an_infinite_gradient_are_named(method: str, with_rows: Callable[..., Any]) -> None:
    wide = with_rows("wide")
    module = Root().double()
    with torch.no_grad():
        module.first.bias.zero_()
    structure = mapping.structure(module, families.of_module(module), dict(wide.example))
    broken = replace(wide, module=module, structure=structure)
    broken.data.calibration.inputs["input"][3][:] = 0
    with pytest.raises(
        InputError, match=r"the gradient of the activation of 'second' is NaN or infinite for calibration row 3\.$"
    ):
        ep.score(broken, method)
