"""Checkpoints: a pruned model on disk that comes back bit for bit, without pickle.

A checkpoint is ``config.json`` (the original's), ``edgepress.json`` (the plan, and how to rebuild) and
``model.safetensors`` (what is left). Reloading builds the original's skeleton on the meta device, replays the plan on
it, and lays the tensors in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import InputError
from ..files import new_folder
from ..plan import PruningPlan, read_json
from . import encode, low_rank, mapping, remote, surgery, token_merging, zoo
from .data import Data
from .layers import tie, tied
from .plain import plain_skeleton
from .skeleton import Skeleton
from .structure import Structure
from .workload import Progress, Workload, check_finite, model_files

META = "edgepress.json"
FORMAT = 1


def save(workload: Workload, folder: Path, *, plain: bool = False) -> Path:
    """Write ``workload``'s module as a checkpoint folder; returns it. Raises InputError where it cannot be written.

    With ``plain`` the configuration says what is left, so that ``AutoModel.from_pretrained`` loads the folder without
    edgepress; UsageError where it cannot.
    """
    if plain:
        workload = replace(workload, skeleton=plain_skeleton(workload), plan=PruningPlan())
    with new_folder(folder) as place:
        write(workload, place)
    return folder


def write(workload: Workload, place: Path) -> None:
    """Write the files of a checkpoint into an existing folder."""
    ties = tied(workload.module)
    meta = {
        "format": FORMAT,
        "name": workload.name,
        "architecture": workload.skeleton.architecture,
        "labels": list(workload.skeleton.labels),
        "plan": workload.plan.to_json(),
        "ranks": low_rank.ranks(workload.module),
        "merged_tokens": token_merging.merged(workload.module),
        "max_length": workload.max_length,
        "source": workload.source,
        "origin": workload.origin,
        "tied": ties,
        "tools": {name: version(name) for name in ("torch", "transformers", "safetensors")},
    }
    for name, content in workload.files.items():
        (place / name).write_bytes(content)
    (place / "config.json").write_text(json.dumps(dict(workload.skeleton.config), indent=2) + "\n", encoding="utf-8")
    (place / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    state = workload.module.state_dict()
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items() if name not in ties}
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
    function: str = "",
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Workload:
    """The workload that was saved in ``folder``, with the rows of ``data`` (default: those it was made with).

    ``function`` and ``trust_remote_code`` as in :func:`read`.
    """
    meta, _ = _description(folder, function, trust_remote_code)
    source = data or str(meta["source"])
    if source.startswith("zoo:"):
        return read(folder, zoo.load(source.removeprefix("zoo:"), seed=seed, progress=progress).data, function)
    workload = read(folder, Data.empty(), function, trust_remote_code=trust_remote_code)
    return encode.with_rows(workload, source, folder, columns=columns, seed=seed) if source else workload


def read(folder: Path, data: Data, function: str = "", *, trust_remote_code: bool = False) -> Workload:
    """The workload that was saved in ``folder``, with these rows.

    ``function`` names the function that made the module, where one did: it is not run on the folder's word, and neither
    is code in the folder without ``trust_remote_code``. Raises InputError for anything missing, damaged or hostile.
    """
    meta, skeleton = _description(folder, function, trust_remote_code)
    plan = PruningPlan.from_json(meta["plan"])
    module, family, example = skeleton.make(meta["max_length"])
    before = mapping.structure(module, family, None if family.blocks else example)
    if meta["ranks"]:
        low_rank.replay(module, before, plan, meta["ranks"])
        before = mapping.structure(module, family, None)
    restore(module, before, plan, folder / "model.safetensors", meta["tied"])
    if meta["merged_tokens"]:
        token_merging.install(module, mapping.block_lists(module, family), meta["merged_tokens"])
    dtype = next(module.parameters()).dtype
    example = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in example.items()}
    data, example = encode.fitted(data, module, example)
    with skeleton.told():
        structure = mapping.structure(module, family, example, before)
    files = model_files(folder, code=skeleton.code is not None)
    _set_generation(module, files)
    return Workload(
        name=meta["name"],
        module=module,
        structure=structure,
        data=data,
        skeleton=skeleton,
        max_length=meta["max_length"],
        origin=meta["origin"],
        source=meta["source"],
        example=example,
        plan=plan,
        files=files,
    )


def _set_generation(module: Any, files: Mapping[str, bytes]) -> None:
    """Give a generating model the tokens to begin and to end with, and those to suppress, that its folder names."""
    if "generation_config.json" in files and hasattr(module, "generation_config"):
        from transformers import GenerationConfig

        try:
            module.generation_config = GenerationConfig.from_dict(json.loads(files["generation_config.json"]))
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f"generation_config.json cannot be used: {error}.") from error


def _description(folder: Path, function: str, trusted: bool) -> tuple[dict[str, Any], Skeleton]:
    """What ``edgepress.json`` says, every field of the type it should have, and the skeleton it describes."""
    meta = read_json(folder / META)
    types = {"format": int, "name": str, "architecture": str, "labels": list, "plan": dict, "max_length": int}
    types |= {"source": str, "origin": str, "tied": dict, "ranks": dict, "merged_tokens": list}
    if isinstance(meta, dict):
        meta = {"tied": {}, "ranks": {}, "merged_tokens": [], **meta}
    for field, kind in types.items():
        if not isinstance(meta, dict) or not isinstance(meta.get(field), kind):
            raise InputError(
                f"{folder / META} is not an edgepress checkpoint: '{field}' is missing or of another type."
            )
    if meta["max_length"] < 1:
        raise InputError(f"{folder / META} is damaged: {meta['max_length']} is not a number of tokens.")
    if meta["format"] != FORMAT:
        raise InputError(f"{folder} has checkpoint format {meta['format']}; this version reads format {FORMAT}.")
    if ":" in meta["architecture"] and meta["architecture"] != function:
        raise InputError(
            f"{folder} was made from the function {meta['architecture']}, which a file cannot make edgepress run; "
            f"give it as {meta['architecture']}@{folder}."
        )
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} does not hold a JSON object.")
    asked = "" if function else remote.asked_for(folder, config)
    if asked and not trusted:
        raise InputError(f"{folder} {asked}, which edgepress does not run without --trust-remote-code.")
    return meta, Skeleton(meta["architecture"], config, tuple(map(str, meta["labels"])), folder if asked else None)


def restore(module: nn.Module, structure: Structure, plan: PruningPlan, weights: Path, ties: Mapping[str, str]) -> None:
    """Replay ``plan`` on a skeleton's module, which has ``structure``, and lay the tensors of ``weights`` in.

    ``ties`` names the parameters that have no tensor of their own, and the one that each is.
    """
    if plan.removed:
        surgery.remove(module, structure, plan)
    tensors = read_tensors(weights)
    expected: dict[str, Any] = module.state_dict()
    for name, owner in ties.items():
        same = isinstance(owner, str) and name in expected and owner in tensors and name not in tensors
        if not same or expected[name].shape != tensors[owner].shape:
            raise InputError(f"{weights}: '{name}' cannot be the same parameter as '{owner}'.")
    for name, tensor in expected.items():
        if name in ties:
            continue
        if name not in tensors:
            raise InputError(f"{weights} has no tensor '{name}', which the model needs.")
        if tensors[name].shape != tensor.shape:
            raise InputError(f"{weights}: '{name}' is {list(tensors[name].shape)}, the plan asks {list(tensor.shape)}.")
    surplus = sorted(set(tensors) - set(expected))
    if surplus:
        raise InputError(f"{weights} holds tensor '{surplus[0]}', which the model does not have.")
    module.load_state_dict(tensors, assign=True, strict=False)
    tie(module, ties)
    check_finite(module, str(weights))
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def read_tensors(weights: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file; InputError where it is missing or damaged.

    Each gets memory of its own: products of tensors that lie askew in the mapped file round differently.
    """
    try:
        with safe_open(weights, "pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise InputError(f"{weights} cannot be read as safetensors: {error}.") from error
