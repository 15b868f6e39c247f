"""Checkpoints: a pruned model on disk that comes back bit for bit, without pickle.

A checkpoint is ``config.json`` (the original's), ``edgepress.json`` (the plan, and how to rebuild) and
``model.safetensors`` (what is left). Reloading builds the original's skeleton on the meta device, replays the plan on
it, and lays the tensors in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import InputError
from ..files import new_folder
from ..plan import PruningPlan, read_json
from . import data as rows
from . import families, surgery, zoo
from .skeleton import Skeleton
from .workload import TOKENIZER_FILES, Progress, Workload, check_finite

META = "edgepress.json"
FORMAT = 1


def save(workload: Workload, folder: Path) -> Path:
    """Write ``workload``'s module as a checkpoint folder; returns it. Raises InputError where it cannot be written."""
    with new_folder(folder) as place:
        write(workload, place)
    return folder


def write(workload: Workload, place: Path) -> None:
    """Write the files of a checkpoint into an existing folder."""
    meta = {
        "format": FORMAT,
        "name": workload.name,
        "architecture": workload.skeleton.architecture,
        "labels": list(workload.skeleton.labels),
        "plan": workload.plan.to_json(),
        "max_length": workload.max_length,
        "source": workload.source,
        "origin": workload.origin,
        "tools": {name: version(name) for name in ("torch", "transformers", "safetensors")},
    }
    for name, content in workload.files.items():
        (place / name).write_bytes(content)
    (place / "config.json").write_text(json.dumps(dict(workload.skeleton.config), indent=2) + "\n", encoding="utf-8")
    (place / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().contiguous() for name, tensor in workload.module.state_dict().items()}
    try:
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk among others
        raise InputError(f"{place.name} cannot be written: {error}.") from error
    (place / "model.safetensors").chmod(0o644)


def load(
    folder: Path,
    data: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Workload:
    """The workload that was saved in ``folder``, with the rows of ``data`` (default: those it was made with)."""
    meta, skeleton = _description(folder)
    source = data or str(meta["source"])
    if not source:
        raise InputError(f"{folder} was made from a user's own rows; give them with --data.")
    if source.startswith("zoo:"):
        split = zoo.load(source.removeprefix("zoo:"), seed=seed, progress=progress).data
    else:
        length = int(meta["max_length"])
        split = rows.load(source, folder, skeleton.labels, columns=columns, seed=seed, max_length=length)
    return read(folder, split)


def read(folder: Path, data: rows.Data) -> Workload:
    """The workload that was saved in ``folder``, with these rows.

    Raises InputError for anything missing, damaged or hostile in the folder.
    """
    meta, skeleton = _description(folder)
    plan = PruningPlan.from_json(meta["plan"])
    module = restore(skeleton, plan, folder / "model.safetensors")
    return Workload(
        name=meta["name"],
        module=module,
        structure=families.structure(module, skeleton.family, meta["max_length"]),
        data=data,
        skeleton=skeleton,
        max_length=meta["max_length"],
        origin=meta["origin"],
        source=meta["source"],
        plan=plan,
        files={file: (folder / file).read_bytes() for file in TOKENIZER_FILES if (folder / file).is_file()},
    )


def _description(folder: Path) -> tuple[dict[str, Any], Skeleton]:
    """What ``edgepress.json`` says, every field of the type it should have, and the skeleton it describes."""
    meta = read_json(folder / META)
    types = {"format": int, "name": str, "architecture": str, "labels": list, "plan": dict, "max_length": int}
    for field, kind in {**types, "source": str, "origin": str}.items():
        if not isinstance(meta, dict) or not isinstance(meta.get(field), kind):
            raise InputError(
                f"{folder / META} is not an edgepress checkpoint: '{field}' is missing or of another type."
            )
    if meta["format"] != FORMAT:
        raise InputError(f"{folder} has checkpoint format {meta['format']}; this version reads format {FORMAT}.")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} does not hold a JSON object.")
    return meta, Skeleton(meta["architecture"], config, tuple(map(str, meta["labels"])))


def restore(skeleton: Skeleton, plan: PruningPlan, weights: Path) -> nn.Module:
    """The skeleton with ``plan`` replayed on it and the tensors of ``weights`` laid in, in evaluation mode."""
    module = skeleton.build()
    if plan.removed:
        surgery.remove(module, families.structure(module, skeleton.family, 1), plan)
    tensors = read_tensors(weights)
    expected: dict[str, Any] = module.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise InputError(f"{weights} has no tensor '{name}', which the model needs.")
        if tensors[name].shape != tensor.shape:
            raise InputError(f"{weights}: '{name}' is {list(tensors[name].shape)}, the plan asks {list(tensor.shape)}.")
    surplus = sorted(set(tensors) - set(expected))
    if surplus:
        raise InputError(f"{weights} holds tensor '{surplus[0]}', which the model does not have.")
    module.load_state_dict(tensors, assign=True)
    check_finite(module, str(weights))
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return module.eval()


def read_tensors(weights: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file; InputError where it is missing or damaged."""
    try:
        return load_file(weights)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{weights} cannot be read as safetensors: {error}.") from error
