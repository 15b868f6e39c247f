"""Layers as surgery sees them: a matrix [out, in], whatever the class, from which features can be dropped.

torch-pruning slices what it knows; transformers' ``Conv1D`` (a linear layer with the transposed weight) is added here,
and the two modules that pruning leaves where no stock layer says what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.pruner.function import PrunerBox
from transformers.pytorch_utils import Conv1D

from .counts import CONVOLUTIONS


class GroupedLinear(nn.Linear):
    """A key or value projection whose heads serve unequal numbers of query heads: each is repeated for its own.

    ``groups`` names for every query head, in order, the key/value head that it reads; the output has one part of
    ``head_dim`` features a query head. The parameters are those of the plain layer.
    """

    groups: tuple[int, ...] = ()
    head_dim: int = 0

    @classmethod
    def of(cls, linear: nn.Linear, groups: Sequence[int], head_dim: int) -> GroupedLinear:
        """``linear`` with its parameters, not copied."""
        grouped = cls(0, 0, bias=False)
        _take_over(grouped, linear)
        grouped.groups, grouped.head_dim = tuple(groups), head_dim
        return grouped

    def plain(self) -> nn.Linear:
        """The layer without the repetition, with the same parameters."""
        linear = nn.Linear(0, 0, bias=False)
        _take_over(linear, self)
        return linear

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of nn.Linear
        features: Tensor = super().forward(input)
        heads = features.reshape(*features.shape[:-1], -1, self.head_dim)
        return heads.index_select(-2, torch.tensor(self.groups, device=input.device)).flatten(-2)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


def _take_over(layer: nn.Linear, other: nn.Linear) -> None:
    layer.in_features, layer.out_features = other.in_features, other.out_features
    layer.weight, layer.bias = other.weight, other.bias
    layer.train(other.training)


class Bias(nn.Module):
    """What is left of a linear layer that has lost all of its inputs: its bias, or zeros, at every position."""

    def __init__(self, bias: nn.Parameter | None, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = 0, out_features
        self.weight = nn.Parameter(torch.empty(out_features, 0))
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.out_features)
        return x.new_zeros(shape) if self.bias is None else self.bias.expand(shape)

    def extra_repr(self) -> str:
        return f"out_features={self.out_features}"


def in_features(layer: nn.Module) -> int:
    """Columns of the layer's matrix."""
    return int(layer.nx if isinstance(layer, Conv1D) else getattr(layer, "in_features", 0) or _channels(layer)[1])


def out_features(layer: nn.Module) -> int:
    """Rows of the layer's matrix."""
    return int(layer.nf if isinstance(layer, Conv1D) else getattr(layer, "out_features", 0) or _channels(layer)[0])


def _channels(layer: Any) -> tuple[int, int]:
    return int(getattr(layer, "out_channels", 0)), int(getattr(layer, "in_channels", 0))


def matrix(layer: nn.Module) -> Tensor:
    """The layer's weight as [out, in]; a view, so that writing to it writes to the layer.

    A convolution has one column for each input channel and position of its window, a norm one column.
    """
    weight = layer.get_parameter("weight")
    if isinstance(layer, Conv1D):
        return weight.T
    return weight.flatten(1) if weight.dim() > 1 else weight[:, None]


def window(layer: nn.Module) -> int:
    """Columns of the matrix that one input feature owns: the positions of a convolution's window, else 1."""
    weight = layer.get_parameter("weight")
    return weight[0, 0].numel() if weight.dim() > 2 else 1


