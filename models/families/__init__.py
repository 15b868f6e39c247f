"""Families: where each architecture keeps its heads, channels and blocks. Declarations, no maths.

A family is one file that declares ``FAMILY``; :mod:`~edgepress.models.mapping` reads the declaration against a real
module, pruned or not, and writes down its :class:`~edgepress.models.structure.Structure`.

All names are paths relative to a block unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module

from torch import nn

from ...errors import UnavailableError

FAMILIES = (
    "bert",
    "distilbert",
    "mpnet",
    "albert",
    "deberta",
    "vit",
    "beit",
    "dinov2",
    "swin",
    "clip",
    "gpt2",
    "llama",
    "t5",
    "bart",
    "whisper",
    "torch_encoder",
    "torch_encoder_prenorm",
    "generic",
)


@dataclass(frozen=True)
class Attention:
    """One attention of a block. Where ``query``, ``key`` and ``value`` are one layer, it holds them side by side."""

    module: str
    """The module that computes the attention and holds the attributes below."""
    query: str
    key: str
    value: str
    output: str
    head_dim: str = "head_dim"
    num_heads: str = ""
    """Attribute that holds the number of heads; empty where there is none."""
    width: str = ""
    """Attribute that holds num_heads * head_dim."""
    groups: str = ""
    """Attribute that holds the number of query heads for each key/value head."""
    kind: str = "head"
    more: tuple[str, ...] = ()
    """Further layers whose outputs have one part a head; those that a block lacks are skipped."""
    tables: tuple[str, ...] = ()
    """Parameters, or embeddings, with one column a head; those that a block lacks are skipped."""
    bias: str = ""
    """``"given"`` where the block is handed a bias with one entry for each of the unpruned model's heads, ``"made"``
    where the first block makes it for all."""
    sum_at: str = ""
    scaled_by: str = ""


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward layers of a block: ``inputs`` are multiplied together (those that a block lacks are skipped)."""

    inputs: tuple[str, ...]
    output: str
    sum_at: str = ""
    scaled_by: str = ""
    width: str = ""
    """Attribute, as ``module:name``, that holds the number of channels."""


@dataclass(frozen=True)
class Blocks:
    """Every list of blocks whose path ends in ``path``, where ``*`` stands for a number."""

    path: str
    attentions: tuple[Attention, ...]
    ffn: FeedForward
    shared: bool = False
    branches: tuple[tuple[str, ...], ...] = ()
    """Where a block is x + a(x), then x + b(x): the modules of a, which has the attention, and of b, one after the
    other. Tokens can be merged between the two."""
    moves: tuple[str, ...] = ()
    """What the first block holds for all others: it passes to the next one when the first block goes."""
    config: Mapping[str, str] = field(default_factory=dict)
    """The configuration's fields for counts of units that are the same in every layer, by kind, and for ``head_dim``
    where it has one. A kind that is missing here cannot be said in a configuration."""


@dataclass(frozen=True)
class Family:
    name: str
    source: str
    """Where the architecture is described."""
    model_types: tuple[str, ...]
    """``config.model_type`` values that have this shape."""
    blocks: tuple[Blocks, ...]
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    notes: tuple[str, ...] = ()
    """What in it is left alone, and why."""
    hidden: bool = True
    """Whether channels of the residual stream can be taken out: one width throughout, read by known layers only."""


def get(name: str) -> Family:
    """The family declared in ``models/families/<name>.py``."""
    family: Family = import_module(f"{__name__}.{name}").FAMILY
    return family


def find(model_type: str) -> Family | None:
    """The family of a ``config.model_type``, or None."""
    return next((family for family in map(get, FAMILIES) if model_type in family.model_types), None)


def of_module(module: nn.Module) -> Family:
    """The family of a module that a user's function made; ``generic`` where nothing in it is known."""
    known = find(str(getattr(getattr(module, "config", None), "model_type", "")))
    if known is not None:
        return known
    layers = [child for child in module.modules() if isinstance(child, nn.TransformerEncoderLayer)]
    if layers:
        return get("torch_encoder_prenorm" if layers[0].norm_first else "torch_encoder")
    return get("generic")


def of_model_type(model_type: str) -> Family:
    """The family of a ``config.model_type``; UnavailableError, naming the known ones, where there is none."""
    family = find(model_type)
    if family is None:
        known = ", ".join(kind for name in FAMILIES for kind in get(name).model_types)
        raise UnavailableError(f"Models of type '{model_type}' are not supported in this version (supported: {known}).")
    return family
