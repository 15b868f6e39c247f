"""Report: a finished run as one HTML file that needs nothing else, and as markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import write_text
from ..models import measures
from ..models.measures import told
from ..plan import read_json
from . import charts, tables
from .compare import rows as compared
from .measurement import Measurement
from .page import note, page, table

Row = dict[str, Any]

FIELDS = ("name", "speedup", "quality", "drop", "p50", "p90", "p99", "size_bytes", "params", "precision", "runtime")
"""What each of ``tables.COLUMNS`` shows, as the ``data-field`` of its cells."""


KINDS = {
    "head": "Attention heads",
    "kv": "Key/value groups",
    "cross_head": "Heads of cross-attention",
    "ffn": "Feed-forward channels",
    "channel": "Channels",
    "hidden": "Channels of the hidden width",
}


def write_report(run: Path) -> Path:
    """Write ``report.html`` and ``report.md`` of a finished run; returns the first.

    Every figure is derived anew from ``measurements.jsonl``. Raises InputError where ``run`` is not a finished run.
    """
    summary, measured = _read(run)
    original, *results = compared(measured)
    write_text(run / "report.html", _page(summary, measured, original, results))
    write_text(run / "report.md", _markdown(summary, original, results))
    return run / "report.html"


def _read(run: Path) -> tuple[Row, list[Measurement]]:
    for name in ("summary.json", "measurements.jsonl"):
        if not (run / name).is_file():
            raise InputError(f"{run} is not a finished run: it has no {name}.")
    summary = read_json(run / "summary.json")
    try:
        lines = (run / "measurements.jsonl").read_text(encoding="utf-8").splitlines()
        measured = [Measurement.from_json(json.loads(line)) for line in lines]
    except ValueError as error:
        raise InputError(f"{run / 'measurements.jsonl'} is damaged: {error}.") from error
    if not measured or not isinstance(summary, dict):
        raise InputError(f"{run} is not a finished run: it holds no measurements.")
    return summary, measured


def headline(summary: Row, original: Row, results: Sequence[Row]) -> str:
    """The run in one sentence."""
    chosen = next((row for row in results if row["name"] == summary["chosen"]), None)
    if chosen is None:
        return "Nothing was found that is faster within the quality that may be lost; the original is kept."
    quality = chosen["quality"]
    moved = told(quality["metric"], quality["drop"] or 0.0) if quality else "quality not measured"
    met = f"the constraint is not met: {'; '.join(summary['unmet'])}" if summary["unmet"] else "the constraint is met"
    share = chosen["size_bytes"] / original["size_bytes"]
    return f"{chosen['speedup']['value']:.2f}x faster, {share:.0%} of the size, {moved}: {met}."


def _markdown(summary: Row, original: Row, results: Sequence[Row]) -> str:
    said = (headline(summary, original, results), _judged(original["quality"]))
    lines = [f"# {summary['name']} on {summary['target']}", "", " ".join(filter(None, said)), ""]
    lines += [tables.markdown(original, results, summary["chosen"])]
    for title, entries in (("Kept", summary["kept"]), ("Refused", summary["refused"])):
        lines += [f"## {title}", "", *(f"- {e['variant']}: {e['reason']}" for e in entries), ""]
    for entry in summary.get("mixed", ()):
        lines += [f"## In float in {entry['variant']}", "", *(f"- {name}" for name in entry["in_float"]), ""]
    lines += ["## Environment", "", *(f"- {key}: {_plain(value)}" for key, value in summary["environment"].items())]
    return "\n".join(lines) + "\n"


def _page(summary: Row, measured: Sequence[Measurement], original: Row, results: Sequence[Row]) -> str:
    names = [item.name for item in measured]
    rows = [original, *results]
    sections = [
        ("Against the original", _table(original, results, summary["chosen"])),
        ("Quality against latency", charts.pareto(rows, summary["chosen"])),
        ("Latency", charts.distributions(names, [item.samples for item in measured], summary["chosen"])),
        ("What was removed", _removed(summary)),
        ("What the gate decided", _gate(summary)),
    ]
    sections += [("What stays in float", _in_float(entry)) for entry in summary.get("mixed", ())]
    if summary["trace"].get("recover"):
        sections.append(("Recovery", _recovery(**summary["trace"])))
    data = summary["data"]
    sizes = (
        f"{data['train']:,} training, {data['calibration']:,} calibration and {data['evaluation']:,} evaluation rows"
    )
    judged = _judged(original["quality"])
    sections.append(("Data", f"<p>{escape(summary['origin'])}. {sizes}; no row is in two of them. {judged}</p>"))
    sections.append(("Stages", _stages(summary["stages"])))
    sections.append(("Environment", _definitions(summary["environment"])))
    if summary["warnings"]:
        doubts = "".join(f"<li>{escape(doubt)}</li>" for doubt in summary["warnings"])
        sections.insert(1, ("Read with care", f"<ul>{doubts}</ul>"))
    return page(f"{summary['name']} on {summary['target']}", headline(summary, original, results), sections)


def _judged(quality: Row | None) -> str:
    """Whether the figures of quality are about the rows' labels or about the original alone."""
    metric = measures.KNOWN.get(quality["metric"]) if quality else None
    if metric is None or not metric.against_original:
        return ""
    return f"Quality is fidelity to the original ({metric.name}): no labels were used."


