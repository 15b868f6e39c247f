"""Counts: what each layer of a module is given in one forward pass, and the multiply-accumulates that follow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .token_merging import Merge

Call = tuple[tuple[int, ...], tuple[int, ...]]
"""The shapes of a layer's input and output in one call; of a ``MultiheadAttention``, those of its queries and keys."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)


def beside(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``inputs`` on the device that holds the module's parameters."""
    like = next(module.parameters(), None)
    return {name: tensor if like is None else tensor.to(like.device) for name, tensor in inputs.items()}


def observe(module: nn.Module, example: Mapping[str, Tensor]) -> dict[str, list[Call]]:
    """The calls of every layer with a matrix while ``module`` runs on ``example``, by the layer's path."""
    calls: dict[str, list[Call]] = {}

    def note(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            result = output[0] if isinstance(output, tuple) else output
            if isinstance(layer, nn.MultiheadAttention):
                result = args[1]
            calls.setdefault(name, []).append((tuple(args[0].shape), tuple(result.shape)))

        return hook

    handles = [
        layer.register_forward_hook(note(name))
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D, nn.MultiheadAttention, Merge, *CONVOLUTIONS, *RECURRENT))
    ]
    try:
        with torch.no_grad():
            module(**beside(module, example))
    finally:
        for handle in handles:
            handle.remove()
    return calls


def row_axes(module: nn.Module, example: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, int]:
    """The axis that counts rows in the first input of every module in ``names``: the one that grows when ``example``,
    one row, comes twice. Empty where the model does not take two rows."""
    shapes: dict[str, list[torch.Size]] = {name: [] for name in names}
    handles = [
        module.get_submodule(name).register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape))
        for name, seen in shapes.items()
    ]
    example = beside(module, example)
    try:
        with torch.no_grad():
            module(**example)
            singles = {name: len(seen) for name, seen in shapes.items()}
            module(**{name: torch.cat([tensor, tensor]) for name, tensor in example.items()})
    except Exception:  # a user's own module may be written for one row
        return {}
    finally:
        for handle in handles:
            handle.remove()
    axes = {}
    for name, seen in shapes.items():
        pairs = zip(seen[0], seen[singles[name]], strict=False) if singles[name] else ()
        axes[name] = next((axis for axis, (one, two) in enumerate(pairs) if one != two), 0)
    return axes


def layer_macs(layer: Any, calls: Iterable[Call]) -> int:
    """Multiply-accumulates of one layer over its calls; biases, norms and activations are not counted."""
    total = 0
    for given, made in calls:
        if isinstance(layer, RECURRENT):
            steps = math.prod(given[:-1])
            total += steps * sum(weight.numel() for name, weight in layer.named_parameters() if "weight" in name)
        elif isinstance(layer, nn.MultiheadAttention):
            queries, keys = math.prod(given[:-1]), math.prod(made[:-1])
            tokens = made[1 if layer.batch_first else 0]
            total += layer.embed_dim**2 * 2 * (queries + keys) + 2 * queries * tokens * layer.embed_dim
        elif isinstance(layer, Merge):
            total += layer.macs(given)
        elif isinstance(layer, CONVOLUTIONS):
            transposed = getattr(layer, "transposed", False)
            positions = math.prod(given[2:]) if transposed else math.prod(made[2:])
            total += given[0] * positions * layer.weight.numel()
        else:
            total += math.prod(given[:-1]) * layer.weight.numel()
    return total


def attention_macs(queries: Iterable[Call], keys: Iterable[Call], more: Iterable[Call]) -> int:
    """Multiply-accumulates of one attention head per feature of its ``head_dim``.

    Every pair of query and key positions is multiplied twice, once for the scores and once for the values. A layer that
    is also called on something else than the tokens, or ``more`` layers, project relative positions: these are
    multiplied with all queries or keys once (DeBERTa, arXiv 2006.03654, equation 4).
    """
    tokens, others = _split(queries)
    keyed, other_keys = _split(keys)
    total = 0
    for (given, _), (seen, _) in zip(tokens, keyed, strict=False):
        rows, length, memory = math.prod(given[:-2]), given[-2], seen[-2]
        positions = sum(shape[-2] for shape, _ in (*others, *other_keys, *more))
        total += rows * (2 * length * memory + length * positions)
    return total


def _split(calls: Iterable[Call]) -> tuple[list[Call], list[Call]]:
    """The calls of the same shape as the first, and the others."""
    listed = list(calls)
    return [c for c in listed if c[0] == listed[0][0]], [c for c in listed if c[0] != listed[0][0]]
