"""The map of a model's prunable parts: which units there are, what each costs, and which tensors hold them.

Scores, masks, plans and surgery all speak of a :class:`Structure` and never of a model class. A family
(``models/families/``) is what writes one down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import InputError
from ..plan import PruningPlan, Unit


@dataclass(frozen=True)
class Cut:
    """The features of one layer that units own, on one side of it.

    Unit ``i`` owns ``width`` features from ``offset + i * width`` on, for every one of ``offsets``: a projection that
    holds queries, keys and values side by side has three.
    """

    layer: str
    """Path of a module, or of a parameter whose last dimension has one entry a unit."""
    side: str
    """``"out"`` or ``"in"``."""
    width: int
    offsets: tuple[int, ...] = (0,)

    def features(self, indices: Sequence[int]) -> list[int]:
        """The features that belong to the units ``indices``."""
        return [
            feature
            for offset in self.offsets
            for index in indices
            for feature in range(offset + index * self.width, offset + (index + 1) * self.width)
        ]


@dataclass(frozen=True)
class Site:
    """All units of one kind in one layer, and what must lose them together.

    Multiplying the units' features by zero at every input in ``gates`` is the same as removing them. For
    ``kind == "block"`` there is one unit, and ``block`` names what it is: masked, it returns its input.
    """

    kind: str
    layer: int
    count: int
    cuts: tuple[Cut, ...] = ()
    gates: tuple[Cut, ...] = ()
    """Cuts of side "in"; ``owner`` says to which unit each of their parts belongs."""
    owner: tuple[int, ...] = ()
    """The unit that owns each part of the gates; empty where part i is unit i's. Not so for key/value groups: the parts
    are query heads."""
    block: str = ""
    """The block that the units are in."""
    sum_at: str = ""
    """The module whose first input is the residual stream with the units' contribution added; empty where that is the
    output of ``block``."""
    scaled_by: str = ""
    """The parameter that multiplies the contribution before it is added, where there is one."""
    norms: tuple[str, ...] = ()
    """For ``kind == "hidden"``: the norms over the units, masked as ``hidden.py`` says; the gates only set to zero."""
    row_axis: int = 0
    """The axis of the gated layers' inputs that counts the rows of a batch; 1 where the sequence comes first."""
    params: int = 0
    """Parameters that one unit takes with it."""
    macs: int = 0
    """Multiply-accumulates that one unit takes with it, for the structure's reference input."""

    @cached_property  # indexed unit by unit
    def units(self) -> tuple[Unit, ...]:
        return tuple(Unit(self.kind, self.layer, index) for index in range(self.count))

    @property
    def consumer(self) -> str:
        """The layer that reads what the units make; for a block, the block itself."""
        return self.gates[0].layer if self.gates else self.block

    @property
    def parts(self) -> tuple[int, ...]:
        """``owner``, written out."""
        return self.owner or tuple(range(self.count))

    def multiplier(self, gate: Tensor, cut: Cut, width: int) -> Tensor:
        """What multiplies the ``width`` input features of a gated layer: ``gate``'s entry for features that a unit
        owns, 1 for others. [..., count] gives [..., width]."""
        unit_of = torch.full((width,), self.count, dtype=torch.long, device=gate.device)
        for part, unit in enumerate(self.parts):
            unit_of[cut.features([part])] = unit
        return torch.cat([gate, gate.new_ones(*gate.shape[:-1], 1)], dim=-1)[..., unit_of]


@dataclass(frozen=True)
class Stack:
    """A list of blocks that are run one after the other; a model may have several, and layers count through them."""

    path: str
    start: int
    count: int
    shared: bool = False
    """Whether its blocks are run more than once, so that none can be taken out."""

    @property
    def layers(self) -> range:
        return range(self.start, self.start + self.count)


@dataclass(frozen=True)
class Structure:
    """Every site of a module, in a fixed order: that order is the index of every ``Tensor[num_units]`` of scores."""

    family: str
    stacks: tuple[Stack, ...]
    sites: tuple[Site, ...]
    hidden_size: int = 0
    """Width of the (first) residual stream."""
    macs: int = 0
    """Multiply-accumulates of the whole module for its reference input."""
    notes: tuple[str, ...] = ()
    """What is left alone, and why."""

    @property
    def num_layers(self) -> int:
        """Blocks; in a model without any, groups of coupled layers."""
        return sum(stack.count for stack in self.stacks) or 1 + max((site.layer for site in self.sites), default=-1)

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        return tuple(unit for site in self.sites for unit in site.units)

    @property
    def num_units(self) -> int:
        return sum(site.count for site in self.sites)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of unit that this model has, in order of first appearance."""
        return tuple(dict.fromkeys(site.kind for site in self.sites))

    def slices(self) -> Iterator[tuple[Site, slice]]:
        """Each site with its place in a ``Tensor[num_units]``."""
        start = 0
        for site in self.sites:
            yield site, slice(start, start + site.count)
            start += site.count

    def of_kind(self, kind: str) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.kind == kind)

    @cached_property
    def _by_place(self) -> dict[tuple[str, int], Site]:
        return {(site.kind, site.layer): site for site in self.sites}

    def find(self, kind: str, layer: int) -> Site | None:
        """The site of one kind in one layer, or None."""
        return self._by_place.get((kind, layer))

    def site(self, kind: str, layer: int) -> Site:
        found = self.find(kind, layer)
        if found is None:
            raise InputError(
                f"The plan names {kind} units in layer {layer}, but this {self.family} model has "
                f"{self.num_layers} layers with {', '.join(self.kinds) or 'no removable'} units."
            )
        return found

    def closed(self, plan: PruningPlan) -> PruningPlan:
        """``plan`` with what must go along: a key/value group takes its query heads, and goes with its last one."""
        units = set(plan.removed)
        for kv in self.of_kind("kv"):
            heads = {Unit("head", kv.layer, part): Unit("kv", kv.layer, group) for part, group in enumerate(kv.parts)}
            units |= {head for head, group in heads.items() if group in units}
            units |= set(heads.values()) - {group for head, group in heads.items() if head not in units}
        return PruningPlan(frozenset(units))

    def check(self, plan: PruningPlan) -> None:
        """Raise InputError where the plan names a unit that is not here, or leaves an attention or a stack empty."""
        for kind, layer in plan.sites():
            site = self.site(kind, layer)
            indices = plan.indices(kind, layer)
            if indices[-1] >= site.count:
                raise InputError(
                    f"The plan removes {kind} {indices[-1]} of layer {layer}, which has only {site.count} of them."
                )
            spared = kind in {"block", "ffn"} or (layer in plan.blocks and kind != "hidden")
            if len(indices) == site.count and not spared:
                raise InputError(
                    f"The plan removes all {site.count} {kind} units of layer {layer}; at least one must stay, "
                    f"or the whole block must go."
                )
        for stack in self.stacks:
            if stack.count and plan.blocks.issuperset(stack.layers):
                raise InputError(f"The plan removes all {stack.count} blocks of {stack.path}; at least one must stay.")
