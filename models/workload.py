"""Workload: what is compressed and how it is judged.

:func:`load` makes one from what people have: a zoo name, a Hugging Face folder, an edgepress checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UnavailableError, UsageError
from ..plan import PruningPlan
from . import measures
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
    example: Mapping[str, Tensor]
    """One row of inputs, of the lengths that costs are counted for."""
    plan: PruningPlan = field(default_factory=PruningPlan)
    files: Mapping[str, bytes] = field(default_factory=dict)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The model's answer: logits [batch, labels] of a classifier or [batch, sequence, vocabulary] of a language
        model, [images, texts] of a pair of towers, the last hidden state of a bare encoder."""
        return answer(self.module(**inputs))

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
        """Multiply-accumulates for ``example``, counted in the matrix products."""
        return self.structure.macs

    def judged_by(self, metric: str | None) -> Workload:
        """The same with another metric; UsageError where it is not one for a classifier's logits."""
        if metric is None:
            return self
        measures.get(metric)
        if metric in measures.KNOWN and metric not in measures.OF_CLASSES:
            known = ", ".join(measures.OF_CLASSES)
            raise UsageError(f"'{metric}' does not judge a classifier's answers (these do: {known}).")
        return replace(self, data=replace(self.data, metric=metric))

    def fingerprint(self) -> str:
        """sha256 over the weights and the tokenised rows: equal workloads give equal results."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
        for rows in (self.data.train, self.data.calibration, self.data.evaluation):
            digest.update(rows.fingerprint.encode())
        return digest.hexdigest()


def answer(output: Any) -> Tensor:
    """The tensor that a module's output is judged by."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    first = output[0] if isinstance(output, (tuple, list)) and output else None
    if isinstance(first, Tensor):
        return first
    raise UnavailableError(f"A model whose forward returns {type(output).__name__} cannot be judged: no tensor in it.")


def load(
    model: str,
    data: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> Workload:
    """Load a workload.

    ``model`` is ``zoo:NAME``, the folder or hub id of a Hugging Face model, an edgepress checkpoint, a function as
    ``package.module:function``, or ``package.module:function@FOLDER`` for a checkpoint of its module. ``data`` is a
    CSV, TSV or JSONL file, or ``zoo:NAME`` for that entry's rows; a zoo model, or a checkpoint made from one, brings
    its own. ``columns`` maps ``text`` and ``label`` to the file's column names. Texts are cut at ``max_length`` tokens,
    128 where nothing is said. Raises any kind of EdgepressError.
    """
    from . import checkpoint, functions, hub, pretrained, zoo

    if model.startswith("zoo:"):
        if data not in (None, model):
            raise UsageError(f"{model} brings its own data, so --data {data} cannot be used with it.")
        return zoo.load(model.removeprefix("zoo:"), seed=seed, progress=progress)
    if functions.named(model):
        function, _, saved = model.partition("@")
        if data:
            raise UnavailableError(f"{model}: rows for a function's model are not available yet in this version.")
        return checkpoint.load(Path(saved), function=function) if saved else functions.load(function)
    folder = Path(model)
    if folder.suffix == ".onnx":
        raise UnavailableError(f"{model} is an ONNX file; only quantize, bench and compare take artifacts.")
    if folder.is_file():
        raise InputError(f"{model} is a file, not a model folder (a folder with config.json and model.safetensors).")
    if not folder.is_dir():
        if not hub.is_id(model):
            known = ", ".join(f"zoo:{name}" for name in zoo.ZOO)
            raise InputError(f"There is no model folder '{model}'; give a local folder, a hub id, or one of {known}.")
        folder = hub.download(model)
    if (folder / checkpoint.META).is_file():
        return checkpoint.load(folder, data, columns=columns, seed=seed, progress=progress)
    name = folder.resolve().name if Path(model).is_dir() else model.replace("/", "--")
    return pretrained.load(folder, data, name=name, columns=columns, seed=seed, max_length=max_length)


def check_finite(module: nn.Module, origin: str) -> None:
    """Raise InputError that names the first parameter holding a NaN or an infinity."""
    for name, parameter in module.named_parameters():
        bad = int((~torch.isfinite(parameter)).sum())
        if bad:
            raise InputError(f"{origin}: {bad} of {parameter.numel()} values of '{name}' are NaN or infinite.")
