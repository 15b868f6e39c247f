"""Keys and values of a past as inputs and outputs: a causal language model as one step of its generation.

One graph reads a prompt, after a past of no tokens, and then token after token. It gives back the keys and values of
all it has read, which are the past of the next step. Positions are counted in the mask, so rows can be padded on the
left. A layer with a sliding window keeps all of its past too, and masks what it does not look at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from ..errors import UnavailableError, UsageError
from ..models import tasks
from ..models.examples import longest
from ..models.workload import PAST, Axis, Workload

PRESENT = "present."
CROSS = ".encoder."
"""What the names of keys and values have in them that an encoder gives, and no step changes."""
TRACED = (5, 7)
"""Tokens of the past and after it that the graph is traced with."""


def with_past(workload: Workload, length: int) -> Workload:
    """``workload`` as a step after a past, for ``length`` tokens at most, those of the past and the new ones together.

    The keys and values [batch, key/value heads, past tokens, size of a head] are among its inputs, of the sizes that
    each layer has. Raises UnavailableError for what is no causal language model, UsageError where ``length`` is more
    than it takes.
    """
    if workload.task is not tasks.LANGUAGE or workload.skeleton.architecture.endswith("ForMaskedLM"):
        raise UnavailableError(
            f"{workload.name} is a {workload.skeleton.architecture}; only causal language models have keys and values "
            "that can be kept."
        )
    check(workload, length, longest(workload.module.config))
    past, new = TRACED
    ids = workload.example["input_ids"][:1, :1].expand(1, past + new).contiguous()
    made = empty()
    with torch.no_grad():
        workload.module(input_ids=ids[:, :past], past_key_values=made, use_cache=True)
    example = {"input_ids": ids[:, past:], "attention_mask": torch.ones_like(ids), **pairs(made)}
    return replace(workload, example=example, max_length=length)


def check(workload: Workload, length: int, most: int) -> None:
    """Raise UsageError where keys and values of ``length`` tokens cannot be kept."""
    least = sum(TRACED)
    if not least <= length <= most:
        raise UsageError(f"Keys and values of {length} tokens cannot be kept: {workload.name} takes {least} to {most}.")


def empty() -> Cache:
    """A cache of nothing, whose layers will keep all that they are given."""
    return Cache(layer_class_to_replicate=DynamicLayer)


def filled(tensors: Sequence[Tensor]) -> Cache:
    """The cache that holds the keys and values of each layer, one after the other."""
    layers: list[Any] = [_Layer(key, value) for key, value in zip(tensors[::2], tensors[1::2], strict=True)]
    return Cache(layers=layers)


def pairs(cache: Any, side: str = "") -> dict[str, Tensor]:
    """The keys and values of a cache by the names of inputs."""
    return {
        f"{PAST}{at}.{side}{part}": tensor
        for at, layer in enumerate(cache.layers)
        for part, tensor in (("key", layer.keys), ("value", layer.values))
    }


def names(inputs: Sequence[str] | Mapping[str, Any]) -> tuple[str, ...]:
    """Those of a past among the names of inputs."""
    return tuple(name for name in inputs if name.startswith(PAST))


def outputs(inputs: Sequence[str] | Mapping[str, Any]) -> tuple[str, ...]:
    """What the keys and values are called that a step gives back."""
    return tuple(name.replace(PAST, PRESENT, 1) for name in names(inputs) if CROSS not in name)


def kept(workload: Workload, made: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The past of the next step, from the outputs of one."""
    return dict(zip(names(workload.example), made[1:], strict=True))


def positions(mask: Tensor, past: int) -> Tensor:
    """The place of each new token among its row's own [batch, sequence], from the mask of all [batch, past + sequence];
    0 for padding on the left."""
    return (mask.cumsum(1) - 1).clamp(min=0)[:, past:]


class Step(nn.Module):
    """A causal language model as a function of token ids, mask, and each layer's keys and values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        ids, mask, *past = inputs
        kept = filled(past)
        made = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask, past[0].shape[2]),
            past_key_values=kept,
            use_cache=True,
        )
        return (made.logits, *pairs(kept).values())


class _Layer(DynamicLayer):
    """The keys and values of one layer, whose length is not asked for: it would be fixed where a graph is traced."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.is_initialized = keys, values, True

    def get_seq_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[-2]


def dim(axis: Axis) -> Any:
    """A free length. The tracer reasons with sizes of two and more, and cannot be told that one is the sum of two
    others; what it makes holds for any, which parity proves."""
    return torch.export.Dim(axis.name, min=4 if axis.name == "total_sequence" else axis.min)


def traced(module: nn.Module, inputs: tuple[Tensor, ...], shapes: tuple[dict[int, Any], ...]) -> Any:
    """``module`` as a program, in which the sum of lengths is checked as it runs and not assumed."""
    return torch.export.export(
        module,
        inputs,
        dynamic_shapes={"inputs": shapes},
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
