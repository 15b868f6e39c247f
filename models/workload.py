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
from . import measures, tasks
from .counts import beside
from .data import Batch, Data
from .skeleton import Skeleton
from .structure import Structure
from .tasks import Task

Progress = Callable[[int, int, str], None]
"""Called as ``progress(done, total, note)`` by everything that takes long."""

VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
"""The files of which a folder with a tokenizer has one at least."""
MODEL_FILES = (
    *VOCABULARIES,
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
"""What travels with a model besides its weights and configuration."""
MAX_BATCH = 32
PAST = "past_key_values."
"""How the names of inputs begin that hold the keys and values of tokens before those of ``input_ids``."""


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
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The model's answer: logits [batch, labels] of a classifier or [batch, sequence, vocabulary] of a language
        model, [images, texts] of a pair of towers, the last hidden state of a bare encoder.

        It is on the device of the module, to which ``inputs`` are brought."""
        return answer(self.module(**beside(self.module, inputs)))

    @property
    def task(self) -> Task:
        """What the answers are; a function's module is told by its rows."""
        if self.skeleton.is_function:
            return tasks.of_labels(self.data.evaluation.labels)
        return tasks.of(self.skeleton.architecture, self.skeleton.config, len(self.skeleton.labels))

    def losses(self, batch: Batch, *, seed: int = 0) -> Tensor:
        """The loss of each row of ``batch``, [batch], differentiable; see :func:`.tasks.losses`.

        ``seed`` draws the answers of rows without labels.
        """
        return tasks.losses(self.task, self.forward(batch.inputs), batch, torch.Generator().manual_seed(seed))

    def with_module(self, module: nn.Module, structure: Structure, plan: PruningPlan) -> Workload:
        return replace(self, module=module.eval(), structure=structure, plan=plan)

    @property
    def input_axes(self) -> dict[str, dict[int, Axis]]:
        """The dynamic axes of each input, with their ranges: rows, and tokens where the model takes any number."""
        batch = Axis("batch", 1, MAX_BATCH)
        axes = {name: {0: batch} for name in self.example}
        if not self.skeleton.is_function:
            for name, of_input in axes.items():
                if name in {"input_ids", "attention_mask", "token_type_ids"}:
                    of_input[1] = Axis("sequence", 1, self.max_length)
                elif name == "decoder_input_ids":
                    of_input[1] = Axis("decoder_sequence", 1, self.max_length)
                elif name.startswith(PAST) and ".encoder." not in name:
                    of_input[2] = Axis("past_sequence", 0, self.max_length - 1)
                    if "input_ids" in axes:
                        axes["attention_mask"][1] = Axis("total_sequence", 1, self.max_length)
                elif name.startswith(PAST) and "attention_mask" in axes:
                    of_input[2] = axes["attention_mask"][1]
        return axes

    @property
    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def macs(self) -> int:
        """Multiply-accumulates for ``example``, counted in the matrix products."""
        return self.structure.macs

    def judged_by(self, metric: str | None) -> Workload:
        """The same with another metric; UsageError where it does not judge this model's answers."""
        if metric is None:
            return self
        measure = measures.get(metric)
        if metric in measures.KNOWN and metric not in self.task.metrics:
            known = ", ".join(self.task.metrics)
            raise UsageError(f"'{metric}' does not judge the answers of {self.task.name} (these do: {known}).")
        rows = self.data.evaluation
        if len(rows) and rows.labels is None and not rows.texts and not measure.against_original:
            known = self.data.metric if measures.get(self.data.metric).against_original else self.task.fidelity
            raise UsageError(f"The rows have no labels for '{metric}'; they can be judged by {known}.")
        return replace(self, data=replace(self.data, metric=metric))

    def fingerprint(self) -> str:
        """sha256 over the weights and the tokenised rows: equal workloads give equal results."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy(force=True).tobytes())
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
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Workload:
    """Load a workload.

    ``model`` is ``zoo:NAME``, the folder or hub id of a Hugging Face model, an edgepress checkpoint, a function as
    ``package.module:function``, or ``package.module:function@FOLDER`` for a checkpoint of its module. ``data`` is a
    file or a folder that one of ``sources`` reads, a function that returns rows, or ``zoo:NAME`` for that entry's rows;
    a zoo model, or a checkpoint made from one, brings its own. ``columns`` maps fields to the columns' own names. Texts
    are cut at ``max_length`` tokens, 128 where nothing is said; a checkpoint, or a zoo model, has a length of its own.
    Code in a model's folder is refused unless ``trust_remote_code``. Raises any kind of EdgepressError.
    """
    from . import checkpoint, functions, hub, pretrained, zoo

    if model.startswith("zoo:"):
        if data not in (None, model):
            raise UsageError(f"{model} brings its own data, so --data {data} cannot be used with it.")
        return zoo.load(model.removeprefix("zoo:"), seed=seed, progress=progress)
    if functions.named(model):
        function, _, saved = model.partition("@")
        if saved:
            return checkpoint.load(Path(saved), data, columns=columns, function=function, seed=seed, progress=progress)
        return functions.load(function, data, columns=columns, seed=seed)
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
        return checkpoint.load(
            folder, data, columns=columns, seed=seed, trust_remote_code=trust_remote_code, progress=progress
        )
    return pretrained.load(
        folder,
        data,
        name=folder.resolve().name if Path(model).is_dir() else model.replace("/", "--"),
        columns=columns,
        seed=seed,
        max_length=max_length,
        trust_remote_code=trust_remote_code,
    )


def model_files(folder: Path, *, code: bool) -> dict[str, bytes]:
    """What travels with the model in ``folder``; its ``code`` too, where that makes it."""
    names = (*MODEL_FILES, *(path.name for path in sorted(folder.glob("*.py")) if code))
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def check_finite(module: nn.Module, origin: str) -> None:
    """Raise InputError that names the first parameter holding a NaN or an infinity."""
    for name, parameter in module.named_parameters():
        if bool(torch.isfinite(parameter.detach().sum())):  # without a copy, which would be the size of a vocabulary
            continue
        if bad := int((~torch.isfinite(parameter)).sum()):
            raise InputError(f"{origin}: {bad} of {parameter.numel()} values of '{name}' are NaN or infinite.")
