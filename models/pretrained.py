"""Load a folder that ``save_pretrained`` wrote, without network and without running code from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import InputError, UnavailableError
from ..plan import read_json
from . import data as rows
from . import families
from .skeleton import Skeleton
from .workload import TOKENIZER_FILES, Workload, check_finite


def load(
    folder: Path,
    data: str | None,
    *,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    max_length: int = 128,
) -> Workload:
    """The sequence classifier in ``folder`` with the labelled rows of ``data``.

    Raises InputError where the folder or the rows cannot be used, UnavailableError for other architectures.
    """
    config = _config(folder)
    if not data:
        raise InputError(f"{folder} needs labelled rows: give a CSV, TSV or JSONL file with --data.")
    family = families.of_model_type(str(config.get("model_type")))
    architecture = next(iter(config.get("architectures") or []), "")
    if architecture not in family.architectures:
        raise UnavailableError(
            f"{folder} holds a '{architecture}'; this version takes {', '.join(family.architectures)}."
        )
    longest = int(config.get("max_position_embeddings", max_length))
    if max_length > longest:
        raise InputError(f"The sequence length {max_length} is more than the {longest} positions of {folder}.")
    module = _module(folder, architecture)
    id2label = module.config.id2label
    skeleton = Skeleton(architecture, module.config.to_dict(), tuple(str(id2label[i]) for i in sorted(id2label)))
    split = rows.load(data, folder, skeleton.labels, columns=columns, seed=seed, max_length=max_length)
    structure = families.structure(module, family, max_length)
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    return Workload(
        name=folder.resolve().name,
        module=module,
        structure=structure,
        data=split,
        skeleton=skeleton,
        max_length=max_length,
        origin=f"{folder} and {data}",
        source="",
        files=files,
    )


def _config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, once it is sure that nothing in the folder asks to be executed."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} does not hold a JSON object.")
    code = sorted(path.name for path in folder.glob("*.py"))
    if code or "auto_map" in config:
        what = f"brings its own code ({', '.join(code)})" if code else "asks for its own code (auto_map)"
        raise InputError(f"{folder} {what}, which edgepress does not run.")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} has no .safetensors weights; save it again with save_pretrained.")
    return config


def _module(folder: Path, architecture: str) -> Any:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        module, info = getattr(transformers, architecture).from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}.") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(f"{folder} lacks {len(missing)} of the model's tensors, the first being '{missing[0]}'.")
    check_finite(module, str(folder))
    return module.eval()
