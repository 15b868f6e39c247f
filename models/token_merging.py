"""Token merging: blocks of an image encoder that hand on fewer tokens than they are given.

Between attention and feed-forward, the ``r`` tokens that are most like another are averaged with it. Sizes are fixed by
``r`` alone, so that graphs have static shapes; what comes after the blocks sees every token again, each merged one in
the place of all that it was made of. The record is plain data: ``r`` of every block.

Source: Token Merging: Your ViT But Faster, Bolya et al. 2023 (arXiv 2210.09461)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UnavailableError
from .families import Attention, Blocks

SPECIAL = ("cls_token", "distillation_token")
"""Parameters that are put before the patches as tokens; those are never merged."""


def most(tokens: int, special: int) -> int:
    """How many of ``tokens`` can be merged at once: one of every pair."""
    return max((tokens - special) // 2, 0)


def assignment(keys: Tensor, r: int, special: int) -> Tensor:
    """Bipartite soft matching: where each token goes when ``r`` are merged, int64 [batch, tokens] below tokens - r.

    ``keys`` [batch, tokens, width] say what is alike, by cosine. Tokens are sources and destinations in turn, the first
    ``special`` neither; each source has its most alike destination, and the ``r`` sources most alike theirs go there.
    The others keep their order.
    """
    tokens = keys.shape[1]
    first = special + special % 2
    second = special + 1 - special % 2
    unit = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    alike, partner = (unit[:, first::2] @ unit[:, second::2].transpose(1, 2)).max(dim=-1)
    going = alike.topk(r, dim=-1).indices
    source, destination = first + 2 * going, second + 2 * partner.gather(1, going)
    stays = torch.ones_like(keys[..., 0], dtype=torch.long).scatter(1, source, torch.zeros_like(source))
    place = stays.cumsum(dim=1) - 1
    assert place.shape[1] == tokens
    return place.scatter(1, source, place.gather(1, destination))


def average(x: Tensor, sizes: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean, weighted by ``sizes`` [batch, tokens], of the tokens of ``x`` [batch, tokens, width] that go to each of
    ``count`` places, and what these weigh. A product with the matrix of who goes where: it runs in every runtime."""
    here = torch.arange(count, device=x.device)[:, None] == places[:, None, :]
    share = here.to(x.dtype) * sizes[:, None, :]
    weight = share.sum(dim=-1)
    return share @ x / weight[..., None], weight


class Tokens:
    """What the blocks of one stack know of their tokens within a forward pass."""

    sizes: Tensor | None = None
    """How many of the first block's tokens each one stands for, [batch, tokens]; None where all are single."""
    places: Tensor | None = None
    """Where each of the first block's tokens is now, int64 [batch, tokens]."""

    def reset(self) -> None:
        self.sizes = self.places = None


class Merge(nn.Module):
    """Merges ``r`` tokens of [batch, tokens, width]; keys are [batch, tokens, heads * key_width].

    Their sum over the heads says what is alike: a cosine does not see that it is not the mean.
    """

    def __init__(self, r: int, special: int, key_width: int, tokens: Tokens) -> None:
        super().__init__()
        self.r, self.special, self.key_width, self.tokens = r, special, key_width, tokens

    def forward(self, x: Tensor, keys: Tensor) -> Tensor:
        if not self.r:
            return x
        now = x.shape[1]
        if self.r > most(now, self.special):
            raise InputError(
                f"Of {now} tokens, {self.special} of them special, {most(now, self.special)} can be merged, "
                f"not {self.r}."
            )
        places = assignment(keys.reshape(*keys.shape[:-1], -1, self.key_width).sum(dim=-2), self.r, self.special)
        sizes = torch.ones_like(x[..., 0]) if self.tokens.sizes is None else self.tokens.sizes
        x, self.tokens.sizes = average(x, sizes, places, now - self.r)
        before = self.tokens.places
        self.tokens.places = places if before is None else places.gather(1, before)
        return x

    def macs(self, given: Sequence[int]) -> int:
        """Multiply-accumulates on an input of this shape: who is alike, and the average."""
        rows, tokens, width = given
        pairs = len(range(self.special + self.special % 2, tokens, 2)) * len(
            range(self.special + 1 - self.special % 2, tokens, 2)
        )
        return rows * (pairs * self.key_width + (tokens - self.r) * tokens * width) if self.r else 0

    def extra_repr(self) -> str:
        return f"r={self.r}"


