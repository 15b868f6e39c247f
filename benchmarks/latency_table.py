"""The latency table itself: what the units of a model cost in milliseconds, and what a plan is predicted to take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..compress.prune.budget import Costs, choices
from ..errors import InputError
from ..models.structure import Structure
from ..plan import PruningPlan

FORMAT = 7
MOST_APART = 1.5
"""How many times larger one of two savings that should be the same can be for the smaller to be believed."""


@dataclass(frozen=True)
class LatencyTable:
    """Latency in ms by kind, layer and units kept.

    ``sites[kind, layer]`` has ``count + 1`` entries: what units cost above the fewest that may stay. A block's own two
    are what it costs gone (0), and kept with the fewest units inside. ``rest_ms`` is everything else.
    """

    sites: Mapping[tuple[str, int], tuple[float, ...]]
    rest_ms: float
    total_ms: float
    """The whole model, as measured."""
    target: str
    precision: str
    batch: int
    sequence: int
    form: str
    """The graph form of the ONNX backend that is fastest here."""
    together: tuple[float, float] | None
    """Half of all units gone at once, in ms: what the kinds measured one by one add up to, and what was measured."""
    bends: tuple[tuple[float, float], ...]
    """Sums of costs in ms and the latencies that they stand for, rising: between them it is a straight line, and above
    the last the sum itself."""
    points: tuple[Mapping[str, Any], ...]
    """What was measured: ``kind``, ``layers``, ``kept`` in each, ``ms`` of the whole model."""
    disturbed: tuple[int, int]
    """Of how many lots that were timed the whole model took longer than usual, and of how many altogether."""
    environment: Mapping[str, Any]

    def costs(self, structure: Structure) -> Costs:
        """The table for the sites of ``structure``, which it was measured on; InputError for another one."""
        of = {site: self.sites.get((site.kind, site.layer), ()) for site in choices(structure)}
        if any(len(series) != site.count + 1 for site, series in of.items()):
            raise InputError("This latency table was measured on a model of other sizes.")
        return Costs("latency", "ms", of, self.rest_ms)

    def predict(self, structure: Structure, plan: PruningPlan) -> float:
        """Latency in ms of the model that ``plan`` leaves."""
        return self.expected(self.costs(structure).total(structure, plan))

    def expected(self, summed_ms: float) -> float:
        """The latency in ms of a model whose costs add up to ``summed_ms``."""
        sums, latencies = np.array(self.bends or [(0.0, 0.0)]).T
        return float(summed_ms + np.interp(summed_ms, sums, latencies - sums))

    def summed(self, latency_ms: float) -> float:
        """What the costs of a model of ``latency_ms`` add up to: the inverse of :meth:`expected`."""
        sums, latencies = np.array(self.bends or [(0.0, 0.0)]).T
        return float(latency_ms + np.interp(latency_ms, latencies, sums - latencies))

    def adding_up(self, predicted_ms: float, measured_ms: float) -> LatencyTable:
        """With every saving scaled as the saving of a plan of all kinds, predicted and measured, says."""
        ratio = _of_one_size(self.total_ms - measured_ms, self.total_ms - predicted_ms)
        sites = {key: tuple(np.round(np.multiply(series, ratio), 6).tolist()) for key, series in self.sites.items()}
        rest = self.total_ms - sum(series[-1] for series in sites.values())
        return replace(self, sites=sites, rest_ms=rest, together=(predicted_ms, measured_ms), bends=())

    def bent(self, half_ms: float, few_ms: float, measured_ms: float) -> LatencyTable:
        """With sums below ``half_ms`` standing for what a plan that comes to ``few_ms`` was measured to take."""
        ratio = _of_one_size(half_ms - measured_ms, half_ms - few_ms)
        latency = half_ms - ratio * (half_ms - few_ms)
        rising = 0 < few_ms < half_ms and latency > 0
        return replace(self, bends=((0.0, 0.0), (few_ms, latency), (half_ms, half_ms)) if rising else ())

    def to_json(self) -> dict[str, Any]:
        same: dict[tuple[str, tuple[float, ...]], list[int]] = {}
        for (kind, layer), series in self.sites.items():
            same.setdefault((kind, series), []).append(layer)
        sites = [{"kind": kind, "layers": layers, "ms": list(series)} for (kind, series), layers in same.items()]
        plain = {name: value for name, value in vars(self).items() if name != "sites"}
        return {"format": FORMAT, "sites": sites, **plain}

    @classmethod
    def from_json(cls, data: Any) -> LatencyTable:
        """The inverse of :meth:`to_json`; InputError on anything else."""
        try:
            fields = {name: data[name] for name in cls.__dataclass_fields__ if name != "sites"}
            sites = {
                (str(entry["kind"]), int(layer)): tuple(float(ms) for ms in entry["ms"])
                for entry in data["sites"]
                for layer in entry["layers"]
            }
            together = tuple(map(float, fields["together"])) if fields["together"] else None
            some, lots = map(int, fields["disturbed"])
            bends = tuple((float(summed), float(latency)) for summed, latency in fields["bends"])
            fields |= {"together": together, "bends": bends, "points": tuple(fields["points"])}
            fields["disturbed"] = (some, lots)
            table = cls(sites=sites, **fields)
            of_sites = [ms for series in sites.values() for ms in series]
            figures = [table.rest_ms, table.total_ms, *table.disturbed, *of_sites, *np.ravel(bends)]
            rising = bool((np.diff(np.array(bends), axis=0) > 0).all()) if bends else True
            sound = data["format"] == FORMAT and np.isfinite(figures).all() and min(figures[1:]) >= 0 and rising
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"This is not a latency table: {error!r}.") from error
        if not sound:
            raise InputError("This is not a latency table of this version, or it holds figures that are not times.")
        return table


def _of_one_size(measured_ms: float, predicted_ms: float) -> float:
    """How many times the saving predicted the one measured is; 1 where the two are not of one size: a model so small
    that noise is all that was measured."""
    ratio = measured_ms / max(predicted_ms, 1e-9)
    return ratio if 1 / MOST_APART < ratio < MOST_APART else 1.0
