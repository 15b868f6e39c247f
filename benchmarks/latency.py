"""Latency tables: what each unit of a model costs in milliseconds, measured where and how it will run.

What    For every site (the heads of a layer, its feed-forward channels, a whole block) the latency by units kept, on
        the target's own runtime, threads, kernels and precision, at one batch and sequence.
When    Before pruning to a latency: kernels are not linear in the units, so nothing but measuring tells what they save.
Cost    One export for each kind of unit, and a second or so for each of about 20 counts of a kind. Cached.
Source  ZipLM, Kurtic et al. 2023 (arXiv 2302.04089, section 3.2)

All layers that are alike are cut to the same count at once, the model is measured interleaved with the whole one, and
the difference is shared out among them: so fusion and caches are in the figure, and noise is divided by their number.
What kinds save together is not the sum of what each saves: half of all units gone at once tells by how much, and every
saving is scaled by that, so that what adds up to a plan of many kinds is true of such a plan. A much smaller model may
fit in the caches where half of the whole did not: seven eighths gone at once tell what becomes of the sum down there.
What the kernels like is in the table, between the counts measured too (:mod:`.savings`), and an allocation that
minimises keeps to it.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from .. import __version__
from ..compress import quantize as quantizers
from ..compress.prune.budget import choices, fewest
from ..errors import InputError, UsageError
from ..export import resize
from ..export.artifact import Artifact, Manifest
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
from .disturbance import disturbed
from .latency_table import FORMAT, LatencyTable
from .measurement import Measurement
from .savings import above_fewest, alike, curve, grid, half, step
from .targets import Target

Progress = Callable[[int, int, str], None]
Floats = NDArray[np.float64]

POINTS = 72
"""Counts measured over all groups of alike sites, and at most a third of them for one."""
AGAIN = 1 / 2
"""How many lots at most are timed again where something disturbed them, as a share of all."""
FEWEST_AT_ONCE, MOST_AT_ONCE, BYTES_AT_ONCE = 2, 8, 720 << 20
"""Graphs that are measured in turn with the whole one: more of them save time, and take memory. Where that may be
short, on a device and where one is imitated, there are the fewest."""


def measure(
    workload: Workload,
    *,
    target: str = "cpu",
    batch: int = 1,
    sequence: int = 128,
    precision: str = "fp32",
    rounds: int = 1000,
    seconds: float = 0.4,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> LatencyTable:
    """The latency table of ``workload``, from the cache where the same was measured on this machine before.

    ``precision`` is ``fp32`` or the scheme of a quantizer. Each graph runs ``rounds`` times, or about ``seconds`` if
    that comes first, but ten times at least. ``say`` is told where something disturbed the machine, so that the table
    is in doubt. Raises UsageError where nothing can be removed, and as the export does.
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
        table = _kept(path, workload.structure)
        if table is None:
            with tempfile.TemporaryDirectory() as folder:
                show = progress or _silent
                bench = _Bench(workload, Path(folder), where, batch, sequence, precision, rounds, seconds, show)
                table = bench.table(machine)
            write_text(path, json.dumps(table.to_json()) + "\n")
    some, lots = table.disturbed
    if say and some:
        say(
            f"something disturbed the machine while {some} of {lots} lots of latencies were measured; "
            f"without {path} they are measured again"
        )
    return table


def _kept(path: Path, structure: Structure) -> LatencyTable | None:
    """The table in the cache; None where there is none yet, or one that is damaged."""
    try:
        table = LatencyTable.from_json(read_json(path))
        table.costs(structure)
    except InputError:
        return None
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
        shares = (2, 8) if all(group.size for group in groups) else ()
        together = [_Point((), 0, partial(self._resized, _shrunk(groups, share))) for share in shares]
        total, taken, disturbances = self._times(whole, points + together)
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
            bends=(),
            points=tuple(
                {"kind": p.sites[0].kind, "layers": [site.layer for site in p.sites], "kept": p.kept, "ms": ms}
                for p, ms in zip(points, taken, strict=False)
            ),
            disturbed=disturbances,
            environment=machine,
        )
        if not together:
            return table
        some, few = (_plan(groups, share) for share in shares)
        table = table.adding_up(table.predict(structure, some), taken[-2])
        return table.bent(table.predict(structure, some), table.predict(structure, few), taken[-1])

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
        graph = openvino.written(onnx.load(base.model_file), plan)
        return _alone(graph, self.folder / "whole", made.manifest, base.manifest.model_file)

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

    def _times(self, whole: Artifact, points: Sequence[_Point]) -> tuple[float, list[float], tuple[int, int]]:
        """Latency in ms of the whole model and of each point, these by their ratio to the whole in their lot, and what
        ``LatencyTable.disturbed`` tells.

        A lot that something disturbed is timed again.
        """
        room = 0 if self.target.address or self.target.imitation else BYTES_AT_ONCE
        at_once = max(FEWEST_AT_ONCE, min(MOST_AT_ONCE, room // whole.size_bytes))
        lots = [points[start : start + at_once] for start in range(0, len(points), at_once)]
        taken = []
        for number, lot in enumerate(lots):
            self.progress(number * at_once, len(points), "counts measured")
            taken.append(self._lot(whole, lot))
        left = math.ceil(len(lots) * AGAIN)
        while (slow := disturbed([first.p50 for first, *_ in taken])) and left:
            self.progress(len(points), len(points), "disturbed ones again")
            again = self._lot(whole, lots[slow[0]])
            taken[slow[0]] = min(taken[slow[0]], again, key=lambda lot: lot[0].p50)
            left -= 1
        self.progress(len(points), len(points), "counts measured")
        total = float(np.median([first.p50 for first, *_ in taken]))
        ratios = [share(first, other) for first, *others in taken for other in others]
        return total, [ratio * total for ratio in ratios], (len(slow), len(lots))

    def _lot(self, whole: Artifact, lot: Sequence[_Point]) -> list[Measurement]:
        """The whole model and the graphs of ``lot``, timed in turn."""
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            artifacts = [whole]
            for number, point in enumerate(lot):
                folder, file = Path(place) / str(number), whole.manifest.model_file
                artifacts.append(_alone(point.graph(), folder, whole.manifest, file))
            return load.quick(artifacts, **self._how)

    @property
    def _how(self) -> dict[str, Any]:
        where = {"target": str(self.target), "batch": self.batch, "sequence": self.sequence}
        return {**where, "rounds": self.rounds, "seconds": self.seconds}


def _left(group: _Group, share: int) -> int:
    """How many units are left where one in ``share`` is."""
    return max(group.count // share, 1)


def _shrunk(groups: Sequence[_Group], share: int) -> list[tuple[Resize, int]]:
    """How the graph changes where one in ``share`` of all units is left."""
    return [(group.size, _left(group, share)) for group in groups if group.size]


def _plan(groups: Sequence[_Group], share: int) -> PruningPlan:
    """What goes where one in ``share`` of all units is left."""
    return PruningPlan.of(unit for g in groups for site in g.sites for unit in site.units[_left(g, share) :])


def _alone(graph: onnx.ModelProto, folder: Path, manifest: Manifest, file: str) -> Artifact:
    """``graph`` in the new ``folder``, to be timed as ``manifest`` says held to no reference: it answers nothing."""
    folder.mkdir()
    onnx.save(graph, folder / file)
    named = {"model_file": file, "files": {file: sha256(folder / file)}}
    return Artifact(folder, manifest.model_copy(update=named))