class MergingBlock(nn.Module):
    """A pre-norm block that merges tokens half way; its parts keep their names.

    Attention is proportional to what tokens stand for: the logarithm of their size is added to its scores.
    """

    def __init__(self, block: nn.Module, declared: Blocks, r: int, special: int, tokens: Tokens) -> None:
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.declared = declared
        holder = block.get_submodule(self.attention_names.module)
        self.merging = Merge(r, special, int(getattr(holder, self.attention_names.head_dim)), tokens)
        self.added = nn.Identity()
        self.first = self.last = False
        self.train(block.training)

    @property
    def attention_names(self) -> Attention:
        return self.declared.attentions[0]

    @property
    def reshapes(self) -> bool:
        """Whether it gives another number of tokens than it is given."""
        return self.last or self.merging.r > 0

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """As the block's own; the mask, which in an image hides nothing, is of the tokens before they were merged."""
        tokens = self.merging.tokens
        if self.first:
            tokens.reset()
        bias = None if tokens.sizes is None else tokens.sizes.log()[:, None, None]
        keys: list[Tensor] = []
        watch = self.get_submodule(self.attention_names.key).register_forward_hook(lambda _, __, out: keys.append(out))
        try:
            x = x + self._branch(0, x, attention_mask=bias, **options)
        finally:
            watch.remove()
        x = self.merging(x, keys[0])
        x = self.added(x + self._branch(1, x))
        if self.last and tokens.places is not None:
            x = x.gather(1, tokens.places[..., None].expand(-1, -1, x.shape[-1]))
        return x

    def _branch(self, number: int, x: Tensor, **options: Any) -> Tensor:
        for name in self.declared.branches[number]:
            if name == self.attention_names.module:
                x = self.get_submodule(name)(x, **options)[0]
            else:
                x = self.get_submodule(name)(x)
        return x


def install(module: nn.Module, stacks: Sequence[tuple[Blocks, str, nn.ModuleList]], merged: Sequence[Any]) -> None:
    """Let the blocks of ``module``, whose lists are ``stacks``, merge ``merged`` tokens each.

    Raises UnavailableError where their kind of block cannot, InputError where the numbers make no sense.
    """
    if len(stacks) != 1 or not stacks[0][0].branches:
        raise UnavailableError("Tokens can be merged in ViT, DeiT and DINOv2 only.")
    declared, path, blocks = stacks[0]
    if len(merged) != len(blocks) or any(type(r) is not int or r < 0 for r in merged):
        raise InputError(f"The tokens to merge must be {len(blocks)} numbers from 0 on, one a block, not {merged!r}.")
    special = sum(p.shape[1] for name, p in module.named_parameters() if name.rpartition(".")[2] in SPECIAL)
    tokens = Tokens()
    made = nn.ModuleList(
        MergingBlock(block, declared, r, special, tokens) for block, r in zip(blocks, merged, strict=True)
    )
    module.set_submodule(path, made)
    mark(made)


def mark(blocks: nn.ModuleList) -> None:
    """Tell the first and the last of blocks that merge tokens that they are."""
    for place, block in enumerate(blocks):
        if isinstance(block, MergingBlock):
            block.first, block.last = place == 0, place == len(blocks) - 1


@contextmanager
def unmerged(*modules: nn.Module) -> Iterator[None]:
    """Within the context no block of ``modules`` merges tokens: position by position, they can be compared."""
    merges = [block.merging for module in modules for block in module.modules() if isinstance(block, MergingBlock)]
    before = [merge.r for merge in merges]
    for merge in merges:
        merge.r = 0
    try:
        yield
    finally:
        for merge, r in zip(merges, before, strict=True):
            merge.r = r


def merged(module: nn.Module) -> list[int]:
    """How many tokens each block merges; empty where none does."""
    return [block.merging.r for block in module.modules() if isinstance(block, MergingBlock)]
