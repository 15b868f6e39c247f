"""Cross-layer equalisation: the function stays, and both layers' largest weights meet."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from edgepress import methods
from edgepress.compress import quantize as quantizers
from edgepress.compress.quantize import equalise, rotate
from edgepress.compress.quantize.fake import holding, quantized
from edgepress.errors import UnavailableError
from edgepress.models import families, mapping
from edgepress.models.data import Data
from edgepress.models.layers import matrix
from edgepress.models.skeleton import Skeleton
from edgepress.models.workload import Workload
from torch import Tensor, nn


def _workload(module: nn.Module, *shape: int) -> Workload:
    module = module.double().eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = torch.randn(len(parameter), generator=random, dtype=torch.float64).exp()
            parameter.normal_(generator=random).mul_(spread.reshape(-1, *[1] * (parameter.dim() - 1)))
    example = {"input": torch.randn(1, *shape, generator=random, dtype=torch.float64)}
    structure = mapping.structure(module, families.of_module(module), example)
    return Workload("net", module, structure, Data.empty(), Skeleton("nets:net", {}, ()), 1, "", "", example)


def _chain(activation: type[nn.Module]) -> Workload:
    layers = (nn.Linear(5, 12), activation(), nn.Linear(12, 9), activation(), nn.Linear(9, 3))
    return _workload(nn.Sequential(*layers), 5)


def _convolutions() -> Workload:
    layers: tuple[nn.Module, ...] = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU())
    return _workload(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4)), 3, 9, 9)


def _ranges(workload: Workload, first: str, second: str, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    with holding(workload.module, state):
        before, after = (workload.module.get_submodule(name) for name in (first, second))
        rows = matrix(before).detach().abs().amax(dim=1)
        columns = matrix(after).detach().abs().amax(dim=0).reshape(len(rows), -1).amax(dim=1)
    return rows, columns


@pytest.mark.parametrize("build", [lambda: _chain(nn.ReLU), _convolutions], ids=["linear", "convolutions"])
def test_ranges_meet_and_the_function_stays(build: Callable[[], Workload]) -> None:
    workload = build()
    names = [name for name, child in workload.module.named_children() if hasattr(child, "weight")]
    state = equalise.equalised(workload, names)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(7, *workload.example["input"].shape[1:], generator=random, dtype=torch.float64)
    with torch.no_grad():
        wanted = workload.module(x)
        with holding(workload.module, state):
            assert torch.allclose(workload.module(x), wanted, rtol=1e-10, atol=1e-10)
    for first, second in pairwise(names):
        before = torch.stack(_ranges(workload, first, second, {})).log()
        after = torch.stack(_ranges(workload, first, second, state)).log()
        assert (before[0] - before[1]).abs().max() > 0.5
        assert (after[0] - after[1]).abs().max() < 0.01


def test_nothing_is_scaled_through_what_lets_no_scale_pass() -> None:
    assert equalise.equalised(_chain(nn.GELU)) == {}
    assert equalise.equalised(_chain(nn.Tanh)) == {}


def test_a_feature_of_zeros_stays(with_rows: Callable[..., Any]) -> None:
    workload = _chain(nn.ReLU)
    with torch.no_grad():
        workload.module[0].weight[2] = 0  # type: ignore[operator]
        workload.module[2].weight[:, 5] = 0  # type: ignore[operator]
    state = equalise.equalised(workload)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    assert torch.equal(state["0.bias"][[2, 5]], workload.module[0].bias.detach()[[2, 5]])  # type: ignore[operator]


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-weight"])
def test_a_plan_holds_the_scales(scheme: str) -> None:
    """Of a chain whose channels differ much in size less is lost, and a part that is missing would show."""
    workload = _chain(nn.ReLU)
    with torch.no_grad():  # the same function, made hard to round
        uneven = torch.logspace(-2, 2, 12, dtype=torch.float64)
        workload.module[0].weight.mul_(uneven[:, None])  # type: ignore[operator]
        workload.module[0].bias.mul_(uneven)  # type: ignore[operator]
        workload.module[2].weight.div_(uneven)  # type: ignore[operator]
    plain, equal = (quantizers.quantize(workload, scheme, equalise=given) for given in (False, True))
    assert plain.weights == equal.weights
    coded = {f"{name}.weight" for name in equal.codes}
    assert equal.state.keys() == equalise.equalised(workload).keys() - coded
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lost = []
    with torch.no_grad():
        wanted = workload.module(x)
        for plan in (plain, equal):
            with quantized(workload.module, plan):
                lost.append(float((workload.module(x) - wanted).norm() / wanted.norm()))
    assert lost[1] < 0.5 * lost[0] < 0.5


def test_rotated_and_then_equalised(with_rows: Callable[..., Any]) -> None:
    workload = with_rows("mistral")
    plan = quantizers.quantize(workload, "int8-dynamic", rotate=True, equalise=True)
    turned = rotate.rotation(workload).state
    assert plan.state.keys() >= turned.keys()
    assert any(not torch.equal(plan.state[name], turned[name]) for name in turned)
    with torch.no_grad():
        wanted = workload.forward(workload.example)
        with holding(workload.module, plan.state):
            assert torch.allclose(workload.forward(workload.example), wanted, rtol=1e-6, atol=1e-6)


def test_what_has_nothing_to_share_is_said() -> None:
    with pytest.raises(UnavailableError, match="No tensor of net lies between two layers that can share a scale"):
        quantizers.quantize(_chain(nn.GELU), equalise=True)


def test_preparations_are_listed() -> None:
    rows = {row["name"]: row for row in methods.listing() if row["kind"] == "preparation"}
    assert tuple(rows) == quantizers.PREPARATIONS
    assert all(row["what"] and row["when"] and row["source"] for row in rows.values())
    assert set(rows) <= inspect.signature(quantizers.quantize).parameters.keys()