def _table(original: Row, results: Sequence[Row], chosen: str | None) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in tables.COLUMNS)
    lines = []
    for row in (original, *results):
        values = _values(row)
        mark = ' class="chosen"' if row["name"] == chosen else ""
        texts = tables.cells(row, original)
        parts = []
        for field, text in zip(FIELDS, texts, strict=True):
            value = "" if values[field] is None else f' data-value="{escape(str(values[field]))}"'
            first = field == "name"
            label = f"{escape(text)} <b>chosen</b>" if first and mark else escape(text)
            tag = 'th scope="row"' if first else "td"
            parts.append(f'<{tag} data-field="{field}"{value}>{label}</{tag.split(maxsplit=1)[0]}>')
        lines.append(f'<tr data-row="{escape(row["name"])}"{mark}>{"".join(parts)}</tr>')
    tokens = f" x sequence {original['sequence']}" if original["sequence"] else ""
    shape = f"batch {original['batch']}{tokens}, n = {original['latency_ms']['n']} each"
    caption = f"{escape(original['target'])}, {shape}, interleaved; brackets are 95 % bootstrap intervals"
    return (
        f'<div class="wide"><table id="comparison"><caption>{caption}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _values(row: Row) -> Row:
    """The number behind each cell, at full precision."""
    quality, speedup = row["quality"] or {}, row["speedup"] or {}
    plain = {name: row[name] for name in ("name", "precision", "params", "size_bytes")}
    timed = {name: row["latency_ms"][name] for name in ("p50", "p90", "p99")}
    judged = {"quality": quality.get("value"), "drop": quality.get("drop")}
    return {**plain, **timed, "speedup": speedup.get("value"), **judged, "runtime": row.get("runtime")}


def _removed(summary: Row) -> str:
    removed = summary["removed"]
    if not removed:
        return "<p>No units were removed.</p>"
    blocks = {int(layer) for layer in removed.get("block", {})}
    scores = summary["scores"] or {"method": "no", "values": {}}
    parts = [_fitted(summary["speed"])] if summary.get("speed") else []
    if blocks:
        parts.append(f"<p>Whole blocks removed: {', '.join(str(layer) for layer in sorted(blocks))}.</p>")
    for kind, title in KINDS.items():
        counts = {site["layer"]: site["count"] for site in summary["structure"] if site["kind"] == kind}
        gone = {int(layer): set(indices) for layer, indices in removed.get(kind, {}).items()}
        if counts:
            parts.append(f"<h3>{title}</h3>")
            parts.append(charts.heat_map(kind, counts, gone, blocks, scores["values"].get(kind)))
    legend = (
        f"Darker is more important (rank of the {escape(scores['method'])} score); crossed out or cut away is removed."
    )
    return "".join(parts) + f'<p class="note">{legend}</p>'


def _fitted(speed: Row) -> str:
    """How near the latency table came to what was measured."""
    ratio = speed["speedup"]
    return (
        f"<p>Fitted to {speed['wanted']:.3g}x in {escape(speed['precision'])}: the latency table predicted "
        f"{speed['predicted_speedup']:.2f}x, and {ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}] was "
        f"measured, against the unpruned model in the same precision.</p>"
    )


def _in_float(mixed: Row) -> str:
    """The operators that one variant keeps in float, and what each of all would lose and take."""
    alone, without, times, kept = mixed["alone"], mixed["without"], mixed["milliseconds"], mixed["in_float"]
    lines = [[name, f"{alone[name]:.3g}", f"{without[name]:.3g}", f"{times[name]:.3g}"] for name in kept]
    caption = f"{mixed['variant']}; all quantized lose {mixed['whole']:.3g}"
    header = ["in float", "it alone quantized loses", "all but it lose", "ms longer in float"]
    told = note("Losses are distances from the answers in float, on calibration rows: nats of classes and tokens.")
    chart = charts.sensitivity(list(alone), list(alone.values()), list(without.values()), mixed["whole"])
    return table(header, lines, name="in-float", caption=caption) + told + chart


def _gate(summary: Row) -> str:
    lines = [
        f"<tr><td>{word}</td><td>{escape(entry['variant'])}</td><td>{escape(entry['reason'])}</td></tr>"
        for word, entries in (("kept", summary["kept"]), ("refused", summary["refused"]))
        for entry in entries
    ]
    head = '<th scope="col">verdict</th><th scope="col">variant</th><th scope="col">why</th>'
    return f'<div class="wide words"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _recovery(recover: Sequence[Row], layers: Sequence[str]) -> str:
    """How distillation went: its loss, the gradients, and what was wrong."""
    events = [event for entry in recover for event in entry["events"]]
    lines = [[f"{event['step']:,}", event["kind"], event["where"], event["done"]] for event in events]
    told = table(["step", "what", "where", "done"], lines, name="events") if lines else note("Nothing was wrong.")
    strip = (
        f"<h3>Norm of the gradient in each layer, from the first step to the last</h3>{charts.norms(layers, recover)}"
    )
    return charts.training(recover) + strip + told


def _stages(stages: Sequence[Row]) -> str:
    lines = []
    for stage in stages:
        note = " (used again)" if stage["reused"] else ""
        lines.append(f"<tr><td>{escape(stage['name'])}</td><td>{stage['seconds']:.1f}{note}</td></tr>")
    head = '<th scope="col">stage</th><th scope="col">seconds</th>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _definitions(environment: Row) -> str:
    lines = [f"<dt>{escape(key)}</dt><dd>{escape(_plain(value))}</dd>" for key, value in environment.items()]
    return f"<dl>{''.join(lines)}</dl>"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
