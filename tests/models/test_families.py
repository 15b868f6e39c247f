"""Every family: masked is removed, plans compose, and counts that an independent counter agrees with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from edgepress.errors import InputError, UnavailableError
from edgepress.models import families, mapping, surgery
from edgepress.models.structure import Structure
from edgepress.plan import PruningPlan, Unit
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

PHASES = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]  # not explain, which traces every line
SETTINGS = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES)


def _masked_and_removed(workload: Any, plan: PruningPlan) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad(), surgery.masked(workload.module, workload.structure, plan):
        masked = workload.forward(workload.example)
    with torch.no_grad():
        return masked, surgery.prune(workload, plan).forward(workload.example)


@SETTINGS
@given(st.data())
def test_masked_is_removed(model: Any, plans: Any, data: st.DataObject) -> None:
    plan = data.draw(plans(model.structure))
    masked, removed = _masked_and_removed(model, plan)
    torch.testing.assert_close(masked, removed, rtol=0, atol=1e-9)


def _edge_cases(structure: Structure) -> dict[str, PruningPlan]:
    cases: dict[str, list[Unit]] = {}
    for site in structure.sites:
        name = f"{site.kind} of layer {site.layer}"
        if site.kind == "block":
            cases[f"the whole {name}"] = list(site.units)
        else:
            cases[f"all {name} but the last"] = list(site.units[:-1])
            cases[f"one {name}"] = list(site.units[1:2])
        if site.kind == "ffn":
            cases[f"all {name}"] = list(site.units)
    for kind in structure.kinds:
        sites = structure.of_kind(kind)
        if kind != "block":
            cases[f"all {kind} but one in every layer"] = [unit for site in sites for unit in site.units[1:]]
    return {name: PruningPlan.of(units) for name, units in cases.items()}


def test_edge_cases(model: Any) -> None:
    with torch.no_grad():
        before = model.forward(model.example)
    for name, plan in _edge_cases(model.structure).items():
        stacks = [stack for stack in model.structure.stacks if plan.blocks.issuperset(stack.layers)]
        assert not stacks, name
        masked, removed = _masked_and_removed(model, plan)
        torch.testing.assert_close(masked, removed, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
        if not name.startswith("one ffn"):  # a single channel may be dead under a ReLU
            assert (before - removed).abs().max() > 1e-9, f"{name} changes nothing"


@SETTINGS
@given(st.data())
def test_one_after_the_other_is_both_at_once(model: Any, plans: Any, data: st.DataObject) -> None:
    first = surgery.prune(model, data.draw(plans(model.structure)))
    second = surgery.prune(first, data.draw(plans(first.structure)))
    at_once = surgery.prune(model, second.plan)
    ours, theirs = second.module.state_dict(), at_once.module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        assert torch.equal(second.forward(model.example), at_once.forward(model.example))


def _counted(workload: Any) -> float:
    """Multiply-accumulates by torch's own counter, which sees attention only where it is written out."""
    module = copy.deepcopy(workload.module)
    for child in module.modules():
        if hasattr(child, "set_attn_implementation"):
            child.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module(**workload.example)
    return counter.get_total_flops() / 2


def test_costs(model: Any) -> None:
    """Totals against an independent count, units against what removing them really takes away."""
    structure = model.structure
    assert structure.macs == pytest.approx(_counted(model), rel=2e-3)
    for site in structure.sites:
        if site.kind == "kv":  # its heads go along: their number differs
            continue
        pruned = surgery.prune(model, PruningPlan.of(site.units[:1]))
        assert model.params - pruned.params == site.params, site.kind
        assert structure.macs - pruned.structure.macs == site.macs, site.kind
        assert pruned.structure.macs == pytest.approx(_counted(pruned), rel=2e-3)


def test_a_group_takes_its_heads_along(small_model: Any) -> None:
    model = small_model("llama")
    head, kv = model.structure.site("head", 0), model.structure.site("kv", 0)
    assert kv.parts == (0, 0, 1, 1, 2, 2)
    pruned = surgery.prune(model, PruningPlan.of(kv.units[:1]))
    assert (pruned.structure.site("head", 0).count, pruned.structure.site("kv", 0).count) == (4, 2)
    assert model.params - pruned.params == kv.params
    assert pruned.plan == PruningPlan.of([*kv.units[:1], *head.units[:2]])
    uneven = surgery.prune(model, PruningPlan.of([*head.units[:1], *head.units[2:4]]))
    assert uneven.structure.site("kv", 0).parts == (0, 1, 1)
    assert uneven.structure.site("kv", 1).parts == kv.parts


def test_generation_goes_on_after_pruning(small_model: Any) -> None:
    """Key/value caches: what is generated token by token is what a full pass says."""
    for name in ("gpt2", "llama", "qwen2", "t5", "bart", "whisper"):
        model = small_model(name)
        units = [Unit("head", 0, 1), Unit("ffn", 1, 3), Unit("block", 0, 0)]
        units += [Unit("head", 1, 0), *([Unit("kv", 1, 1)] if "kv" in model.structure.kinds else [])]
        pruned = surgery.prune(model, PruningPlan.of(units)).module
        inputs = {key: tensor for key, tensor in model.example.items() if not key.startswith("decoder")}
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        with torch.no_grad():
            cached = pruned.generate(**inputs, **options, use_cache=True)
            whole = pruned.generate(**inputs, **options, use_cache=False)
        assert torch.equal(cached, whole), name


def test_swallowing_a_stack_is_refused(small_model: Any) -> None:
    model = small_model("bart")
    with pytest.raises(InputError, match=r"all 2 blocks of model\.decoder\.layers"):
        surgery.prune(model, PruningPlan.of([Unit("block", 2, 0), Unit("block", 3, 0)]))


def test_what_is_left_alone_is_said(small_model: Any) -> None:
    assert "no block can go" in " ".join(small_model("albert").structure.notes)
    assert "block" not in small_model("albert").structure.kinds


def test_an_unknown_type_is_one_sentence() -> None:
    with pytest.raises(UnavailableError, match="'mamba' are not supported"):
        families.of_model_type("mamba")


def test_a_family_without_its_blocks_is_one_sentence(small_model: Any) -> None:
    with pytest.raises(UnavailableError, match="No list of blocks"):
        mapping.structure(small_model("bert").module, families.get("gpt2"), None)


def test_every_family_file_is_listed() -> None:
    folder = Path(families.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} == set(families.FAMILIES)
    assert all(families.get(name).name == name for name in families.FAMILIES)
