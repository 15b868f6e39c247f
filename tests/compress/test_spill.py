"""What waits in a file comes back as it was."""

from __future__ import annotations

import pytest
import torch
from edgepress.compress.prune.spill import Spill


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(3, 4, 5), (7,), (), (0, 4)])
def test_tensors_of_all_kinds(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    spill = Spill()
    others = spill.put(torch.arange(5)), spill.put(values), spill.put(values.mT if values.ndim > 1 else values)
    found = spill.read(others[1])
    assert found.dtype == dtype
    assert torch.equal(found, values)
    assert torch.equal(spill.read(others[2]), values.mT if values.ndim > 1 else values)
    assert torch.equal(spill.read(others[0]), torch.arange(5))
    assert torch.equal(spill.read(others[1]), values)


def test_places_that_are_free_are_taken_again() -> None:
    spill = Spill()
    first, second = spill.put(torch.zeros(10)), spill.put(torch.ones(10))
    spill.free(first)
    third = spill.put(torch.full((5,), 7.0, dtype=torch.float64))
    assert third.start == first.start
    assert torch.equal(spill.read(second), torch.ones(10))
    assert torch.equal(spill.read(third), torch.full((5,), 7.0, dtype=torch.float64))
    assert spill.put(torch.zeros(10)).start > second.start
