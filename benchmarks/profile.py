"""Profile: which operators a run's time goes to, by type, by layer of the model and one by one.

The runtimes tell it themselves (ONNX Runtime's trace, OpenVINO's counters), in runs that are not those of the latency:
telling it takes time. What lies between operators, and what a runtime rounds off, is in no operator and is shown as the
share that is not accounted for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from .page import note, page, table

NO_LAYER = "no layer"
WIDTH, ROW = 960, 26
HUES = 7
"""Colours of the style sheet, for the types of operators that take longest; the others are grey."""


@dataclass(frozen=True)
class Node:
    """An operator of the graph as the runtime runs it, with the milliseconds that it takes in a run."""

    name: str
    layer: str
    op: str
    kernel: str
    calls: float
    """In a run: more than one inside a loop."""
    ms: float


@dataclass(frozen=True)
class Profile:
    """Means over ``runs`` runs of ``ms`` each, of the nodes in the order in which they run."""

    runs: int
    ms: float
    nodes: tuple[Node, ...]

    @property
    def unaccounted_ms(self) -> float:
        return max(0.0, self.ms - sum(node.ms for node in self.nodes))

    def share(self, ms: float) -> float:
        """Of the run."""
        return ms / max(self.ms, sum(node.ms for node in self.nodes))

    def types(self) -> list[dict[str, Any]]:
        """Types of operators by what their kernels are, those first that take longest."""
        groups = self._groups(lambda node: (node.op, node.kernel))
        found = [{"op": op, "kernel": kernel, **self._sum(nodes)} for (op, kernel), nodes in groups.items()]
        return sorted(found, key=lambda one: -float(one["ms"]))

    def layers(self) -> list[dict[str, Any]]:
        """Layers of the model in the order in which they begin; last what is in none."""
        found = [{"layer": layer, **self._sum(nodes)} for layer, nodes in self._groups(lambda n: n.layer).items()]
        return sorted(found, key=lambda one: one["layer"] == NO_LAYER)

    def _groups(self, key: Callable[[Node], Any]) -> dict[Any, list[Node]]:
        groups: dict[Any, list[Node]] = {}
        for node in self.nodes:
            groups.setdefault(key(node), []).append(node)
        return groups

    def _sum(self, nodes: Sequence[Node]) -> dict[str, Any]:
        ms = sum(node.ms for node in nodes)
        return {"nodes": len(nodes), "ms": ms, "share": self.share(ms)}

    def to_json(self) -> dict[str, Any]:
        return {
            "runs": self.runs,
            "run_ms": self.ms,
            "unaccounted": {"ms": self.unaccounted_ms, "share": self.share(self.unaccounted_ms)},
            "types": self.types(),
            "layers": self.layers(),
            "nodes": [{**asdict(node), "share": self.share(node.ms)} for node in self.nodes],
        }


def read(measured: Any) -> Profile:
    """The profile of a Measurement that has one."""
    raw: Mapping[str, Any] = measured.profile
    runs = raw["runs"]
    layers = _layers([[node["name"], *node.get("of", ())] for node in raw["nodes"]])
    nodes = tuple(
        Node(node["name"], layer, node["op"], node["kernel"], node["calls"] / runs, node["ns"] / runs / 1e6)
        for node, layer in zip(raw["nodes"], layers, strict=True)
    )
    return Profile(runs, raw["ns"] / runs / 1e6, nodes)


# ---- layers


def layer_of(name: str) -> str:
    """The layer that an operator's name begins with: the path of a numbered block, or of a module outside of blocks.

    Names are those of edgepress's own files, ``bert.encoder.layer.0.attention.self.query/MatMul``, or those that
    torch's exporters write, ``/bert/encoder/layer.0/attention/self/query/MatMul``. An operator's own name, with no
    module before it, is of no layer. A conversion that OpenVINO puts between two (``A___B``, ``A_f32_bf16_B``) is of
    the layer of the second.
    """
    name = re.split(r"___|_[a-z]+\d+_[a-z]+\d+_", name)[-1]
    path, slash, _ = name.strip("/").rpartition("/")
    modules = re.split(r"[./]", path) if slash else []
    for at, word in enumerate(modules):
        if word.isdigit() and at:
            deeper = at + 2 < len(modules) and modules[at + 1] == "blocks" and modules[at + 2].isdigit()
            return ".".join(modules[: at + 3 if deeper else at + 1])  # blocks in stages, as Swin has them
    known = modules and not modules[0].startswith("_")
    return ".".join(modules[:2]) if known else NO_LAYER


def _layers(names: Sequence[Sequence[str]]) -> list[str]:
    """The layer of each node, by its name or those of what was fused into it.

    A piece that the runtime split off and named anew is of the layer that it runs in the midst of, if that is a block.
    """
    found = [next(filter(None, map(_known, every)), None) for every in names]
    before, after = _nearest(found), _nearest(found[::-1])[::-1]
    return [
        layer or (last if last == next_ and last and last[-1].isdigit() else NO_LAYER)
        for layer, last, next_ in zip(found, before, after, strict=True)
    ]


def _known(name: str) -> str | None:
    layer = layer_of(name)
    return None if layer == NO_LAYER else layer


def _nearest(layers: Sequence[str | None]) -> list[str | None]:
    """The last one known up to each."""
    found: list[str | None] = []
    for layer in layers:
        found.append(layer or (found[-1] if found else None))
    return found


# ---- what is shown

TYPES_HEADER = ("operator", "kernel", "nodes", "ms", "share")
LAYERS_HEADER = ("layer", "nodes", "ms", "share")
NODES_HEADER = ("node", "operator", "kernel", "layer", "ms", "share")


def type_lines(found: Profile, most: int | None = None) -> list[list[str]]:
    """Cells below TYPES_HEADER: the ``most`` that take longest, the rest together, and what is not accounted for."""
    types = found.types()
    lines = [[one["op"], one["kernel"], *_figures(one)] for one in types[:most]]
    rest = types[most:] if most else []
    if rest:
        sums = {name: sum(one[name] for one in rest) for name in ("nodes", "ms", "share")}
        lines.append([f"{len(rest)} others", "", *_figures(sums)])
    return [*lines, ["not accounted for", "", "", *_time(found, found.unaccounted_ms)]]


def layer_lines(found: Profile) -> list[list[str]]:
    return [[one["layer"], *_figures(one)] for one in found.layers()]


def node_lines(found: Profile, most: int | None = None) -> list[list[str]]:
    slowest = sorted(found.nodes, key=lambda node: -node.ms)[:most]
    return [[node.name, node.op, node.kernel, node.layer, *_time(found, node.ms)] for node in slowest]


def _figures(one: Mapping[str, Any]) -> list[str]:
    return [str(one["nodes"]), f"{one['ms']:.3f}", f"{one['share']:.1%}"]


def _time(found: Profile, ms: float) -> list[str]:
    return [f"{ms:.3f}", f"{found.share(ms):.1%}"]


def headline(found: Profile, p50: float) -> str:
    """The profiled run in one sentence, beside the median of those that were timed without."""
    return (
        f"{found.ms:.2f} ms a run on average of {found.runs} with profiling, {p50:.2f} ms at the median without; "
        f"{1 - found.share(found.unaccounted_ms):.0%} of it in {len(found.nodes)} operators"
    )


def write_page(measured: Sequence[Any], shown: Sequence[str]) -> str:
    """HTML of one page for all of ``measured``, whose headings are ``shown``: a picture and tables for each."""
    sections = []
    for number, (item, heading) in enumerate(zip(measured, shown, strict=True)):
        found = read(item)
        parts = [
            note(headline(found, item.p50)),
            flame(found),
            note(
                "Widths are time: the run, the layers in the order of the model, their operators by type, one by one."
            ),
            table(TYPES_HEADER, type_lines(found), name=f"types{number}", caption="Types of operators"),
            table(LAYERS_HEADER, layer_lines(found), name=f"layers{number}", caption="Layers"),
            "<details><summary>Every operator</summary>",
            table(NODES_HEADER, node_lines(found), name=f"nodes{number}"),
            "</details>",
        ]
        sections.append((escape(heading), "".join(parts)))
    return page("Profile", "Where the time of a run goes", sections)


# ---- the picture


def flame(found: Profile) -> str:
    """SVG of four rows, each as wide as it takes: the run, its layers, their types of operators, the operators."""
    hues = _hues(found)
    scale = WIDTH / max(found.ms, sum(node.ms for node in found.nodes))
    parts = [_box(0, 0, WIDTH, f"one run, {found.ms:.3f} ms", tip=f"one run: {found.ms:.3f} ms", hue=None)]
    x = 0.0

    def put(row: int, at: float, ms: float, label: str, hue: int | None) -> None:
        tip = f"{label}: {ms:.3f} ms, {found.share(ms):.1%} of the run"
        parts.append(_box(row, at, ms * scale, label, tip=tip, hue=hue))

    by_layer = found._groups(lambda node: node.layer)
    for layer in (one["layer"] for one in found.layers()):
        nodes = by_layer[layer]
        put(1, x, sum(node.ms for node in nodes), layer, None)
        types: dict[str, list[Node]] = {}
        for node in nodes:
            types.setdefault(node.op, []).append(node)
        for op, same in sorted(types.items(), key=lambda pair: -sum(node.ms for node in pair[1])):
            ms = sum(node.ms for node in same)
            put(2, x, ms, op, hues.get(op))
            for node in sorted(same, key=lambda node: -node.ms):
                put(3, x, node.ms, node.name, hues.get(op))
                x += node.ms * scale
    if found.unaccounted_ms:
        put(1, x, found.unaccounted_ms, "not accounted for", None)
    title = escape(f"Where {found.ms:.3f} ms of one run go: " + ", ".join(_largest(found)))
    height = 4 * ROW
    return (
        f'<svg class="flame" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">'
        f"<title>{title}</title>{''.join(parts)}</svg>"
    )


def _hues(found: Profile) -> dict[str, int]:
    slowest = dict.fromkeys(one["op"] for one in found.types())
    return {op: hue for hue, op in zip(range(HUES), slowest, strict=False)}


def _largest(found: Profile) -> list[str]:
    return [f"{one['op']} {one['share']:.0%}" for one in found.types()[:5]]


def _box(row: int, x: float, width: float, label: str, *, tip: str, hue: int | None) -> str:
    """A box with as much of its label as it has room for: the end of a path, or the beginning of a word."""
    y, room = row * ROW, int((width - 8) / 7.2)
    cut = f"…{label[1 - room :]}" if "." in label else f"{label[: room - 1]}…"
    short = label if len(label) <= room else cut if room > 3 else ""
    text = (
        f'<text class="tick" style="fill:var(--ink)" x="{x + 4:.2f}" y="{y + 17}">{escape(short)}</text>'
        if short
        else ""
    )
    fill = f'class="hue{hue}" style="fill:var(--hue)"' if hue is not None else 'style="fill:var(--other)"'
    return (
        f"<g><title>{escape(tip)}</title>"
        f'<rect {fill} fill-opacity=".35" stroke="var(--card)" x="{x:.2f}" y="{y}" '
        f'width="{max(width, 0.1):.2f}" height="{ROW - 2}"/>{text}</g>'
    )
