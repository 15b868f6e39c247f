"""Small models with random weights and random labelled rows, in float64, for comparison with slow definitions."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgepress.models import families, mapping
from edgepress.models.data import Data, Rows
from edgepress.models.examples import example
from edgepress.models.skeleton import Skeleton
from edgepress.models.workload import Workload
from torch import nn

ROWS, LENGTH = 10, 12


def _models() -> Any:
    """tests/models/conftest.py, whose fixtures pytest shows to the tests beside it only."""
    path = Path(__file__).parent.parent / "models" / "conftest.py"
    spec = importlib.util.spec_from_file_location("edgepress_test_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODELS = _models()


class Residual(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(i, o, 3, stride, 1), nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.norm, self.skip = nn.BatchNorm2d(o), nn.Conv2d(i, o, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(self.skip(x) + self.b(torch.nn.functional.gelu(self.norm(self.a(x)))))


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, norm_first=True, activation="gelu")
        self.embedding, self.head = nn.Linear(5, 16), nn.Linear(16, 3)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(x).transpose(0, 1)).mean(dim=0))


def _function(module: nn.Module, shape: tuple[int, ...]) -> Any:
    from edgepress.models.functions import separate_attention

    separate_attention(module)
    module, random = module.double().eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random, dtype=torch.float64), alpha=0.2)
    name = next(iter(inspect.signature(module.forward).parameters))
    one = {name: torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    structure = mapping.structure(module, families.of_module(module), one)
    return Workload("net", module, structure, Data.empty(), Skeleton("nets:net", {}, ()), 1, "", "", one)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "cnn": (
        lambda: nn.Sequential(
            Residual(3, 6, 1), Residual(6, 8, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)
        ),
        (3, 7, 7),
    ),
    "sequence first": (SequenceFirst, (9, 5)),
    "wide": (lambda: nn.Sequential(nn.Linear(2, 40), nn.GELU(), nn.Linear(40, 40), nn.GELU(), nn.Linear(40, 2)), (2,)),
}


def _with_rows(workload: Any, count: int) -> Any:
    """``workload`` with ``count`` random rows: texts of unequal lengths, a class or a class a token as label."""
    random = np.random.default_rng(0)
    if workload.skeleton.is_function:
        shape = next(iter(workload.example.values())).shape[1:]
        inputs: dict[str, Any] = {next(iter(workload.example)): random.normal(size=(count, *shape))}
    else:
        family = families.get(workload.structure.family)
        drawn = example(workload.module, family.inputs, LENGTH, rows=count, seed=1)
        inputs = {name: list(tensor.numpy()) for name, tensor in drawn.items() if name != "attention_mask"}
    if "input_ids" in inputs:
        lengths = random.integers(4, LENGTH + 1, size=count)
        lengths[0] = LENGTH
        inputs["input_ids"] = [ids[:length] for ids, length in zip(inputs["input_ids"], lengths, strict=True)]
    if "decoder_input_ids" in inputs:
        inputs["decoder_input_ids"] = [ids[:-1] for ids in inputs["decoder_input_ids"]]
    labels: Any = None
    if workload.skeleton.is_function or workload.task.name == "classification":
        labels = random.integers(0, 2, size=count)
    elif workload.task.name in {"language modelling", "generation"}:
        of = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        labels = tuple(random.integers(3, 50, size=len(ids)) for ids in of)
    rows = Rows(inputs, labels, tuple(bytes([i]) for i in range(count)))
    return replace(workload, data=Data(rows, rows, rows))


@pytest.fixture(scope="session")
def with_rows() -> Callable[[str], Any]:
    """Builds a model of tests/models/conftest.py, or one of ``NETS``, by name; each call gives a new one."""

    def make(name: str, count: int = ROWS) -> Any:
        if name not in NETS:
            return _with_rows(MODELS.build(name, LENGTH), count)
        torch.manual_seed(0)
        module, shape = NETS[name]
        return _with_rows(_function(module(), shape), count)

    return make


@pytest.fixture(scope="session", params=MODELS.MODELS)
def any_model(request: pytest.FixtureRequest) -> str:
    """The name of each model of tests/models/conftest.py in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def output_error() -> Callable[[Any, Any], float]:
    """The squared difference of two workloads' outputs, summed over the first one's calibration rows."""

    def error(workload: Any, changed: Any) -> float:
        total = 0.0
        with torch.inference_mode():
            for batch in workload.data.calibration.batches(32):
                total += float((workload.forward(batch.inputs) - changed.forward(batch.inputs)).square().sum())
        return total

    return error


@pytest.fixture(scope="session")
def plans() -> Any:
    """The strategy that draws plans for a structure."""
    return MODELS._plans