def columns(layer: Any, inputs: Tensor) -> Tensor:
    """What the layer's matrix multiplies at every position: ``inputs`` as [batch, …, columns of the matrix].

    The inputs of a linear layer are that already; those of a convolution [batch, channels, …] become the windows that
    it moves over them, [batch, positions, channels * window].
    """
    if not isinstance(layer, CONVOLUTIONS):
        return inputs
    dims = len(layer.kernel_size)
    spans = [step * (size - 1) + 1 for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
    sides = [((span - 1) // 2, span // 2) if layer.padding == "same" else (0, 0) for span in spans]
    if not isinstance(layer.padding, str):
        sides = [(width, width) for width in layer.padding]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = nn.functional.pad(inputs, [width for pair in sides[::-1] for width in pair], mode=mode)
    for axis in range(dims):
        windows = windows.unfold(axis + 2, spans[axis], layer.stride[axis])[..., :: layer.dilation[axis]]
    return windows.movedim(1, dims + 1).flatten(dims + 1).flatten(1, dims)


def drop(module: nn.Module, name: str, side: str, features: Sequence[int]) -> None:
    """Drop output (``side`` "out") or input ("in") features of the layer or of the parameter called ``name``.

    A layer that loses its last input becomes a :class:`Bias`.
    """
    parent, _, last = name.rpartition(".")
    owner: Any = module.get_submodule(parent)
    layer = getattr(owner, last)
    if isinstance(layer, nn.Parameter):  # a table with one column a unit
        setattr(owner, last, _without(layer, features, layer.dim() - 1))
    elif side == "in" and len(features) == in_features(layer):
        setattr(owner, last, Bias(layer.bias, out_features(layer)).to(layer.weight.device, layer.weight.dtype))
    elif isinstance(layer, Bias):
        left = layer.out_features - len(set(features))
        bias = None if layer.bias is None else _without(layer.bias, features, 0)
        setattr(owner, last, Bias(bias, left).to(layer.weight.device, layer.weight.dtype))
    elif isinstance(layer, nn.LayerNorm):  # torch-pruning 1.6.1 leaves the channels of a norm out of order
        layer.weight = _without(layer.weight, features, 0)
        layer.bias = None if layer.bias is None else _without(layer.bias, features, 0)
        layer.normalized_shape = tuple(layer.weight.shape)
    elif isinstance(layer, Conv1D):
        layer.weight = _without(layer.weight, features, 1 if side == "out" else 0)
        layer.nx, layer.nf = layer.weight.shape
        if side == "out":
            layer.bias = _without(layer.bias, features, 0)
    else:
        pruner = PrunerBox[tp.utils.module2type(layer)]
        prune = pruner.prune_out_channels if side == "out" else pruner.prune_in_channels
        prune(layer, list(features))


def _without(parameter: Tensor, features: Sequence[int], dim: int) -> nn.Parameter:
    gone = set(features)
    kept = [index for index in range(parameter.shape[dim]) if index not in gone]
    chosen = parameter.detach().index_select(dim, torch.tensor(kept, dtype=torch.long, device=parameter.device))
    return nn.Parameter(chosen, requires_grad=parameter.requires_grad)


def tied(module: nn.Module) -> dict[str, str]:
    """The names of parameters that are another one (an output layer that is the embedding), with that one's name."""
    first: dict[int, str] = {}
    return {
        name: first[id(parameter)]
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if first.setdefault(id(parameter), name) != name
    }


def tie(module: nn.Module, ties: Mapping[str, str]) -> None:
    """Make parameters one again: the inverse of :func:`tied`."""
    for name, owner in ties.items():
        parent, _, last = name.rpartition(".")
        setattr(module.get_submodule(parent), last, module.get_parameter(owner))


class SeparateAttention(nn.Module):
    """``nn.MultiheadAttention`` over one sequence, its projections apart, so that heads can be cut out.

    What ``nn.TransformerEncoderLayer`` asks of its attention before it takes its own fast path, which knows nothing of
    pruned widths, is answered so that it does not.
    """

    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, embed_dim: int, num_heads: int, *, bias: bool, batch_first: bool, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.batch_first, self.dropout = batch_first, dropout
        self.query, self.key, self.value, self.output = (nn.Linear(embed_dim, embed_dim, bias=bias) for _ in range(4))

    @classmethod
    def of(cls, attention: nn.MultiheadAttention) -> SeparateAttention:
        """One with the same weights, the same type and in the same mode."""
        assert attention.in_proj_weight is not None
        bias = attention.in_proj_bias is not None
        new = cls(
            attention.embed_dim,
            attention.num_heads,
            bias=bias,
            batch_first=attention.batch_first,
            dropout=attention.dropout,
        ).to(attention.in_proj_weight)
        with torch.no_grad():
            for layer, weight in zip((new.query, new.key, new.value), attention.in_proj_weight.chunk(3), strict=True):
                layer.weight.copy_(weight)
            new.output.weight.copy_(attention.out_proj.weight)
            if bias:
                parts = attention.in_proj_bias.chunk(3)
                for layer, values in zip((new.query, new.key, new.value), parts, strict=True):
                    layer.bias.copy_(values)
                new.output.bias.copy_(attention.out_proj.bias)
        return new.train(attention.training)

    def forward(  # noqa: PLR0917 - the arguments that nn.TransformerEncoderLayer passes
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attention over [batch, sequence, features] (or [sequence, batch, features]); the weights are not returned.

        ``key_padding_mask`` [batch, sequence] is True, or -inf, where a key is padding; ``attn_mask`` [query, key] or
        [batch * heads, query, key] likewise.
        """
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            layer(x).reshape(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        bias = _additive(key_padding_mask, q)
        bias = bias[:, None, None] if bias is not None else None
        mask = _additive(attn_mask, q)
        if mask is not None:
            mask = mask if mask.dim() == 2 else mask.reshape(len(q), -1, *mask.shape[-2:])
            bias = mask if bias is None else bias + mask
        mixed = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=self.dropout if self.training else 0.0
        )
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(-2))
        return (out if self.batch_first else out.transpose(0, 1)), None


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
