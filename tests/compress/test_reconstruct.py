"""Reconstruction visits the layers in one go through the blocks; that changes nothing but the time."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import MethodType
from typing import Any

import pytest
import torch
from edgepress.compress.prune import replay
from edgepress.compress.prune.allocate import by_ratio
from edgepress.compress.prune.reconstruct import reconstruct
from edgepress.compress.prune.replay import Replay
from edgepress.models import surgery
from edgepress.models.data import Data
from edgepress.plan import PruningPlan
from torch import Tensor


def _solved_sites(workload: Any) -> list[Any]:
    return [site for site in workload.structure.sites if site.block and site.kind not in {"block", "kv"}]


def _cut(workload: Any) -> Any:
    values = torch.rand(workload.structure.num_units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return surgery.prune(workload, by_ratio(workload.structure, values, 0.5))


def _from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_replayable", lambda _: frozenset())


def _same(one: Replay, other: Replay, sites: Any) -> Iterator[bool]:
    for site in sites:
        for number in range(len(one.batches)):
            pairs = zip(one.at(site, number), other.at(site, number), strict=True)
            yield all(torch.equal(*values) for found, wanted in pairs for values in zip(found, wanted, strict=True))


def test_every_layer_sees_what_it_sees_from_the_start(
    any_model: str, with_rows: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = with_rows(any_model)
    batches = list(workload.data.calibration.batches(4))
    replayed = Replay(workload, batches)
    shared = any(stack.shared for stack in workload.structure.stacks)
    assert bool(replayed.blocks) != shared
    _from_the_start(monkeypatch)
    sites = _solved_sites(workload)
    order = [*sites, sites[-1], *sites[::-1]]
    assert all(_same(replayed, Replay(workload, batches), order))
    assert all(_same(Replay(workload, batches, fixed=True), Replay(workload, batches), order))


def test_solutions_are_those_from_the_start_and_mend_what_was_cut(
    any_model: str, with_rows: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, output_error: Any
) -> None:
    torch.manual_seed(0)
    workload = with_rows(any_model)
    pruned = _cut(workload)
    solved = reconstruct(workload, pruned)
    shared = any(stack.shared for stack in workload.structure.stacks)
    assert shared or output_error(workload, solved) < output_error(workload, pruned)
    _from_the_start(monkeypatch)
    wanted = reconstruct(workload, pruned).module.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in solved.module.state_dict().items())


def test_in_place_is_the_same_without_a_copy(with_rows: Callable[[str], Any]) -> None:
    workload = with_rows("bert")
    pruned = _cut(workload)
    wanted = reconstruct(workload, pruned).module.state_dict()
    before = {name: tensor.clone() for name, tensor in workload.module.state_dict().items()}
    solved = reconstruct(workload, pruned, in_place=True)
    assert solved.module is pruned.module
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in solved.module.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in workload.module.state_dict().items())


@pytest.mark.parametrize("name", ["albert", "albert, two groups"])
def test_shared_blocks_are_solved_for_all_of_their_runs(
    name: str, with_rows: Callable[[str], Any], output_error: Any
) -> None:
    """What a run changes comes back in the next, so that not every model gains: most do, and much."""
    left = []
    for seed in range(7):
        torch.manual_seed(seed)
        workload = with_rows(name)
        pruned = _cut(workload)
        left.append(output_error(workload, reconstruct(workload, pruned)) / output_error(workload, pruned))
    assert sorted(left)[3] < 0.75


def test_rows_and_positions_may_lie_the_other_way_round(with_rows: Callable[..., Any], output_error: Any) -> None:
    for rows in (9, 10):  # as many as there are positions, and not
        torch.manual_seed(0)
        workload = with_rows("sequence first", rows)
        pruned = _cut(workload)
        assert output_error(workload, reconstruct(workload, pruned)) < 0.5 * output_error(workload, pruned)


@pytest.mark.parametrize("fixed", [False, True])
def test_each_block_runs_a_few_times_however_many_follow(workload: Any, fixed: bool) -> None:
    workload = surgery.prune(workload, PruningPlan())  # the fixture's own module is left without hooks
    batches = list(workload.data.calibration.take(40).batches(20))
    replayed, runs = Replay(workload, batches, fixed=fixed), Counter[str]()
    for site in workload.structure.of_kind("head"):
        layer = workload.module.get_submodule(site.consumer)
        layer.register_forward_pre_hook(lambda *_, block=site.block: runs.update([block]))
    for site in _solved_sites(workload):
        for number in range(len(batches)):
            replayed.at(site, number)
    # a pass for the heads, one for the channels, and where weights change one to get to the next block
    passes = [2, 2, 2] if fixed else [3, 3, 2]
    assert list(runs.values()) == [count * len(batches) for count in passes]


def test_states_take_no_more_room_than_the_parameters(
    with_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = with_rows("bert", 250)
    batches = list(workload.data.calibration.batches(20))
    replayed, held = Replay(workload, batches), []
    _from_the_start(monkeypatch)
    plain = Replay(workload, batches)
    for same in _same(replayed, plain, _solved_sites(workload)):
        held.append(sum(replayed.numbers))
        assert same
    assert 0.8 * workload.params < max(held) <= workload.params
    assert not any(plain.done)


@pytest.mark.parametrize(("room", "kept"), [(0, range(1)), (60_000, range(1, 5)), (1 << 30, range(5, 6))])
def test_states_that_the_disk_has_no_room_for_are_computed_again(
    room: int, kept: range, with_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = with_rows("bert", 40)
    batches = list(workload.data.calibration.batches(8))
    replayed = Replay(workload, batches)
    _from_the_start(monkeypatch)
    plain = Replay(workload, batches)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        assert all(_same(replayed, plain, _solved_sites(workload)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sum(map(bool, replayed.done)) in kept


def test_blocks_that_read_what_an_earlier_one_made_run_from_the_start(with_rows: Callable[[str], Any]) -> None:
    workload = with_rows("gpt2")

    def twice(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, x + seen[0], *args, **kwargs)

    first, *_, last = workload.module.transformer.h
    seen: list[Tensor] = []
    first.register_forward_hook(lambda _, __, output: seen.__setitem__(slice(None), [replay.first(output)]))
    last.forward = MethodType(twice, last)
    assert not Replay(workload, []).blocks


def test_all_tokens_of_a_decoder_are_solved_for(with_rows: Callable[[str], Any]) -> None:
    """Where they are as many as the encoder's, whose padding is none of theirs: the solution by hand."""
    workload = with_rows("t5")
    rows = workload.data.calibration
    inputs = {
        "input_ids": [ids[: 4 - 3 * (row % 2)] for row, ids in enumerate(rows.inputs["input_ids"])],
        "decoder_input_ids": [ids[:4] for ids in rows.inputs["decoder_input_ids"]],
    }
    workload = replace(workload, data=Data(*[replace(rows, inputs=inputs, labels=None)] * 3))
    site = workload.structure.site("ffn", 5)
    pruned = surgery.prune(workload, PruningPlan.of(site.units[:15]))
    kept = list(range(15, site.count))
    found = reconstruct(workload, pruned, ridge=1e-2).module.get_submodule(site.consumer).weight

    layer = workload.module.get_submodule(site.consumer)
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in workload.data.calibration.batches(32):
            assert batch.inputs["attention_mask"].shape == batch.inputs["decoder_input_ids"].shape
            workload.forward(batch.inputs)
    handle.remove()
    x = torch.cat(seen)
    assert len(x) == 4 * len(rows)
    z = x[:, kept]
    weight = 1e-2 * (z.T @ z).diagonal().mean()
    right = x @ layer.weight.T
    solved = torch.linalg.solve(z.T @ z + weight * torch.eye(len(kept)), z.T @ right + weight * layer.weight[:, kept].T)
    assert torch.allclose(found, solved.T, rtol=1e-8, atol=1e-10)
