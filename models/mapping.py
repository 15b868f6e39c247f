"""Mapping: a family's declaration read against a real module gives its structure, and is kept true after surgery."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnavailableError
from ..plan import PruningPlan
from . import generic
from . import hidden as stream
from .counts import Call, attention_macs, layer_macs, observe, row_axes
from .families import Attention, Blocks, Family
from .layers import GroupedLinear, in_features, matrix, out_features
from .low_rank import holder as held_by
from .structure import Cut, Site, Stack, Structure
from .token_merging import MergingBlock, mark

Calls = Mapping[str, list[Call]]


def structure(
    module: nn.Module, family: Family, example: Mapping[str, Tensor] | None, before: Structure | None = None
) -> Structure:
    """The structure of ``module`` as it is now, which may be known from what it was ``before`` pruning.

    MACs are those of ``example``, one row; without it (a module on the meta device) they are zero.
    """
    if not family.blocks:
        assert example is not None
        return generic.structure(module, example, before)
    calls: Calls = observe(module, example) if example is not None else {}
    stacks: list[Stack] = []
    sites: list[Site] = []
    for declared, path, blocks in block_lists(module, family):
        stacks.append(Stack(path, sum(stack.count for stack in stacks), len(blocks), declared.shared))
        for layer, block in zip(stacks[-1].layers, blocks, strict=True):
            sites += _sites(module, declared, f"{path}.{layer - stacks[-1].start}", block, layer, calls)
    if not family.model_types and example is not None:  # modules of a user's own may put the sequence first
        axes = row_axes(module, example, {site.consumer for site in sites})
        sites = [replace(site, row_axis=axes.get(site.consumer, 0)) for site in sites]
    products = sum(_products(module, a, prefix, calls) for a, prefix, _ in attentions(module, family))
    total = sum(layer_macs(module.get_submodule(name), made) for name, made in calls.items()) + products
    attention, _, block = next(attentions(module, family))
    hidden = out_features(block.get_submodule(attention.output))
    if family.hidden:
        known = before.find(stream.KIND, stream.LAYER) if before else None
        sites.append(stream.site(module, stacks, sites, hidden, calls, known))
    return Structure(family.name, tuple(stacks), tuple(sites), hidden, total, family.notes)


def block_lists(module: nn.Module, family: Family) -> list[tuple[Blocks, str, nn.ModuleList]]:
    """Every list of blocks with its declaration and path, in the order of the declarations.

    Raises UnavailableError where there is none.
    """
    if not family.blocks:
        return []
    found = [
        (declared, path, child)
        for declared in family.blocks
        for path, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and len(child) and re.search(_pattern(declared.path), path)
    ]
    if not found:
        wanted = ", ".join(f"'{declared.path}'" for declared in family.blocks)
        raise UnavailableError(f"No list of blocks {wanted} was found in this {family.name} model.")
    return found


def _pattern(path: str) -> str:
    return r"(^|\.)" + re.escape(path).replace(r"\*", r"\d+") + "$"


def attentions(module: nn.Module, family: Family) -> Iterator[tuple[Attention, str, nn.Module]]:
    """Every attention with its block's path and the block."""
    for declared, path, blocks in block_lists(module, family):
        for place, block in enumerate(blocks):
            for attention in declared.attentions:
                yield attention, f"{path}.{place}", block


