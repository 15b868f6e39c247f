"""Load a folder that ``save_pretrained`` wrote, without network and without running code from it.

Weights are read tensor by tensor into a skeleton, and become float32 whatever they are stored in. The folder of a PEFT
adapter is its base model with the adapter merged in.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import InputError, UnavailableError
from ..plan import read_json
from . import encode, hub, mapping, remote
from .data import Data
from .examples import example as make_example
from .examples import longest
from .skeleton import Skeleton, model_class
from .workload import Workload, check_finite, model_files

ADAPTER = "adapter_config.json"
MAX_LENGTH = 128


def load(
    folder: Path,
    data: str | None,
    *,
    name: str,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> Workload:
    """The model in ``folder`` with the labelled rows of ``data``, or with none.

    Raises InputError where the folder or the rows cannot be used, UnavailableError for other architectures.
    """
    adapter = folder if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file() else None
    if adapter:
        folder = _base(adapter)
    config = _config(folder, trust_remote_code)
    code = folder if remote.asked_for(folder, config) else None
    architecture = str(next(iter(config.get("architectures") or []), ""))
    family = Skeleton(architecture, config, (), code).family
    module = _module(folder, architecture, config, code)
    if adapter:
        module = _merged(module, adapter)
    check_finite(module, str(adapter or folder))
    most = longest(module.config)
    if max_length is not None and max_length > most:
        raise InputError(f"The sequence length {max_length} is more than the {most} positions of {folder}.")
    max_length = max_length or min(MAX_LENGTH, most)
    skeleton = Skeleton(architecture, module.config.to_dict(), _labels(module.config, architecture), code)
    example = make_example(module, family.inputs, max_length)
    split = Data.empty()
    if data:
        reader = encode.Reader(folder, skeleton, example, max_length)
        split, example = encode.fitted(encode.load(data, reader, columns=columns, seed=seed), module, example)
    structure = mapping.structure(module, family, example)
    files = model_files(folder, code=code is not None)
    return Workload(
        name=name,
        module=module,
        structure=structure,
        data=split,
        skeleton=skeleton,
        max_length=max_length,
        origin=f"{folder} and {data}" if data else str(folder),
        source="",
        example=example,
        files=files,
    )


def _labels(config: Any, architecture: str) -> tuple[str, ...]:
    """The names of a classifier's classes; every configuration has some, whether or not its model is a classifier."""
    if not architecture.endswith("Classification"):
        return ()
    return tuple(str(config.id2label[index]) for index in sorted(config.id2label))


def _config(folder: Path, trusted: bool) -> dict[str, Any]:
    """The folder's config.json, once it is sure that nothing in the folder asks to be executed, or that it may be."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} does not hold a JSON object.")
    asked = remote.asked_for(folder, config)
    if asked and not trusted:
        raise InputError(f"{folder} {asked}, which edgepress does not run without --trust-remote-code.")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise InputError(f"{folder} has no weights: neither .safetensors nor pytorch_model.bin.")
    return config


def _base(adapter: Path) -> Path:
    """The folder of the model that an adapter was trained on: a path, also relative to the adapter's, or a hub id."""
    options = read_json(adapter / ADAPTER)
    named = options.get("base_model_name_or_path") if isinstance(options, dict) else None
    if not isinstance(named, str) or not named:
        raise InputError(f"{adapter / ADAPTER} does not name the model that it adapts (base_model_name_or_path).")
    for place in (Path(named), adapter / named):
        if place.is_dir():
            return place
    if hub.is_id(named):
        return hub.download(named)
    raise InputError(f"{adapter} adapts the model '{named}', which is not here.")


def _merged(module: Any, adapter: Path) -> Any:
    """``module`` with a PEFT adapter's weights added to its own (LoRA: Hu et al. 2021, arXiv 2106.09685)."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UnavailableError(f"{adapter} is a PEFT adapter: install edgepress[peft].") from error
    if not any(adapter.glob("*.safetensors")):
        raise InputError(f"{adapter} has no adapter_model.safetensors; other formats of adapters are not read.")
    try:
        return PeftModel.from_pretrained(module, str(adapter), local_files_only=True).merge_and_unload(safe_merge=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        why = str(error).strip().splitlines()[0]
        raise InputError(f"The adapter in {adapter} cannot be merged: {why}.") from error


def _module(folder: Path, architecture: str, config: Mapping[str, Any], code: Path | None) -> Any:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if code:
            made_by = remote.classes(code, config, architecture)[1]
        else:
            config_class = type(transformers.AutoConfig.from_pretrained(folder, local_files_only=True))
            made_by = model_class(architecture, config_class)
        module, info = made_by.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=any(folder.glob("*.safetensors")),
            weights_only=True,
            output_loading_info=True,
        )
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{folder} cannot be loaded: its .bin file holds more than tensors, and edgepress unpickles nothing else; "
            f"save it again as safetensors."
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}.") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} of the model's tensors, the first being '{missing[0]}'.")
    return module.eval()
