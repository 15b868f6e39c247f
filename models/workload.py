"""Workload: what is compressed and how it is judged.

:func:`load` makes one from what people have: a zoo name, a Hugging Face folder, an edgepress checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import InputError, UnavailableError, UsageError
from ..plan import PruningPlan
from .data import Data
from .skeleton import Skeleton
from .structure import Structure

Progress = Callable[[int, int, str], None]
"""Called as ``progress(done, total, note)`` by everything that takes long."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
MAX_BATCH = 32


@dataclass(frozen=True)
class Axis:
    """A dynamic axis and the range in which an exported artifact must be right."""

    name: str
    min: int
    max: int


@dataclass(frozen=True)
class Workload:
    """A module, its structure, its data and its metric.

    ``module`` is in evaluation mode and float32. ``structure`` describes it as it is now; ``plan`` says what has been
    removed since the original, in the original's numbering, and ``skeleton`` rebuilds that original without weights.
    ``files`` are the tokenizer's, which travel with every checkpoint and artifact.
    """

    name: str
    module: nn.Module
    structure: Structure
    data: Data
    skeleton: Skeleton
    max_length: int
    origin: str
    """Where model and data come from, for reports."""
    source: str
    """The word that loads the same data again: a zoo name, or empty for a user's own files."""
    plan: PruningPlan = field(default_factory=PruningPlan)
    files: Mapping[str, bytes] = field(default_factory=dict)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits [batch, labels] for ``input_ids`` and ``attention_mask`` of shape [batch, sequence]."""
        output = self.module(**inputs)
        return output if isinstance(output, Tensor) else output.logits

    def with_module(self, module: nn.Module, structure: Structure, plan: PruningPlan) -> Workload:
        return replace(self, module=module.eval(), structure=structure, plan=plan)

    @property
    def input_axes(self) -> dict[str, dict[int, Axis]]:
        """The dynamic axes of each input, with their ranges."""
        axes = {0: Axis("batch", 1, MAX_BATCH), 1: Axis("sequence", 1, self.max_length)}
        return {"input_ids": axes, "attention_mask": axes}

    @property
    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one row at ``structure.sequence`` tokens, counted in the matrix products."""
        blocks = self.structure.of_kind("block")
        inside = tuple(f"{block.consumer}." for block in blocks)
        outside = sum(
            child.in_features * child.out_features
            for name, child in self.module.named_modules()
            if isinstance(child, nn.Linear) and not name.startswith(inside)
        )
        return sum(block.macs for block in blocks) + outside

    def fingerprint(self) -> str:
        """sha256 over the weights and the tokenised rows: equal workloads give equal results."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
        for rows in (self.data.train, self.data.calibration, self.data.evaluation):
            digest.update(rows.fingerprint.encode())
        return digest.hexdigest()


def load(
    model: str,
    data: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    max_length: int = 128,
    progress: Progress | None = None,
) -> Workload:
    """Load a workload.

    ``model`` is ``zoo:NAME``, the folder of a Hugging Face model or an edgepress checkpoint. ``data`` is a CSV, TSV or
    JSONL file, or ``zoo:NAME`` for that entry's rows; a zoo model, or a checkpoint made from one, brings its own.
    ``columns`` maps ``text`` and ``label`` to the file's column names. Raises any kind of EdgepressError.
    """
    from . import checkpoint, pretrained, zoo

    if model.startswith("zoo:"):
        if data not in (None, model):
            raise UsageError(f"{model} brings its own data, so --data {data} cannot be used with it.")
        return zoo.load(model.removeprefix("zoo:"), seed=seed, progress=progress)
    folder = Path(model)
    if folder.is_dir():
        if (folder / checkpoint.META).is_file():
            return checkpoint.load(folder, data, columns=columns, seed=seed, progress=progress)
        return pretrained.load(folder, data, columns=columns, seed=seed, max_length=max_length)
    if folder.suffix == ".onnx":
        raise UnavailableError(f"{model} is an ONNX file; only quantize, bench and compare take artifacts.")
    if ":" in model and "/" not in model:
        raise UnavailableError(
            f"'{model}': loading a module from a Python function is not available yet in this version."
        )
    if folder.exists():
        raise InputError(f"{model} is a file, not a model folder (a folder with config.json and model.safetensors).")
    raise InputError(
        f"There is no model folder '{model}'; give a local folder, or one of {', '.join('zoo:' + n for n in zoo.ZOO)}. "
        f"Downloading from a hub is not available yet in this version."
    )


def check_finite(module: nn.Module, origin: str) -> None:
    """Raise InputError that names the first parameter holding a NaN or an infinity."""
    for name, parameter in module.named_parameters():
        bad = int((~torch.isfinite(parameter)).sum())
        if bad:
            raise InputError(f"{origin}: {bad} of {parameter.numel()} values of '{name}' are NaN or infinite.")
