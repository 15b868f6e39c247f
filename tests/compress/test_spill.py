"""What waits in a file comes back as it was."""

from __future__ import annotations

import resource
import tempfile
from pathlib import Path

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


def test_what_could_not_be_written_takes_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spill = Spill()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(OSError, match="missing"):
        spill.put(torch.zeros(10))
    monkeypatch.undo()
    first, second = spill.put(torch.zeros(10)), spill.put(torch.ones(10))
    spill.free(first)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        for _ in range(2):
            with pytest.raises(OSError, match="large"):
                spill.put(torch.zeros(10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert spill.put(torch.full((10,), 3.0)).start == first.start
    assert spill.put(torch.zeros(10)).start == 2 * second.start
