"""Latency tables: what each unit of a model costs in milliseconds, measured where and how it will run.

What    For every site (the heads of a layer, its feed-forward channels, a whole block) the latency by units kept, on
        the target's own runtime, threads, kernels and precision, at one batch and sequence.
When    Before pruning to a latency: kernels are not linear in the units, so nothing but measuring tells what they save.
Cost    One export for each kind of unit, and half a second or so for each of about 20 counts of a kind. Cached.
Source  ZipLM, Kurtic et al. 2023 (arXiv 2302.04089, section 3.2)

All layers that are alike are cut to the same count at once, the model is measured interleaved with the whole one, and
the difference is shared out among them: so fusion and caches are in the figure, and noise is divided by their number.
What kinds save together is not the sum of what each saves: half of all units gone at once tells by how much, and every
saving is scaled by that, so that what adds up to a plan of many kinds is true of such a plan.
Counts in between are interpolated. Where a layer has many units, the counts measured are multiples of a power of two;
how much dearer others are is learnt at a few counts, by the largest power of two that divides them. What the kernels
like is thus in the table, and an allocation that minimises keeps to it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from .. import __version__
from ..compress import quantize as quantizers
from ..compress.prune.budget import Costs, choices, fewest
from ..errors import InputError, UsageError
from ..export import resize
from ..export.artifact import Artifact
from ..export.backends import onnx as backend
from ..export.backends import openvino
from ..export.resize import Resize
from ..files import sha256, write_text
from ..models import surgery
from ..models.structure import Site, Structure
from ..models.workload import Workload
from ..models.zoo.fetch import cache_folder
from ..plan import PruningPlan, QuantizationPlan, read_json
from . import environment, load, runner, targets
from .compare import share
from .targets import Target

Progress = Callable[[int, int, str], None]
Floats = NDArray[np.float64]

FORMAT = 2
POINTS = 72
"""Counts measured over all groups of alike sites, and at most a third of them for one."""
MOST_APART = 1.5
"""How many times larger one of two savings that should be the same can be for the smaller to be believed."""
FEWEST_AT_ONCE, MOST_AT_ONCE, BYTES_AT_ONCE = 2, 8, 32 << 20
"""Graphs that are measured interleaved with the whole one. More of them save time, but what they hold together should
not be more than a last-level cache: a model that runs on its own does not find its weights gone after every run."""


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
    points: tuple[Mapping[str, Any], ...]
    """What was measured: ``kind``, ``layers``, ``kept`` in each, ``ms`` of the whole model."""
    environment: Mapping[str, Any]

    def costs(self, structure: Structure) -> Costs:
        """The table for the sites of ``structure``, which it was measured on; InputError for another one."""
        of = {site: self.sites.get((site.kind, site.layer), ()) for site in choices(structure)}
        if any(len(series) != site.count + 1 for site, series in of.items()):
            raise InputError("This latency table was measured on a model of other sizes.")
        return Costs("latency", "ms", of, self.rest_ms)

    def predict(self, structure: Structure, plan: PruningPlan) -> float:
        """Latency in ms of the model that ``plan`` leaves."""
        return self.costs(structure).total(structure, plan)

    def adding_up(self, predicted_ms: float, measured_ms: float) -> LatencyTable:
        """With every saving scaled as the saving of a plan of all kinds, predicted and measured, says.

        Left as it is where the two savings are not of one size: a model so small that noise is all that was measured.
        """
        ratio = (self.total_ms - measured_ms) / max(self.total_ms - predicted_ms, 1e-9)
        ratio = ratio if 1 / MOST_APART < ratio < MOST_APART else 1.0
        sites = {key: tuple(np.round(np.multiply(series, ratio), 6).tolist()) for key, series in self.sites.items()}
        rest = self.total_ms - sum(series[-1] for series in sites.values())
        return replace(self, sites=sites, rest_ms=rest, together=(predicted_ms, measured_ms))

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
            table = cls(sites=sites, **{**fields, "together": together, "points": tuple(fields["points"])})
            figures = [table.rest_ms, table.total_ms, *(ms for series in sites.values() for ms in series)]
            sound = data["format"] == FORMAT and np.isfinite(figures).all() and min(figures[1:]) >= 0
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"This is not a latency table: {error!r}.") from error
        if not sound:
            raise InputError("This is not a latency table of this version, or it holds figures that are not times.")
        return table


def measure(
    workload: Workload,
    *,
    target: str = "cpu",
    batch: int = 1,
    sequence: int = 128,
    precision: str = "fp32",
    rounds: int = 30,
    seconds: float = 2.0,
    progress: Progress | None = None,
) -> LatencyTable:
    """The latency table of ``workload``, from the cache where the same was measured on this machine before.

    ``precision`` is ``fp32`` or the scheme of a quantizer. Each graph runs ``rounds`` times, or for ``seconds`` if that
    comes first, but 30 times at least. Raises UsageError where nothing can be removed, and as the export does.
    """
    if not choices(workload.structure):
        raise UsageError(f"{workload.name} has no units whose latency could be measured: nothing of it can be removed.")
    if "input_ids" in workload.example and sequence > workload.max_length:
        raise UsageError(f"Sequence {sequence} is longer than the model's {workload.max_length} tokens.")
    where = targets.to_write_for(target)
    with targets.connect(where, where.runtime) as (host, where):
        machine = host.environment(where.threads)
        key = _key(workload, machine, where, (batch, sequence, precision))
        path = cache_folder() / "latency" / f"{key}.json"
        with suppress(InputError):  # none yet, or one that is damaged: it is measured again
            table = LatencyTable.from_json(read_json(path))
            table.costs(workload.structure)
            return table
        with tempfile.TemporaryDirectory() as folder:
            show = progress or _silent
            bench = _Bench(workload, Path(folder), where, batch, sequence, precision, rounds, seconds, show)
            table = bench.table(machine)
    write_text(path, json.dumps(table.to_json()) + "\n")
    return table


def _silent(_done: int, _total: int, _note: str) -> None:
    pass


def _key(workload: Workload, machine: Mapping[str, Any], where: Target, shape: tuple[int, int, str]) -> str:
    """What a table depends on: machine and runtime, the architecture with all of its sizes, shape and precision."""
    sites = [(s.kind, s.layer, s.count, s.params, s.macs) for s in workload.structure.sites]
    facts = {
        "version": (FORMAT, __version__),
        "machine": [machine.get(name) for name in environment.DECISIVE]
        + ([str(where)] if where.address or where.imitation else []),
        "runtime": [where.runtime, machine["packages"].get(runner.RUNTIMES[where.runtime][0])],
        "model": [str(workload.module), workload.skeleton.architecture, sites],
        "inputs": {name: (list(value.shape), str(value.dtype)) for name, value in workload.example.items()},
        "shape": shape,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


# ---- measuring


@dataclass(frozen=True)
class _Group:
    """Sites that are alike; the counts measured are multiples of ``width``. ``size`` is how the graph changes with the
    units that they keep, or None where only exports can tell."""

    sites: tuple[Site, ...]
    width: int
    size: Resize | None

    @property
    def count(self) -> int:
        return self.sites[0].count


@dataclass(frozen=True)
class _Point:
    """A graph to measure: ``kept`` units in each of ``sites``."""

    sites: tuple[Site, ...]
    kept: int
    graph: Callable[[], onnx.ModelProto]


@dataclass
class _Bench:
    """The measuring of one table: exports the graphs and times them in lots, each lot with the whole model in it."""

    workload: Workload
    folder: Path
    target: Target
    batch: int
    sequence: int
    precision: str
    rounds: int
    seconds: float
    progress: Progress

    def table(self, machine: Mapping[str, Any]) -> LatencyTable:
        structure = self.workload.structure
        self.progress(0, 0, "exporting")
        whole, form = self._whole()
        self.original = onnx.load(whole.model_file)
        units, blocks = alike(structure)
        groups = [self._group(sites, max(6, min(POINTS // 3, POINTS // len(units)))) for sites in units]
        points = [point for group in groups for point in self._points(group)]
        points += [_Point(going, 0, self._exporter(going, 0)) for sites in blocks if (going := half(structure, sites))]
        changes = [(group.size, group.count // 2) for group in groups if group.size]
        both = [_Point((), 0, lambda: self._resized(changes))] if len(changes) == len(groups) else []
        total, taken = self._times(whole, points + both)
        saved: dict[Site, Floats] = {}
        for group in groups:
            at = {
                p.kept: (total - ms) / len(p.sites)
                for p, ms in zip(points, taken, strict=False)
                if p.sites == group.sites
            }
            saved |= dict.fromkeys(group.sites, curve(group.count, at, fewest(group.sites[0]), group.width))
        gone = {p.sites: (total - ms) / len(p.sites) for p, ms in zip(points, taken, strict=False)}
        by_block = {site: gone.get(half(structure, sites), 0.0) for sites in blocks for site in sites}
        sites = above_fewest(structure, saved, by_block)
        table = LatencyTable(
            sites=sites,
            rest_ms=total - sum(series[-1] for series in sites.values()),
            total_ms=total,
            target=str(self.target),
            precision=self.precision,
            batch=self.batch,
            sequence=self.sequence,
            form=form,
            together=None,
            points=tuple(
                {"kind": p.sites[0].kind, "layers": [site.layer for site in p.sites], "kept": p.kept, "ms": ms}
                for p, ms in zip(points, taken, strict=False)
            ),
            environment=machine,
        )
        if not both:
            return table
        halved = PruningPlan.of(u for group in groups for site in group.sites for u in site.units[site.count // 2 :])
        return table.adding_up(table.predict(structure, halved), taken[-1])

    def _whole(self) -> tuple[Artifact, str]:
        """The artifact of the whole model, proven, in the graph form that is fastest."""
        if self.target.runtime == "openvino":
            return self._for_openvino(), "default"
        written = backend.write(self.workload, self._scheme(self.workload), self.folder / "whole")
        forms = [backend.in_form(written, form) for form in backend.FORMS]
        best = load.fastest(forms, **self._how)
        return forms[best], list(backend.FORMS)[best]

    def _for_openvino(self) -> Artifact:
        """As an ONNX file, which OpenVINO reads as well as its own, and whose sizes can be changed."""
        plan = self._scheme(self.workload)
        base = backend.write(self.workload, QuantizationPlan("fp32"), self.folder / "float")
        made = openvino.write(self.workload, plan, self.folder / "openvino", base=base)
        whole, file = self.folder / "whole", base.manifest.model_file
        whole.mkdir()
        onnx.save(openvino.written(onnx.load(base.model_file), plan), whole / file)
        named = {"model_file": file, "files": {file: sha256(whole / file)}}
        return Artifact(whole, made.manifest.model_copy(update=named))

    def _scheme(self, workload: Workload) -> QuantizationPlan:
        return QuantizationPlan("fp32") if self.precision == "fp32" else quantizers.quantize(workload, self.precision)

    def _exporter(self, sites: Sequence[Site], kept: int) -> Callable[[], onnx.ModelProto]:
        """Exports the model with ``kept`` units in each of ``sites``, in the precision that is measured."""

        def graph() -> onnx.ModelProto:
            plan = PruningPlan.of(unit for site in sites for unit in site.units[kept:])
            pruned = surgery.prune(self.workload, plan)
            exported = backend.export(pruned)
            scheme = self._scheme(pruned)
            if self.target.runtime == "openvino":
                return openvino.written(exported, scheme)
            if scheme.scheme == "fp32":
                return exported
            backend.quantize_graph(exported, scheme, self.folder / "quantized.onnx")
            return onnx.load(self.folder / "quantized.onnx")

        return graph

    def _group(self, sites: tuple[Site, ...], most: int) -> _Group:
        """``sites`` with how the graph changes with them, which takes an export."""
        count = sites[0].count
        size = None
        if count > 1:
            self.progress(0, 0, f"exporting with fewer {sites[0].kind} units")
            size = resize.between(self.original, self._exporter(sites, count - 1)(), count)
        return _Group(sites, step(count, most if size else 4), size)

    def _resized(self, changes: Sequence[tuple[Resize, int]]) -> onnx.ModelProto:
        model = onnx.ModelProto()
        model.CopyFrom(self.original)
        del model.graph.value_info[:]
        for change, kept in changes:
            change.apply(model, kept)
        return model

    def _points(self, group: _Group) -> list[_Point]:
        def graph(kept: int) -> Callable[[], onnx.ModelProto]:
            size = group.size
            return (lambda: self._resized([(size, kept)])) if size else self._exporter(group.sites, kept)

        counts = grid(group.count, group.width, between=group.size is not None)
        points = [_Point(group.sites, kept, graph(kept)) for kept in counts]
        if fewest(group.sites[0]) == 0:  # nothing is left to resize
            points.append(_Point(group.sites, 0, self._exporter(group.sites, 0)))
        return points

    def _times(self, whole: Artifact, points: Sequence[_Point]) -> tuple[float, list[float]]:
        """Latency of the whole model and of each point, in ms: the points' by their ratio to the whole in their lot."""
        ratios: list[float] = []
        totals: list[float] = []
        at_once = max(FEWEST_AT_ONCE, min(MOST_AT_ONCE, BYTES_AT_ONCE // whole.size_bytes))
        for start in range(0, len(points), at_once):
            lot = points[start : start + at_once]
            self.progress(start, len(points), "counts measured")
            with tempfile.TemporaryDirectory(dir=self.folder) as place:
                artifacts = [whole]
                for number, point in enumerate(lot):
                    folder = Path(place) / str(number)
                    folder.mkdir()
                    onnx.save(point.graph(), folder / whole.manifest.model_file)
                    artifacts.append(Artifact(folder, whole.manifest))
                first, *others = load.quick(artifacts, **self._how)
            totals.append(first.p50)
            ratios += [share(first, other) for other in others]
        total = float(np.median(totals))
        self.progress(len(points), len(points), "counts measured")
        return total, [ratio * total for ratio in ratios]

    @property
    def _how(self) -> dict[str, Any]:
        where = {"target": str(self.target), "batch": self.batch, "sequence": self.sequence}
        return {**where, "rounds": self.rounds, "seconds": self.seconds}


# ---- from what was measured to a table


def alike(structure: Structure) -> tuple[list[tuple[Site, ...]], list[tuple[Site, ...]]]:
    """Sites of the same kind and the same sizes, which share entries: those of units, and blocks."""
    groups: dict[tuple[str, int, int, int], list[Site]] = {}
    for site in choices(structure):
        groups.setdefault((site.kind, site.count, site.params, site.macs), []).append(site)
    found = [tuple(group) for group in groups.values()]
    return [g for g in found if g[0].kind != "block"], [g for g in found if g[0].kind == "block"]


def half(structure: Structure, blocks: Sequence[Site]) -> tuple[Site, ...]:
    """Half of ``blocks``, but never all blocks of a stack."""
    going: list[Site] = []
    for stack in structure.stacks:
        here = [site for site in blocks if site.layer in stack.layers]
        going += here[: min(-(-len(here) // 2), stack.count - 1)]
    return tuple(going)


def step(count: int, most: int) -> int:
    """The smallest power of two of which no more than ``most`` multiples fit into ``count``."""
    width = 1
    while count / width > most:
        width *= 2
    return width


def grid(count: int, width: int, *, between: bool) -> list[int]:
    """The counts to measure below ``count``: multiples of ``width``, and if asked some ``between``.

    These lie each smaller power of two above a multiple, at a third and at two thirds of the count.
    """
    found = set(range(width, count, width))
    for third in (1, 2) if between else ():
        base = round(third * count / 3 / width) * width
        found |= {base + 2**power for power in range(width.bit_length() - 1)}
    return sorted(kept for kept in found if 0 < kept < count)


def curve(count: int, saved: Mapping[int, float], least: int, width: int) -> Floats:
    """What is saved by keeping 0 … ``count`` units, from what was ``saved`` at some counts; [count + 1].

    Through the multiples of ``width``: decreasing in the units kept (isotonic regression takes out the noise) and
    linear in between. Other counts save less, by what the measured ones of the same largest power of two do on average.
    """
    ks = np.arange(count + 1)
    fineness = np.minimum(ks & -ks, width)
    on = sorted(k for k in saved if k and k % width == 0)
    if not on:
        return np.array([saved.get(0, 0.0), *[0.0] * count])
    line = np.interp(ks, on, [saved[k] for k in on])
    less = {width: 0.0}
    for power in reversed(range(width.bit_length() - 1)):
        fine = 2**power
        found = [line[k] - gain for k, gain in saved.items() if k and fineness[k] == fine and on[0] < k < on[-1]]
        less[fine] = max(less[2 * fine], float(np.mean(found)) if found else 0.0)
    on.append(count)
    gains = [saved[k] for k in on[:-1]] + [less[int(fineness[count])]]
    weights = np.ones(len(on))
    weights[-1] = 1e3 * len(on)  # nothing is saved at the full count: that is known, not measured
    smooth: Floats = isotonic_regression(gains, weights=weights, increasing=False).x
    line = np.interp(ks, on, smooth)
    whole: Floats = line - np.array([less[int(fine)] if fine else 0.0 for fine in fineness])
    whole[count] = 0.0
    if least:
        whole[:least] = whole[least]
    else:
        whole[0] = max(saved.get(0, whole[1:].max()), whole[1:].max())
    return whole


def above_fewest(
    structure: Structure, saved: Mapping[Site, Floats], blocks: Mapping[Site, float]
) -> dict[tuple[str, int], tuple[float, ...]]:
    """Latencies as :class:`LatencyTable` holds them, from what is saved by units, and by whole blocks."""
    sites: dict[tuple[str, int], tuple[float, ...]] = {}
    for site in choices(structure):
        if site.kind == "block":
            inside = sum(float(gain.max()) for other, gain in saved.items() if other.layer == site.layer)
            sites[site.kind, site.layer] = (0.0, max(0.0, blocks.get(site, 0.0) - inside))
        else:
            gain = saved[site]
            sites[site.kind, site.layer] = tuple(np.round(gain.max() - gain, 6).tolist())
    return sites
