"""Report: a finished run as one HTML file that needs nothing else, and as markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..export import precision
from ..export.artifact import MANIFEST, open_artifact
from ..files import write_text
from ..models import measures
from ..models.measures import told
from ..plan import read_json
from . import charts, example_page, frontier, maps, spread, tables
from .compare import rows as compared
from .measurement import Measurement
from .page import note, page, scrolled, table

Row = dict[str, Any]

FIELDS = {
    "variant": "name",
    **{f"{name} ms": name for name in ("p50", "p90", "p95", "p99")},
    "MB": "size_bytes",
    **{name: name for name in ("speedup", "quality", "drop", "params", "precision", "runtime")},
}
"""What each of ``tables.COLUMNS`` shows, as the ``data-field`` of its cells."""


def write_report(run: Path, *, changed: int = example_page.SHOWN) -> Path:
    """Write ``report.html`` and ``report.md`` of a finished run; returns the first.

    Every figure is derived anew from ``measurements.jsonl``; so many ``changed`` predictions are listed. Raises
    InputError where ``run`` is not a finished run, or one of its files is damaged.
    """
    summary, measured = read_run(run)
    original, *results = compared(measured)
    try:
        page_of = _page(run, summary, measured, original, results, changed)
        markdown = _markdown(run, summary, original, results)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{run / 'summary.json'} is not the summary of a finished run ({said}).") from error
    write_text(run / "report.html", page_of)
    write_text(run / "report.md", markdown)
    return run / "report.html"


def read_run(run: Path) -> tuple[Row, list[Measurement]]:
    """The summary and the measurements of a finished run; InputError where ``run`` is none."""
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


def _markdown(run: Path, summary: Row, original: Row, results: Sequence[Row]) -> str:
    plain, rows = tables.plain, [original, *results]
    found = frontier.places(rows) if frontier.comparable(rows) else []
    said = (headline(summary, original, results), _judged(original["quality"]), example_page.summary(run))
    lines = [f"# {plain(summary['name'])} on {plain(summary['target'])}", "", " ".join(filter(None, said)), ""]
    lines += [tables.markdown(original, results, summary["chosen"], found)]
    lines += [f"- {plain(text)}" for text in frontier.told(rows, found)] + [""] if found else []
    for title, entries in (("Kept", summary["kept"]), ("Refused", summary["refused"])):
        lines += [f"## {title}", "", *(f"- {plain(e['variant'])}: {plain(e['reason'])}" for e in entries), ""]
    if summary["removed"]:
        lines += ["## Share that is kept", "", _shares(summary)]
    for entry in summary.get("mixed", ()):
        lines += [f"## In float in {plain(entry['variant'])}", "", *(f"- {plain(n)}" for n in entry["in_float"]), ""]
    lines += ["## Environment", "", *(f"- {key}: {_plain(value)}" for key, value in summary["environment"].items())]
    return "\n".join(lines) + "\n"


def _shares(summary: Row) -> str:
    """What each layer keeps of every kind of unit, as a table in markdown."""
    layers, shares = maps.kept(summary)
    header = ["layer", *(maps.KINDS[kind] for kind in shares)]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    for at, layer in enumerate(layers):
        cells = ["" if values[at] is None else f"{values[at]:.0%}" for values in shares.values()]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _page(  # noqa: PLR0917
    run: Path, summary: Row, measured: Sequence[Measurement], original: Row, results: Sequence[Row], changed: int
) -> str:
    rows, chosen = [original, *results], summary["chosen"]
    sections = [
        ("Against the original", comparison_table(rows, chosen, name="comparison")),
        ("Quality against latency and size", frontier.section(rows, {chosen} - {None})),
        ("Latency, run by run", latencies(measured, chosen)),
    ]
    examples = dict(example_page.sections(run, changed))
    sections += [entry for entry in examples.items() if entry[0] == example_page.CHANGED]
    sections.append(("What was removed", _removed(summary)))
    if (run / "artifact" / MANIFEST).is_file():
        sections.append(("Precision, layer by layer", _precision(run, summary)))
    sections += [entry for entry in examples.items() if entry[0] != example_page.CHANGED]
    sections.append(("What the gate decided", _gate(summary)))
    sections += [(f"What stays in float in {one['variant']}", _in_float(one)) for one in summary.get("mixed", ())]
    if summary["trace"].get("recover"):
        sections.append(("Recovery", _recovery(**summary["trace"])))
    data = summary["data"]
    sizes = (
        f"{data['train']:,} training, {data['calibration']:,} calibration and {data['evaluation']:,} evaluation rows"
    )
    judged = _judged(original["quality"])
    sections.append(("Data", f"<p>{escape(summary['origin'])}. {sizes}; no row is in two of them. {judged}</p>"))
    sections.append(("Stages", _stages(summary["stages"])))
    sections.append(("Environment", definitions(summary["environment"])))
    if summary["warnings"]:
        doubts = "".join(f"<li>{escape(doubt)}</li>" for doubt in summary["warnings"])
        sections.insert(1, ("Read with care", f"<ul>{doubts}</ul>"))
    return page(f"{summary['name']} on {summary['target']}", headline(summary, original, results), sections)


def latencies(measured: Sequence[Measurement], chosen: str | None) -> str:
    """HTML: the distributions of latencies that were measured together."""
    names, samples = [item.name for item in measured], [item.samples for item in measured]
    told = "Marks are the median, the 90th and, of 1,000 runs or more, the 99th percentile."
    return spread.violins(names, samples, chosen) + note(told) + spread.shares(names, samples, chosen)


def _precision(run: Path, summary: Row) -> str:
    artifact = open_artifact(run / "artifact")
    layers = 1 + max((site["layer"] for site in summary["structure"] if site["kind"] != "hidden"), default=-1)
    blocks = {int(layer) for layer in summary["removed"].get("block", {})}
    return maps.precision(precision.of(artifact), layers, blocks)


def _judged(quality: Row | None) -> str:
    """Whether the figures of quality are about the rows' labels or about the original alone."""
    metric = measures.KNOWN.get(quality["metric"]) if quality else None
    if metric is None or not metric.against_original:
        return ""
    return f"Quality is fidelity to the original ({metric.name}): no labels were used."


