"""Adapters: what PEFT has saved of a model's fine-tuning, merged into the model that it was trained on.

An adapter of a classifier brings its head along where the model under it has another one, or none.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import InputError, UnavailableError
from ..plan import read_json
from . import hub

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of the model's own tensors."""


@dataclass(frozen=True)
class Head:
    """What an adapter was trained on that its base is not."""

    architecture: str
    labels: int
    tensors: frozenset[str]
    """Names of what the adapter brings: the base's folder need not have it."""


def base(adapter: Path) -> Path:
    """The folder of the model that an adapter was trained on: a path, also relative to the adapter's, or a hub id."""
    named = _options(adapter).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise InputError(f"{adapter / CONFIG} does not name the model that it adapts (base_model_name_or_path).")
    for place in (Path(named), adapter / named):
        if place.is_dir():
            return place
    if hub.is_id(named):
        return hub.download(named)
    raise InputError(f"{adapter} adapts the model '{named}', which is not here.")


def head(adapter: Path, model_type: str, architecture: str) -> Head | None:
    """The classifier that an adapter of ``architecture`` makes of it, or None where it is one already.

    Its classes are as many as the rows of its last matrix.
    """
    from transformers.models.auto import modeling_auto as auto

    classifiers: dict[str, Any] = {
        "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    }
    wanted = classifiers.get(str(_options(adapter).get("task_type")), {}).get(model_type, architecture)
    if wanted == architecture:
        return None
    try:
        with safe_open(adapter / WEIGHTS, "pt") as file:
            brought = {name.removeprefix(PREFIX): file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{adapter / WEIGHTS} cannot be read as safetensors: {error}.") from error
    matrices = [name for name in sorted(brought) if re.match(r"(classifier|score)\b.*weight$", name)]
    if not matrices:
        raise InputError(f"{adapter} was trained with {wanted}, and its base is {architecture}; it brings no head.")
    return Head(wanted, brought[matrices[-1]][0], frozenset(brought))


def merged(module: Any, adapter: Path) -> Any:
    """``module`` with an adapter's weights added to its own (LoRA: Hu et al. 2021, arXiv 2106.09685).

    Raises InputError where the two do not fit to the last tensor, UnavailableError for an adapter that is no change of
    weights (prompt tuning).
    """
    try:
        import peft
    except ImportError as error:
        raise UnavailableError(f"{adapter} is a PEFT adapter: install edgepress[peft].") from error
    if not (adapter / WEIGHTS).is_file():
        raise InputError(f"{adapter} has no {WEIGHTS}; other formats of adapters are not read.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what does not fit is told below
            adapted: Any = peft.PeftModel.from_pretrained(module, str(adapter), local_files_only=True)
        with safe_open(adapter / WEIGHTS, "pt") as file:
            brought = set(file.keys())
        known = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
        strange = sorted((known - brought) | (brought - known - set(adapted.state_dict())))
        if strange:
            raise InputError(f"The adapter in {adapter} is not one of its base: they differ in '{strange[0]}'.")
        if not hasattr(adapted.base_model, "merge_and_unload"):
            kind = adapted.active_peft_config.peft_type.value
            raise UnavailableError(f"{adapter} cannot be merged: {kind} changes the inputs and no weights.")
        return adapted.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        why = str(error).strip().splitlines()[0]
        raise InputError(f"The adapter in {adapter} cannot be merged: {why}.") from error


def _options(adapter: Path) -> dict[str, Any]:
    options = read_json(adapter / CONFIG)
    if not isinstance(options, dict):
        raise InputError(f"{adapter / CONFIG} does not hold a JSON object.")
    return options
