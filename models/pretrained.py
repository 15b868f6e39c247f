"""Load a folder that ``save_pretrained`` wrote, without network and without running code from it.

Weights are read tensor by tensor into a skeleton, and become float32 whatever they are stored in. The folder of a PEFT
adapter is its base model with the adapter merged in.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import EdgepressError, InputError
from ..plan import read_json
from . import adapters, encode, mapping, remote
from .data import Data
from .examples import example as make_example
from .examples import longest
from .skeleton import Skeleton, model_class
from .workload import Workload, check_finite, model_files

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
    adapter = folder if (folder / adapters.CONFIG).is_file() and not (folder / "config.json").is_file() else None
    if adapter:
        folder = adapters.base(adapter)
    config = _config(folder, trust_remote_code)
    code = folder if remote.asked_for(folder, config) else None
    named = config.get("architectures")
    architecture = str(next(iter(named if isinstance(named, list) else []), ""))
    family = Skeleton(architecture, config, (), code).family
    head = adapters.head(adapter, str(config.get("model_type")), architecture) if adapter else None
    architecture = head.architecture if head else architecture
    module = _module(folder, architecture, config, code, head)
    if adapter:
        module = adapters.merged(module, adapter)
    check_finite(module, str(adapter or folder))
    most = longest(module.config)
    if max_length is not None and not 0 < max_length <= most:
        raise InputError(f"The sequence length {max_length} is not one of the {most} positions of {folder}.")
    max_length = max_length or min(MAX_LENGTH, most)
    skeleton = Skeleton(architecture, module.config.to_dict(), _labels(module.config, architecture), code)
    example = make_example(module, family.inputs, max_length)
    split = Data.empty()
    if data:
        reader = encode.Reader(folder, skeleton, example, max_length)
        split, example = encode.fitted(encode.load(data, reader, columns=columns, seed=seed), module, example)
    with skeleton.told():
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


def _module(
    folder: Path, architecture: str, config: Mapping[str, Any], code: Path | None, head: adapters.Head | None
) -> Any:
    """The module with the folder's weights in float32, those of an adapter's ``head`` still drawn at random."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"num_labels": head.labels} if head else {}
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
            ignore_mismatched_sizes=True,  # so that they are told
            output_loading_info=True,
            **options,
        )
    except EdgepressError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{folder} cannot be loaded: its .bin file holds more than tensors, and edgepress unpickles nothing else; "
            f"save it again as safetensors."
        ) from error
    except Exception as error:  # the library raises what its parts raise
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{folder} cannot be loaded: {why}.") from error
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise InputError(f"{folder}: '{name}' is {list(found)}, and config.json asks for {list(wanted)}.")
    missing = sorted(set(info["missing_keys"]) - (head.tensors if head else set()))
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} of the model's tensors, the first being '{missing[0]}'.")
    return module.eval()
