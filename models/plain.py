"""Plain: the configuration that says what is left of a pruned model, for a folder that loads without edgepress."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import InputError, UsageError
from . import low_rank, mapping, token_merging
from .families import Blocks
from .layers import GroupedLinear
from .skeleton import POOLED, Skeleton
from .structure import Site, Stack
from .workload import Workload


def plain_skeleton(workload: Workload) -> Skeleton:
    """A skeleton that has the pruned module's shapes without a plan.

    Raises UsageError where layers differ, or where the architecture's configuration has no field for what went.
    """
    if workload.skeleton.is_function:
        raise UsageError(f"{workload.name} was made by a function: it has no configuration to say its widths in.")
    family = workload.skeleton.family
    config = copy.deepcopy(dict(workload.skeleton.config))
    if workload.skeleton.architecture != POOLED:
        config["architectures"] = [workload.skeleton.architecture]
    before = mapping.structure(workload.skeleton.build(), family, None)
    module: Any = workload.module
    if any(isinstance(layer, GroupedLinear) for layer in module.modules()):
        raise UsageError(
            "Key/value groups serve unequal numbers of heads, which no configuration can say: prune a model with equal "
            "ones, and with --uniform, which takes as many heads from each."
        )
    if low_rank.ranks(module):
        raise UsageError(f"Layers of {workload.name} are factored, which no configuration can say.")
    if token_merging.merged(module):
        raise UsageError(f"{workload.name} merges tokens, which no configuration can say.")
    for (declared, path, blocks), was, now in zip(
        mapping.block_lists(module, family), before.stacks, workload.structure.stacks, strict=True
    ):
        part = _part(config, module, path)
        for kind in ("head", "kv", "cross_head", "ffn"):
            sites = [site for site in workload.structure.of_kind(kind) if site.layer in now.layers]
            old = {site.count for site in before.of_kind(kind) if site.layer in was.layers}
            counts = {site.count for site in sites} | ({0} if len(sites) < len(blocks) and old else set())
            if len(counts) > 1:
                listed = ", ".join(map(str, sorted(counts)))
                raise UsageError(
                    f"The {kind} counts of {path} differ between layers ({listed}): prune a model with equal ones, and "
                    f"with --uniform."
                )
            if counts and counts != old:
                _say(part, declared, sites, kind, family.name)
        _depth(part, declared, was, now, family.name)
        types = getattr(getattr(module.get_submodule(path.rpartition(".")[0]), "config", None), "layer_types", None)
        if types:
            part["layer_types"] = list(types)
    return _proven(replace(workload.skeleton, config=config), workload)


def _part(config: dict[str, Any], module: Any, path: str) -> dict[str, Any]:
    """The part of the configuration that a stack is built from: one of its own, or the model's whole."""
    own = getattr(module.get_submodule(path.rpartition(".")[0]), "config", None)
    for name in ("text_config", "vision_config"):
        if own is not None and getattr(module.config, name, None) is own:
            nested: dict[str, Any] = config[name]
            return nested
    return config


def _say(part: dict[str, Any], declared: Blocks, sites: list[Site], kind: str, family: str) -> None:
    field = declared.config.get(kind)
    if field is None:
        raise UsageError(f"The configuration of a {family} model has no field for {kind} counts apart from its width.")
    count, width = sites[0].count, sites[0].gates[0].width
    if field == "mlp_ratio":
        hidden = int(part["hidden_size"])
        if count % hidden:
            raise UsageError(f"A {family} model has feed-forward widths in multiples of {hidden} only, not {count}.")
        count //= hidden
    part[field] = count
    if "head_dim" in declared.config and kind in {"head", "kv"}:
        part[declared.config["head_dim"]] = width


def _depth(part: dict[str, Any], declared: Blocks, was: Stack, now: Stack, family: str) -> None:
    if was.count == now.count:
        return
    field = declared.config.get("block")
    if field is None:
        raise UsageError(f"The configuration of a {family} model has no field for fewer blocks in {was.path}.")
    part[field] = now.count


def _proven(skeleton: Skeleton, workload: Workload) -> Skeleton:
    """``skeleton``, once its module has been built and has exactly the pruned module's shapes."""
    try:
        built = _shapes(skeleton.build())
    except (InputError, ValueError) as error:
        raise UsageError(
            f"The pruned widths make no valid configuration: {str(error).splitlines()[-1].strip()}"
        ) from error
    ours = _shapes(workload.module)
    if built != ours:
        name = next(name for name in (*ours, *built) if ours.get(name) != built.get(name))
        raise UsageError(f"No configuration says what is left: '{name}' is {ours.get(name)}, not {built.get(name)}.")
    return skeleton


def _shapes(module: Any) -> Mapping[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
