"""The map of a model's prunable parts: which units there are, what each costs, and which tensors hold them.

Scores, masks, plans and surgery all speak of a :class:`Structure` and never of a model class. A family
(``models/families/``) is what writes one down.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from ..errors import InputError
from ..plan import PruningPlan, Unit


@dataclass(frozen=True)
class Site:
    """All units of one kind in one layer, and the linear modules that must lose them together.

    Unit ``i`` owns output features ``i*width … (i+1)*width`` of every producer and the same input features of the
    consumer. Multiplying the consumer's input by zero there is therefore the same as removing the unit.

    For ``kind == "block"`` there is one unit, ``producers`` is empty and ``consumer`` names the block itself: masking
    it means that the block returns its input.
    """

    kind: str
    layer: int
    count: int
    width: int
    producers: tuple[str, ...]
    consumer: str
    sum_at: str
    """The module whose first input is the residual stream with the consumer's output added."""
    params: int
    """Parameters that one unit takes with it."""
    macs: int
    """Multiply-accumulates that one unit takes with it, at the structure's reference sequence length, batch 1."""

    @property
    def units(self) -> tuple[Unit, ...]:
        return tuple(Unit(self.kind, self.layer, index) for index in range(self.count))

    def features(self, index: int) -> range:
        """The consumer's input features that belong to unit ``index``."""
        return range(index * self.width, (index + 1) * self.width)


@dataclass(frozen=True)
class Structure:
    """Every site of a module, in a fixed order: that order is the index of every ``Tensor[num_units]`` of scores."""

    family: str
    num_layers: int
    hidden_size: int
    sequence: int
    """The sequence length at which MACs are counted."""
    sites: tuple[Site, ...]

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

    def site(self, kind: str, layer: int) -> Site:
        for site in self.sites:
            if site.kind == kind and site.layer == layer:
                return site
        raise InputError(
            f"The plan names {kind} units in layer {layer}, but this {self.family} model has "
            f"{self.num_layers} layers with {', '.join(self.kinds)} units."
        )

    def check(self, plan: PruningPlan) -> None:
        """Raise InputError where the plan names a unit that is not here, or leaves a layer or the model empty."""
        for kind, layer in plan.sites():
            site = self.site(kind, layer)
            indices = plan.indices(kind, layer)
            if indices[-1] >= site.count:
                raise InputError(
                    f"The plan removes {kind} {indices[-1]} of layer {layer}, which has only {site.count} of them."
                )
            if kind != "block" and len(indices) == site.count and layer not in plan.blocks:
                raise InputError(
                    f"The plan removes all {site.count} {kind} units of layer {layer}; at least one must stay, "
                    f"or the whole block must go."
                )
        if len(plan.blocks) >= self.num_layers:
            raise InputError(f"The plan removes all {self.num_layers} blocks; at least one must stay.")
