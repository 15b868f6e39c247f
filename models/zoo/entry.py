"""Entry: what the zoo says of a model before it is fetched; and how its parts become a workload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import mapping
from ..data import Data
from ..examples import example as make_example
from ..metrics import Quality
from ..skeleton import Skeleton
from ..workload import Workload
from .fetch import Package

WEIGHTS = Path(__file__).parent / "weights"
"""What was trained here by the scripts in ``recipes/``, a folder each."""


@dataclass(frozen=True)
class Entry:
    name: str
    what: str
    """The model and its rows in a few words."""
    task: str
    origin: str
    """Who made the weights and the rows, and in which packages they come."""
    licence: str
    """The SPDX names of the licences of weights and rows."""
    params: int
    quality: Quality
    """Of the float32 module on the evaluation rows with seed 0, as it was measured."""
    packages: tuple[Package, ...] = ()
    """What is downloaded on first use."""

    @property
    def word(self) -> str:
        """What loads the workload, and its rows."""
        return f"zoo:{self.name}"

    @property
    def described(self) -> str:
        """For reports."""
        return f"{self.what} ({self.origin})"

    @property
    def download(self) -> int:
        """Bytes to download on first use."""
        return sum(package.size for package in self.packages)


def filled(skeleton: Skeleton, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The skeleton's module of transformers with these tensors, all of which it needs, as its parameters."""
    module: Any = skeleton.build()
    module.load_state_dict(tensors, assign=True)
    module.tie_weights()
    return module.eval()  # type: ignore[no-any-return]


def workload(
    entry: Entry,
    module: nn.Module,
    skeleton: Skeleton,
    data: Data,
    *,
    max_length: int = 1,
    files: Mapping[str, bytes] | None = None,
) -> Workload:
    """The workload of an entry whose module is one of transformers."""
    example = make_example(module, skeleton.family.inputs, max_length)
    return Workload(
        name=entry.name,
        module=module,
        structure=mapping.structure(module, skeleton.family, example),
        data=data,
        skeleton=skeleton,
        max_length=max_length,
        origin=entry.described,
        source=entry.word,
        example=example,
        files=files or {},
    )