def comparison_table(
    rows: Sequence[Row], chosen: str | None, *, name: str, places: Sequence[frontier.Place] | None = None
) -> str:
    """HTML of the table of rows that were measured together, the first of which is the original.

    ``places`` are the rows' on the frontier, of more rows than these; by default that of these.
    """
    original, *results = rows
    if places is None:
        places = frontier.places(rows) if frontier.comparable(rows) else []
    header, every = tables.lines(original, results, places)
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in header)
    lines = []
    for row, texts in zip(rows, every, strict=True):
        values = _values(row)
        mark = ' class="chosen"' if row["name"] == chosen else ""
        parts = []
        for title, text in zip(header, texts, strict=True):
            field = FIELDS.get(title, title.lower())
            known = values.get(field, row.get(field))
            value = "" if known is None else f' data-value="{escape(str(known))}"'
            first = field == "name"
            label = f"{escape(text)} <b>chosen</b>" if first and mark else escape(text) if first else _figure(text)
            tag = 'th scope="row"' if first else "td"
            parts.append(f'<{tag} data-field="{field}"{value}>{label}</{tag.split(maxsplit=1)[0]}>')
        lines.append(f'<tr data-row="{escape(row["name"])}"{mark}>{"".join(parts)}</tr>')
    tokens = f" x sequence {original['sequence']}" if original["sequence"] else ""
    tokens += f" after {original['past']}" if original.get("past") else ""
    shape = f"batch {original['batch']}{tokens}, n = {original['latency_ms']['n']} each"
    caption = f"{original['target']}, {shape}, interleaved; brackets are 95 % intervals, of speedups 99 %"
    whole = (
        f'<table id="{escape(name)}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )
    return scrolled(whole, "Variants against the original")


def _figure(text: str) -> str:
    """A figure with its interval, or what else is beside it in brackets, on a line of its own."""
    figure, beside = re.fullmatch(r"(.*?)( [\[(].*)?", text, re.DOTALL).groups()  # type: ignore[union-attr]
    return escape(figure) + (f'<span class="range">{escape(beside.strip())}</span>' if beside else "")


def _values(row: Row) -> Row:
    """The number behind each cell, at full precision."""
    quality, speedup = row["quality"] or {}, row["speedup"] or {}
    plain = {name: row[name] for name in ("name", "precision", "params", "size_bytes")}
    timed = {name: row["latency_ms"].get(name) for name in ("p50", "p90", "p95", "p99")}
    judged = {"quality": quality.get("value"), "drop": quality.get("drop")}
    return {**plain, **timed, "speedup": speedup.get("value"), **judged, "runtime": row.get("runtime")}


def _removed(summary: Row) -> str:
    return (_fitted(summary["speed"]) if summary.get("speed") else "") + maps.removed(summary)


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
    whole = f'<table class="words"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return scrolled(whole, "What the gate decided")


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


def definitions(environment: Row) -> str:
    lines = [f"<dt>{escape(key)}</dt><dd>{escape(_plain(value))}</dd>" for key, value in environment.items()]
    return f"<dl>{''.join(lines)}</dl>"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry}" for key, entry in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
