"""Attention: where each head looks.

Every attention, whoever wrote it, ends in ``scaled_dot_product_attention`` or in a softmax over its scores. Both are
watched from outside, by torch's own function mode, while an attention's module runs: the model computes as it always
does, with the implementation that it has, and its probabilities are computed a second time where the fused product
keeps them to itself. They are summed up in parts of ``LIMIT`` entries and never stored.

Source  Clark et al. 2019, arXiv 1906.04341 (entropy, [SEP], distance); Xiao et al. 2023, arXiv 2309.17453, and Gu et
        al. 2024, arXiv 2410.10781 (sinks).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .. import families, mapping
from ..workload import Workload
from .tokens import Tokens

KEYS = (1, 4, 16)
"""Numbers of keys whose share of a query's mass is summed, the heaviest keys first."""
NEAR = 2
"""Tokens to either side that count as near."""
LOCAL, CAUSAL, SINK, ALIKE = 0.5, 0.01, 0.3, 0.9
"""A head is local where at least this share of its mass is near, causal where less than this is on later tokens, a sink
where at least this is on one position of each row; two heads are alike from this correlation on."""
LIMIT = 1 << 20
HIDDEN = -80.0
"""A bias as low as this hides a key: exp of it is below what float32 can add to 1 by thirty orders."""

PRODUCT = functional.scaled_dot_product_attention
SOFTMAX = (functional.softmax, torch.softmax, Tensor.softmax)


@dataclass(frozen=True)
class Maps:
    """The attention probabilities of one call, [batch, heads, queries, keys], made on demand."""

    shape: tuple[int, int, int, int]
    visible: Tensor
    """Bool [batch or 1, queries, keys]: which keys a query may see."""
    part: Callable[[slice], Tensor]
    """The probabilities of some of the queries."""


