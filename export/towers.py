"""Towers: each half of a model that finds pairs, as a workload of its own that answers with embeddings of length 1.

A device that searches needs one of them, and embeds what is searched with the other beforehand. How alike a text and an
image are is the product of their embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..files import new_folder
from ..models import mapping, tasks
from ..models.workload import Workload
from .artifact import Artifact, open_artifact

SIDES = {"image": ("vis", ("pixel_values",)), "text": ("text", ("input_ids", "attention_mask"))}
"""How the names of a side's modules begin in the pair, and its inputs."""


def towers(workload: Workload) -> dict[str, Workload]:
    """The towers of a pair by side, ``"image"`` and ``"text"``. Their modules are the pair's own, not copies."""
    found = {}
    for side, (prefix, inputs) in SIDES.items():
        module = Tower(workload.module, prefix).eval()
        example = {name: workload.example[name] for name in inputs if name in workload.example}
        found[side] = replace(
            workload,
            name=f"{workload.name}-{side}",
            module=module,
            structure=mapping.structure(module, workload.skeleton.family, example),
            skeleton=replace(workload.skeleton, architecture=f"{workload.skeleton.architecture}, {side}"),
            data=replace(workload.data, metric=tasks.EMBEDDING.fidelity),
            example=example,
        )
    return found


def write(workload: Workload, folder: Path, write_tower: Callable[[Workload, Path], Artifact]) -> list[Artifact]:
    """The towers of a pair as two artifacts in ``folder``, ``image`` and ``text``, or none."""
    with new_folder(folder) as place:
        for side, tower in towers(workload).items():
            write_tower(tower, place / side)
    return [open_artifact(folder / side) for side in SIDES]


class Tower(nn.Module):
    """One tower of ``pair``, whose modules have the names that they have there."""

    def __init__(self, pair: nn.Module, prefix: str) -> None:
        super().__init__()
        self.names = [name for name, _ in pair.named_children() if name.startswith(prefix)]
        for name in self.names:
            self.add_module(name, pair.get_submodule(name))
        self.config: Any = pair.config

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Tensor:
        """The embeddings [batch, size] of images or of texts; what the other tower reads is passed over."""
        model, *projection = (self.get_submodule(name) for name in self.names)
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        if "vision_model" in self.names:
            given = {"pixel_values": pixel_values}
        pooled: Tensor = model(**given).pooler_output
        for layer in projection:
            pooled = layer(pooled)
        embeddings: Tensor = pooled / pooled.norm(dim=-1, keepdim=True)
        return embeddings