def _sites(  # noqa: PLR0917
    module: nn.Module, declared: Blocks, prefix: str, block: nn.Module, layer: int, calls: Calls
) -> list[Site]:
    sites: list[Site] = []
    for attention in declared.attentions:
        sites += _attention_sites(module, attention, prefix, block, layer, calls)
    ffn = declared.ffn
    inputs = [f"{prefix}.{name}" for name in ffn.inputs if _has(block, name)]
    count = in_features(block.get_submodule(ffn.output))
    if count:
        cuts = (*(Cut(name, "out", 1) for name in inputs), Cut(f"{prefix}.{ffn.output}", "in", 1))
        sites.append(
            _site(
                module, calls, cuts, 0, kind="ffn", layer=layer, count=count, block=prefix,
                sum_at=_join(prefix, "added" if isinstance(block, MergingBlock) else ffn.sum_at),
                scaled_by=_scale(block, prefix, ffn.scaled_by),
            )
        )  # fmt: skip
    if not declared.shared and not (isinstance(block, MergingBlock) and block.reshapes):
        inside = sum(layer_macs(module.get_submodule(n), c) for n, c in calls.items() if n.startswith(f"{prefix}."))
        inside += sum(_products(module, attention, prefix, calls) for attention in declared.attentions)
        moved = [block.get_submodule(name) for name in declared.moves if ":" not in name and _has(block, name)]
        params = sum(p.numel() for p in block.parameters()) - sum(p.numel() for m in moved for p in m.parameters())
        sites.append(Site("block", layer, 1, block=prefix, params=params, macs=inside))
    return sites