def of_product(  # noqa: PLR0917 - the arguments of scaled_dot_product_attention
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Maps:
    """The probabilities that ``scaled_dot_product_attention`` of these arguments uses."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(-2, -1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    batch, heads, length, keys = *query.shape[:3], key.shape[-1]
    if is_causal:
        attn_mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        visible, bias = torch.ones(1, length, keys, dtype=torch.bool, device=query.device), None
    else:
        mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        mask = mask.expand(*mask.shape[:2], length, keys)
        seen = mask if mask.dtype == torch.bool else mask > HIDDEN
        visible = seen.any(dim=1)
        bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf) if mask is seen else mask

    def part(queries: slice) -> Tensor:
        scores = query[:, :, queries] @ key * scale
        return (scores if bias is None else scores + bias[:, :, queries]).softmax(dim=-1)

    return Maps((batch, heads, length, keys), visible, part)


def of_softmax(scores: Tensor, probabilities: Tensor) -> Maps:
    """The probabilities that a softmax made of ``scores``, hidden keys having the least number as theirs."""
    visible = scores[:, 0] > torch.finfo(scores.dtype).min / 2
    batch, heads, length, keys = scores.shape
    return Maps((batch, heads, length, keys), visible, lambda queries: probabilities[:, :, queries])


class Heads:
    """Running sums over the maps of the heads of one attention."""

    def __init__(self, count: int, *, cross: bool) -> None:
        self.count, self.cross = count, cross
        self.queries = self.choosing = self.uniform = 0.0
        self.entropy, self.first, self.last, self.peak = torch.zeros(4, count, dtype=torch.float64)
        self.top = torch.zeros(count, len(KEYS), dtype=torch.float64)
        self.places = torch.zeros(count, 3, dtype=torch.float64)
        self.products = torch.zeros(count, count, dtype=torch.float64)

    def update(self, maps: Maps, real: Tensor | None) -> None:
        """Add the maps of one call; ``real`` [batch, queries] says which queries count."""
        batch, heads, length, keys = maps.shape
        seen = maps.visible.sum(dim=-1).expand(batch, length)
        counted = seen > 0 if real is None else (seen > 0) & real
        choosing = counted & (seen > 1)
        scale = torch.where(choosing, 1 / seen.clamp(min=2).double().log(), 0)
        self.queries += int(counted.sum())
        self.choosing += int(choosing.sum())
        self.uniform += float((1 / seen[counted].double()).sum())
        on_keys = torch.zeros(batch, heads, keys, dtype=torch.float64)
        step = max(1, LIMIT // (batch * heads * keys))
        for start in range(0, length, step):
            queries = slice(start, start + step)
            chosen = maps.part(queries).masked_fill(~counted[:, None, queries, None], 0)
            entropy = torch.special.entr(chosen).sum(dim=-1)
            self.entropy += (entropy * scale[:, None, queries]).sum(dim=(0, 2))
            ranked = np.sort(chosen.numpy(force=True), axis=-1)[..., -KEYS[-1] :]  # much faster than torch's topk
            heaviest = torch.from_numpy(ranked).sum(dim=(0, 2), dtype=torch.float64).flip(1).cumsum(dim=1)
            self.top += heaviest[:, [min(k, keys) - 1 for k in KEYS]]
            self.places += torch.einsum(
                "hqk,qkp->hp", chosen.sum(dim=0).double(), _places(start, chosen.shape[2], keys)
            )
            flat = chosen.flatten(2)
            self.products += (flat @ flat.transpose(1, 2)).sum(dim=0)
            on_keys += chosen.sum(dim=2)
        some = (maps.visible & counted[:, :, None]).any(dim=1)
        first, last = some.int().argmax(dim=-1), keys - 1 - some.flip(-1).int().argmax(dim=-1)
        rows = torch.arange(batch)
        self.first += on_keys[rows, :, first.expand(batch)].sum(dim=0)
        self.last += on_keys[rows, :, last.expand(batch)].sum(dim=0)
        self.peak += on_keys.amax(dim=-1).sum(dim=0)

    def similarity(self) -> Tensor:
        """Correlation [heads, heads] of what the heads' maps have beyond a uniform one, over all queries and keys."""
        beyond = self.products - self.uniform  # every row of a map sums to 1, and so does a uniform one
        scale = beyond.diagonal().clamp(min=1e-12).sqrt()
        return (beyond / scale / scale[:, None]).clamp(-1, 1)

    def to_json(self) -> dict[str, Any]:
        queries = max(self.queries, 1)
        similarity = self.similarity()
        later, near, distance = (self.places / queries).T.tolist()
        shares = {"first": self.first, "last": self.last, "peak": self.peak}
        heads: list[dict[str, Any]] = []
        for head in range(self.count):
            one: dict[str, Any] = {"head": head, "entropy": float(self.entropy[head]) / max(self.choosing, 1)}
            one["distance"] = None if self.cross else distance[head]
            one["top"] = {str(k): float(share) / queries for k, share in zip(KEYS, self.top[head], strict=True)}
            one |= {name: float(total[head]) / queries for name, total in shares.items()}
            one["later"] = None if self.cross else later[head]
            one["near"] = None if self.cross else near[head]
            one["causal"] = not self.cross and later[head] < CAUSAL
            one["local"] = not self.cross and near[head] >= LOCAL
            one["sink"] = one["peak"] >= SINK
            heads.append(one)
        pairs = (similarity >= ALIKE).triu(1).nonzero().tolist()
        return {"heads": heads, "similarity": similarity.tolist(), "alike": pairs}


def _places(first: int, queries: int, keys: int) -> Tensor:
    """For every query from ``first`` on and every key, float64 [queries, keys, 3]: whether the key comes later, whether
    it is near, how far it is."""
    apart = torch.arange(keys) - torch.arange(first, first + queries)[:, None]
    return torch.stack([apart > 0, apart.abs() <= NEAR, apart.abs()], dim=-1).double()


@dataclass(frozen=True)
class Place:
    """An attention of a model."""

    name: str
    stack: str
    layer: int
    kind: str
    heads: int


class Observer(TorchFunctionMode):
    """Sees every function of torch while it is entered, and takes note of those that make attention maps."""

    def __init__(self, places: list[Place], tokens: Tokens) -> None:
        super().__init__()
        self.places, self.tokens = places, tokens
        self.at_work: Place | None = None
        self.runs: Counter[str] = Counter()
        self.found: dict[tuple[Place, int], Heads] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.at_work is not None:
            with torch.no_grad():
                if func is PRODUCT:
                    self._see(self.at_work, of_product(*args, **(kwargs or {})))
                elif func in SOFTMAX and args and result.dim() == 4:
                    self._see(self.at_work, of_softmax(args[0], result))
        return result

    def _see(self, place: Place, maps: Maps) -> None:
        batch, heads, queries, keys = maps.shape
        if heads != place.heads:  # transformers folds the heads of a group into the one query of one-token rows
            return
        cross = place.kind == "cross_head"
        if not cross:
            self.tokens.saw(place.stack, maps.visible.any(dim=1).expand(batch, keys))
        run = self.runs[place.name]
        self.runs[place.name] += 1
        heads_of = self.found.setdefault((place, run), Heads(place.heads, cross=cross))
        heads_of.update(maps, self.tokens.mask(place.stack, batch, queries))

    def end_batch(self) -> None:
        self.runs.clear()

    def summary(self) -> dict[str, Any]:
        """``layers``: for each attention its ``layer``, ``stack``, ``kind`` and ``run`` (shared blocks run more than
        once), ``similarity`` of its heads [heads, heads], the pairs of heads that are ``alike``, and ``heads``.

        A head has: ``entropy`` of a query's probabilities over the log of the number of keys it sees, mean over the
        queries that see more than one; ``distance`` in tokens from query to key, mean by mass; ``top``, the share of
        mass on each query's 1, 4 and 16 heaviest keys; ``first``, ``last`` and ``peak``, the share of mass on a row's
        first token, on its last ([SEP], in BERT) and on its most attended one; ``later`` and ``near``, the share on
        later tokens and on those at most ``NEAR`` away; and what follows from them: ``causal``, ``local``, ``sink``.
        Positions mean nothing between two sequences: for cross-attention what speaks of them is None.
        """
        order = {place: number for number, place in enumerate(self.places)}
        listed = sorted(self.found.items(), key=lambda entry: (order[entry[0][0]], entry[0][1]))
        layers = [
            {"layer": place.layer, "stack": place.stack, "kind": place.kind, "run": run, **heads.to_json()}
            for (place, run), heads in listed
        ]
        limits = {"local": LOCAL, "causal": CAUSAL, "sink": SINK, "alike": ALIKE, "near": NEAR}
        return {"limits": limits, "layers": layers}

    def notes(self) -> list[str]:
        if not self.places:
            return ["no attention is known in this model, so there is nothing to say about heads"]
        seen = {place for place, _ in self.found}
        return [
            f"the attention {place.name} makes no map that can be seen" for place in self.places if place not in seen
        ]


Watching = TypeVar("Watching", bound=Observer)


@contextmanager
def observed(workload: Workload, tokens: Tokens, kind: type[Watching]) -> Iterator[Watching]:
    """Within the context an observer of this ``kind`` sees the maps of every attention of the model."""
    module, structure = workload.module, workload.structure
    stack_of = {layer: stack.path for stack in structure.stacks for layer in stack.layers}
    sites = {(site.block, site.kind): site for site in structure.sites}
    observer = kind([], tokens)
    with ExitStack() as stack:
        for attention, prefix, block in mapping.attentions(module, families.get(structure.family)):
            site = sites[prefix, attention.kind]
            name = f"{prefix}.{attention.module}"
            place = Place(name, stack_of[site.layer], site.layer, site.kind, site.count)
            observer.places.append(place)
            for handle in _hooks(block.get_submodule(attention.module), observer, place):
                stack.callback(handle.remove)
        yield stack.enter_context(observer)


def _hooks(module: nn.Module, observer: Observer, place: Place) -> list[Any]:
    def before(*_: Any) -> None:
        observer.at_work = place

    def after(*_: Any) -> None:
        observer.at_work = None

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
