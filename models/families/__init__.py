"""Families: where each architecture keeps its heads, channels and blocks. Declarations, no maths.

A family is one file that declares ``FAMILY``; :func:`structure` reads the declaration against a real module, pruned or
not, and returns its :class:`~edgepress.models.structure.Structure`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from torch import nn

from ...errors import UnavailableError
from ..structure import Site, Structure

FAMILIES = ("bert",)


@dataclass(frozen=True)
class Family:
    """Names of modules, relative to a block unless said otherwise."""

    name: str
    source: str
    """Where the architecture is described."""
    model_types: tuple[str, ...]
    """``config.model_type`` values that have this shape."""
    architectures: tuple[str, ...]
    """Classes of transformers that are rebuilt from a configuration."""
    blocks: str
    """End of the module path of the list of blocks."""
    attention: str
    """The module that holds ``num_heads`` and ``head_dim`` under the two attribute names below."""
    num_heads: str
    head_dim: str
    all_heads: str
    """Attribute of ``attention`` that holds num_heads * head_dim."""
    query_key_value: tuple[str, ...]
    attention_output: str
    attention_sum: str
    """The module whose input is the residual stream right after attention was added to it."""
    ffn_in: tuple[str, ...]
    ffn_out: str
    ffn_sum: str


def get(name: str) -> Family:
    """The family declared in ``models/families/<name>.py``."""
    family: Family = import_module(f"{__name__}.{name}").FAMILY
    return family


def of_model_type(model_type: str) -> Family:
    """The family of a ``config.model_type``; UnavailableError, naming the known ones, where there is none."""
    for name in FAMILIES:
        family = get(name)
        if model_type in family.model_types:
            return family
    known = ", ".join(kind for name in FAMILIES for kind in get(name).model_types)
    raise UnavailableError(f"Models of type '{model_type}' are not supported in this version (supported: {known}).")


def block_list(module: nn.Module, family: Family) -> tuple[str, nn.ModuleList]:
    """The path and the list of a module's blocks."""
    for path, child in module.named_modules():
        if isinstance(child, nn.ModuleList) and f".{path}".endswith(f".{family.blocks}"):
            return path, child
    raise UnavailableError(f"No list of blocks '{family.blocks}' was found in this {family.name} model.")


def structure(module: nn.Module, family: Family, sequence: int) -> Structure:
    """The structure of ``module`` as it is now; MACs are counted at batch 1 and ``sequence`` tokens."""
    path, blocks = block_list(module, family)
    sites: list[Site] = []
    hidden = 0
    for layer, block in enumerate(blocks):
        prefix = f"{path}.{layer}"
        out, down = block.get_submodule(family.attention_output), block.get_submodule(family.ffn_out)
        assert isinstance(out, nn.Linear)
        assert isinstance(down, nn.Linear)
        hidden = out.out_features
        attention = block.get_submodule(family.attention)
        heads, head_dim = int(getattr(attention, family.num_heads)), int(getattr(attention, family.head_dim))
        num_in, num_qkv = len(family.ffn_in), len(family.query_key_value)
        head_weights = (num_qkv + 1) * hidden * head_dim
        head = Site(
            kind="head",
            layer=layer,
            count=heads,
            width=head_dim,
            producers=tuple(f"{prefix}.{name}" for name in family.query_key_value),
            consumer=f"{prefix}.{family.attention_output}",
            sum_at=f"{prefix}.{family.attention_sum}",
            params=head_weights + num_qkv * head_dim,
            macs=head_weights * sequence + 2 * sequence * sequence * head_dim,
        )
        ffn = Site(
            kind="ffn",
            layer=layer,
            count=down.in_features,
            width=1,
            producers=tuple(f"{prefix}.{name}" for name in family.ffn_in),
            consumer=f"{prefix}.{family.ffn_out}",
            sum_at=f"{prefix}.{family.ffn_sum}",
            params=(num_in + 1) * hidden + num_in,
            macs=(num_in + 1) * hidden * sequence,
        )
        whole = Site(
            kind="block",
            layer=layer,
            count=1,
            width=0,
            producers=(),
            consumer=prefix,
            sum_at=prefix,
            params=sum(p.numel() for p in block.parameters()),
            macs=heads * head.macs + ffn.count * ffn.macs,
        )
        sites += [head, ffn, whole]
    return Structure(family.name, len(blocks), hidden, sequence, tuple(sites))