def _attention_sites(  # noqa: PLR0917
    module: nn.Module, attention: Attention, prefix: str, block: nn.Module, layer: int, calls: Calls
) -> list[Site]:
    holder: Any = block.get_submodule(attention.module)
    head_dim = int(getattr(holder, attention.head_dim))
    query, key = block.get_submodule(attention.query), block.get_submodule(attention.key)
    output = f"{prefix}.{attention.output}"
    heads = in_features(block.get_submodule(attention.output)) // head_dim
    fused = attention.query == attention.key
    rows = out_features(query) // 3
    grouped = _is_grouped(attention, holder)
    coupled = (attention.query,) if fused or grouped else (attention.query, attention.key, attention.value)
    tables = [name for name in attention.tables if _has_parameter(block, name)]
    more = [name for name in attention.more if _has(block, name)]
    offsets = (0, rows, 2 * rows) if fused else (0,)
    cuts = (
        *(Cut(f"{prefix}.{name}", "out", head_dim, offsets) for name in coupled),
        *(Cut(f"{prefix}.{name}", "out", head_dim) for name in more),
        *(Cut(f"{prefix}.{name}", "out", 1) for name in tables),
        Cut(output, "in", head_dim),
    )
    facts: dict[str, Any] = {
        "layer": layer,
        "block": prefix,
        "sum_at": _join(prefix, "merging" if isinstance(block, MergingBlock) else attention.sum_at),
        "scaled_by": _scale(block, prefix, attention.scaled_by),
    }
    products = _products(module, attention, prefix, calls) // heads
    head = _site(module, calls, cuts, products, kind=attention.kind, count=heads, **facts)
    if not grouped:
        return [head]
    kv_heads = out_features(key) // head_dim
    last = block.get_submodule(held_by(block, attention.key, "out"))
    owner = last.groups if isinstance(last, GroupedLinear) else tuple(i // (heads // kv_heads) for i in range(heads))
    own = tuple(Cut(f"{prefix}.{name}", "out", head_dim) for name in (attention.key, attention.value))
    kv = _site(module, calls, own, 0, kind="kv", count=kv_heads, gates=cuts[-1:], owner=owner, **facts)
    share = heads / kv_heads  # a group takes its query heads along; on average where they are unequal
    along = {"params": round(kv.params + share * head.params), "macs": round(kv.macs + share * head.macs)}
    return [head, Site(**{**vars(kv), **along})]


def _site(module: nn.Module, calls: Calls, cuts: tuple[Cut, ...], extra_macs: int, **facts: Any) -> Site:
    """A site with the costs of one of its units: the parameters in its cuts, and the products they take part in.

    A cut through a factored layer is one through the factor that holds the features.
    """
    params = macs = 0
    cuts = tuple(_held(module, cut) for cut in cuts)
    if "gates" in facts:
        facts["gates"] = tuple(_held(module, cut) for cut in facts["gates"])
    for cut in cuts:
        width = cut.width * len(cut.offsets)
        table = _parameter(module, cut.layer)
        if table is not None:
            params += table.numel() // table.shape[-1] * width
            continue
        layer = module.get_submodule(cut.layer)
        if isinstance(layer, nn.Embedding):
            params += layer.num_embeddings * width
            continue
        weight = matrix(layer)
        across = weight.shape[1] if cut.side == "out" else weight.shape[0]
        params += width * across
        if cut.side == "out" and layer.bias is not None:
            params += width
        used = calls.get(cut.layer, [])
        macs += layer_macs(layer, used) * width // weight.shape[0 if cut.side == "out" else 1]
    facts.setdefault("gates", tuple(cut for cut in cuts if cut.side == "in"))
    return Site(cuts=cuts, params=params, macs=macs + extra_macs, **facts)


def _held(module: nn.Module, cut: Cut) -> Cut:
    return cut if _has_parameter(module, cut.layer) else replace(cut, layer=held_by(module, cut.layer, cut.side))


def _products(module: nn.Module, attention: Attention, prefix: str, calls: Calls) -> int:
    """Multiply-accumulates of an attention's own products, over all of its heads."""
    query, key = (calls.get(held_by(module, f"{prefix}.{name}", "in"), []) for name in (attention.query, attention.key))
    if not query or not key:
        return 0
    names = [f"{prefix}.{name}" for name in attention.more if _has(module, f"{prefix}.{name}")]
    more = [call for name in names for call in calls.get(held_by(module, name, "in"), [])]
    return attention_macs(query, key, more) * in_features(module.get_submodule(f"{prefix}.{attention.output}"))


def _is_grouped(attention: Attention, holder: Any) -> bool:
    if not attention.groups:
        return False
    config = holder.config
    return int(config.num_attention_heads) != int(config.num_key_value_heads)


def _has(block: nn.Module, name: str) -> bool:
    try:
        block.get_submodule(name)
    except AttributeError:
        return False
    return True


def _has_parameter(block: nn.Module, name: str) -> bool:
    return _parameter(block, name) is not None


def _parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    try:
        return module.get_parameter(name)
    except AttributeError:
        return None


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if name else ""


def _scale(block: nn.Module, prefix: str, name: str) -> str:
    return _join(prefix, name) if name and _has_parameter(block, name) else ""


# ---- after surgery


def settle(module: nn.Module, family: Family, before: Structure, plan: PruningPlan) -> None:
    """Make every attribute that a forward pass reads agree with the layers that ``plan`` has left.

    ``before`` is the structure that the plan was for; blocks are still all there.
    """
    layer = 0
    for declared, _, blocks in block_lists(module, family):
        for block in blocks:
            if layer not in plan.blocks:
                for attention in declared.attentions:
                    _settle_attention(block, attention, before, plan, layer)
                if declared.ffn.width:
                    path, _, name = declared.ffn.width.partition(":")
                    setattr(block.get_submodule(path), name, in_features(block.get_submodule(declared.ffn.output)))
            layer += 1


def _settle_attention(block: nn.Module, attention: Attention, before: Structure, plan: PruningPlan, layer: int) -> None:
    holder: Any = block.get_submodule(attention.module)
    head_dim = int(getattr(holder, attention.head_dim))
    heads = in_features(block.get_submodule(attention.output)) // head_dim
    if attention.num_heads:
        setattr(holder, attention.num_heads, heads)
    if attention.width:
        setattr(holder, attention.width, heads * head_dim)
    gone = set(plan.indices(attention.kind, layer))
    if attention.bias in {"given", "made"} and gone:
        select_bias(holder, [i for i in range(before.site(attention.kind, layer).count) if i not in gone])
    elif attention.bias == "none":
        setattr(holder, attention.num_heads, 1)  # it makes a bias of zeros for its heads; one row serves any number
    groups = before.find("kv", layer)
    if groups is not None and gone:
        _regroup(block, attention, groups.parts, gone, head_dim)


def _regroup(block: nn.Module, attention: Attention, parts: tuple[int, ...], gone: set[int], head_dim: int) -> None:
    """Point the query heads that are left at the key/value heads that are left."""
    left = [group for head, group in enumerate(parts) if head not in gone]
    number = {group: place for place, group in enumerate(sorted(set(left)))}
    owner = [number[group] for group in left]
    share = len(owner) // len(number)
    regular = owner == [place // share for place in range(len(owner))]
    setattr(block.get_submodule(attention.module), attention.groups, share if regular else 1)
    for name in (held_by(block, attention.key, "out"), held_by(block, attention.value, "out")):
        layer = block.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        if regular and isinstance(layer, GroupedLinear):
            block.set_submodule(name, layer.plain())
        elif not regular:
            block.set_submodule(name, GroupedLinear.of(layer, owner, head_dim))


def drop_blocks(module: nn.Module, family: Family, plan: PruningPlan) -> None:
    """Take the plan's blocks out of their lists, and renumber those that stay."""
    start = 0
    for declared, path, blocks in block_lists(module, family):
        stay = [place for place in range(len(blocks)) if start + place not in plan.blocks]
        start += len(blocks)
        if len(stay) == len(blocks):
            continue
        if 0 not in stay:
            _move(blocks[0], blocks[stay[0]], declared.moves)
        for place, was in enumerate(stay):
            for child in blocks[was].modules():
                if getattr(child, "layer_idx", None) == was:
                    child.layer_idx = place  # type: ignore[assignment] # the cache's slot, an attribute of transformers
        left = nn.ModuleList(blocks[place] for place in stay)
        module.set_submodule(path, left)
        mark(left)
        _shorten(module, declared, path, stay)


def _move(first: nn.Module, heir: nn.Module, names: tuple[str, ...]) -> None:
    """Hand what the first block holds for all to ``heir``: a module, or an attribute written ``module:name``."""
    for name in names:
        path, _, attribute = name.partition(":")
        if attribute:
            setattr(heir.get_submodule(path), attribute, getattr(first.get_submodule(path), attribute))
        else:
            parent, _, last = path.rpartition(".")
            heir.get_submodule(parent).add_module(last, first.get_submodule(path))


def _shorten(module: nn.Module, declared: Blocks, path: str, stay: list[int]) -> None:
    """Caches and masks are made by the configuration: it must speak of the blocks that are left."""
    own: Any = getattr(module.get_submodule(path.rpartition(".")[0]), "config", getattr(module, "config", None))
    if own is None:
        return
    # A stack with a configuration of its own calls its depth by the common name; the model's, from which caches are
    # made, then stays as it is: surplus layers of a cache cost nothing.
    field = declared.config.get("block") if own is getattr(module, "config", None) else "num_hidden_layers"
    if field:
        setattr(own, field, len(stay))
    types = getattr(own, "layer_types", None)
    if types:
        own.layer_types = [types[place] for place in stay]


# ---- a bias of relative positions that all layers share


def select_bias(holder: nn.Module, kept: list[int]) -> None:
    """Let an attention use only its own heads' entries of a ``position_bias`` [1, all heads, query, key].

    It hands on the whole bias, for the layers after it have heads of their own.
    """
    earlier = getattr(holder, "kept_heads", None)
    holder.kept_heads = tuple(earlier[i] for i in kept) if earlier else tuple(kept)  # type: ignore[assignment]
    if earlier is None:
        holder.register_forward_pre_hook(_bias_before, with_kwargs=True)
        holder.register_forward_hook(_bias_after, with_kwargs=True)


def _bias_before(holder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    whole = kwargs.get("position_bias", args[2] if len(args) > 2 else None)
    if whole is None:  # the first block makes it
        tokens = args[0].shape[1]
        cache, mask = kwargs.get("past_key_values"), kwargs.get("mask")
        past = cache.get_seq_length(holder.layer_idx) if cache is not None else 0
        keys = mask.shape[-1] if mask is not None else past + tokens
        whole = holder.compute_bias(tokens, keys, device=args[0].device, past_seen_tokens=past)
    kept = whole[:, torch.tensor(holder.kept_heads, device=whole.device)]
    holder.whole_bias = whole
    if len(args) > 2:
        return (*args[:2], kept, *args[3:]), kwargs
    return args, {**kwargs, "position_bias": kept}


def _bias_after(holder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    whole, holder.whole_bias = holder.whole_bias, None
    if isinstance(output, tuple) and len(output) == 3:
        return (output[0], whole, output[2])
    return output
