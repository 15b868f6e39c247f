"""Plans: plain data that says what is to be done to a model, never how.

A ``PruningPlan`` names the units that go; it replays on any fresh skeleton of the same model. A ``QuantizationPlan``
names the precision of each operator; a backend turns it into a file. Both are JSON on disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, order=True)
class Unit:
    """The smallest thing that can be removed.

    ``kind`` is ``"head"``, ``"kv"``, ``"cross_head"``, ``"ffn"``, ``"block"``, ``"channel"`` or ``"hidden"``; ``layer``
    counts the blocks from 0, and is 0 for hidden channels, which all share; ``index`` counts the units of that kind in
    that layer, and is 0 for a block.
    """

    kind: str
    layer: int
    index: int


@dataclass(frozen=True)
class PruningPlan:
    """The units to remove, in the numbering of the model that the plan is for.

    A unit inside a removed block need not be listed: the block takes it along.
    """

    removed: frozenset[Unit] = frozenset()

    @classmethod
    def of(cls, units: Iterable[Unit]) -> PruningPlan:
        return cls(frozenset(units))

    def __len__(self) -> int:
        return len(self.removed)

    def indices(self, kind: str, layer: int) -> tuple[int, ...]:
        """The removed indices of one kind in one layer, ascending."""
        return tuple(sorted(u.index for u in self.removed if u.kind == kind and u.layer == layer))

    def sites(self) -> Iterator[tuple[str, int]]:
        """Each (kind, layer) that loses something, in order."""
        yield from sorted({(u.kind, u.layer) for u in self.removed})

    @property
    def blocks(self) -> frozenset[int]:
        """The layers removed as whole blocks."""
        return frozenset(u.layer for u in self.removed if u.kind == "block")

    def then(self, later: PruningPlan, num_layers: int) -> PruningPlan:
        """This plan followed by ``later``, which is in the numbering of the model that this plan leaves.

        ``num_layers`` is the number of blocks before this plan. The result is in this plan's numbering, so that
        ``apply(apply(m, a), b)`` equals ``apply(m, a.then(b, n))``.
        """
        layers = [layer for layer in range(num_layers) if layer not in self.blocks]
        renumbered: set[Unit] = set(self.removed)
        for kind, layer in later.sites():
            original = layer if kind == "hidden" else layers[layer]
            gone = frozenset(self.indices(kind, original))
            wanted = later.indices(kind, layer)
            survivors = _nth_survivors(gone, wanted)
            renumbered.update(Unit(kind, original, index) for index in survivors)
        return PruningPlan(frozenset(renumbered))

    def left(self, earlier: PruningPlan, kind: str, layer: int, count: int) -> list[int]:
        """Of the ``count`` units that the plan ``earlier`` leaves of a kind in a layer, the places of those that this
        plan, which takes all that one takes, leaves too."""
        before, after = (frozenset(plan.indices(kind, layer)) for plan in (earlier, self))
        survivors = [unit for unit in range(count + len(before)) if unit not in before]
        return [place for place, unit in enumerate(survivors) if unit not in after]

    def to_json(self) -> dict[str, Any]:
        """``{kind: {layer: [index, …]}}``, layers as strings as JSON asks."""
        out: dict[str, dict[str, list[int]]] = {}
        for kind, layer in self.sites():
            out.setdefault(kind, {})[str(layer)] = list(self.indices(kind, layer))
        return out

    @classmethod
    def from_json(cls, data: Any) -> PruningPlan:
        """The inverse of :meth:`to_json`; raises InputError on anything else."""
        try:
            listed = [
                (str(kind), int(layer), index)
                for kind, layers in data.items()
                for layer, indices in layers.items()
                for index in list[Any](indices)
            ]
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"This is not a pruning plan ({{kind: {{layer: [index]}}}}): {error}.") from error
        wrong = [index for _, _, index in listed if type(index) is not int]
        if wrong:
            raise InputError(f"A pruning plan lists units by whole numbers, not by {wrong[0]!r}.")
        units = frozenset(Unit(*one) for one in listed)
        if any(unit.layer < 0 or unit.index < 0 for unit in units):
            raise InputError("A pruning plan holds a negative layer or index.")
        return cls(units)


def _nth_survivors(gone: frozenset[int], wanted: tuple[int, ...]) -> list[int]:
    """Original indices of the ``wanted``-th units that are left once ``gone`` are removed."""
    survivors: list[int] = []
    original, position = 0, 0
    for nth in wanted:
        while True:
            if original not in gone:
                if position == nth:
                    break
                position += 1
            original += 1
        survivors.append(original)
    return survivors


@dataclass(frozen=True, eq=False)
class Codes:
    """A weight [out, in] in few bits: ``scales[o, i // block] * (codes[o, i] - zeros[o, i // block])``.

    ``codes`` is uint8 [out, in] and holds whole numbers below ``2 ** bits``; ``scales`` is float32 and ``zeros`` uint8,
    both [out, ceil(in / block)].
    """

    bits: int
    block: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def weight(self) -> Tensor:
        """What the codes stand for, float32 [out, in]."""
        columns = self.codes.shape[1]
        scales, zeros = (part.repeat_interleave(self.block, 1)[:, :columns] for part in (self.scales, self.zeros))
        return scales * (self.codes.to(scales.dtype) - zeros.to(scales.dtype))


@dataclass(frozen=True)
class QuantizationPlan:
    """The precision of each operator, by the name of the module that holds its weight.

    ``scheme`` is the command-line word (``"int8-dynamic"``, ``"int8"``, ``"fp32"`` …). ``weights`` maps a module name
    to the type its weight is stored in (``"int8"``); a module that is not listed stays in float. ``activations`` maps a
    module name to the (low, high) range of its input where the scheme is static, and is empty where it is dynamic.
    ``state`` holds entries of the model's state dict that take the place of its own (smoothed weights, corrected
    biases). ``codes`` are weights that a method has rounded itself; others are rounded to nearest as they are written.
    ``smooth`` maps a module name to a positive scale for each of its input channels, [in]: the input over it is what
    is quantized, to the range in ``activations``, and the weight's columns times it are what is rounded. Modules that
    read the same tensor share one scale. ``outputs`` maps a module name to the (low, high) range of its output where
    attention multiplies it with another activation, for runtimes that do that in 8 bits too.
    """

    scheme: str
    weights: Mapping[str, str] = field(default_factory=dict)
    activations: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    codes: Mapping[str, Codes] = field(default_factory=dict, compare=False)
    smooth: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    outputs: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All but the tensors, to tell two plans apart by."""
        return {
            "scheme": self.scheme,
            "weights": dict(self.weights),
            "activations": {name: list(span) for name, span in self.activations.items()},
            "outputs": {name: list(span) for name, span in self.outputs.items()},
        }


def read_json(path: Path) -> Any:
    """The JSON document at ``path``; InputError with the path in it where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of too many digits, too many brackets
        raise InputError(f"{path} is not valid JSON: {error}.") from error
