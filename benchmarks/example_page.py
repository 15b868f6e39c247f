"""The pictures of single rows in a run's report: predictions that changed, attention before and after."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..models.readable import png
from ..plan import read_json
from . import changes, examples
from .changes import Change
from .page import note, scrolled

Row = dict[str, Any]

CHANGED = "Predictions that changed"
SHOWN = 20
"""Changed predictions that a report lists, where nobody says how many."""
GREEN = (38, 150, 110)
"""Of the maps: it is told from a light page and from a dark one."""
CLOSE = 3
"""Heads that are shown large, with the text of their tokens."""
MOST_BYTES = 1 << 20
"""Of a thumbnail; what is larger is none."""


def sections(run: Path, shown: int = SHOWN) -> list[tuple[str, str]]:
    """The sections of a run's report on its examples; none where the run has kept none.

    Raises InputError where its files are damaged.
    """
    folder = run / examples.FOLDER
    found = []
    if (folder / examples.CHANGED).is_file() and (folder / examples.FACTS).is_file():
        listed, facts = changes.read(folder / examples.CHANGED), read_json(folder / examples.FACTS)
        found.append((CHANGED, _changed(folder, listed, facts, shown)))
    if (folder / examples.ATTENTION).is_file():
        path = folder / examples.ATTENTION
        try:
            found.append(("Attention, before and after", _attention(read_json(path))))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(f"{path} cannot be read as maps of attention: {error!r}.") from error
    return found


def summary(run: Path) -> str:
    """The changed predictions of a run in a sentence; empty where it has kept none."""
    folder = run / examples.FOLDER
    if not (folder / examples.CHANGED).is_file() or not (folder / examples.FACTS).is_file():
        return ""
    return _counted(changes.read(folder / examples.CHANGED), read_json(folder / examples.FACTS))


# ---- predictions


def _counted(listed: Sequence[Change], facts: Any) -> str:
    judged, by_token = facts.get("judged"), facts.get("by_token")
    if not isinstance(judged, int):
        raise InputError(f"{examples.FACTS} does not say how many predictions were compared.")
    what = "tokens" if by_token else "evaluation rows"
    counted = ", ".join(f"{number:,} {verdict}" for verdict, number in changes.counts(listed))
    moved = any(change.verdict in {changes.FARTHER, changes.NEARER} for change in listed)
    word = "moved" if moved else "changed"
    return f"{len(listed):,} of {judged:,} {what} {word}{f': {counted}' if counted else ''}."


def _changed(folder: Path, listed: Sequence[Change], facts: Any, shown: int) -> str:
    said = f"<p>{escape(_counted(listed, facts))}</p>"
    if not listed:
        return said
    some = changes.some(listed, shown)
    image = any(change.image for change in some)
    sure = any(change.before_confidence is not None for change in some)
    header = ["what", "row", *(["image"] if image else []), "text", "label", "original", "chosen"]
    header = [name for name in header if name != "text" or any(change.text for change in some)]
    lines = [_line(folder, change, header) for change in some]
    head = "".join(f'<th scope="col">{name}</th>' for name in header)
    body = f'<table id="changed" class="words"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    rest = "" if len(some) == len(listed) else f"{len(some):,} of each kind in turn are listed here. "
    told = f"{rest}All are in {examples.FOLDER}/{examples.CHANGED}."
    told += " Shares are those of the softmax; texts are as the model reads them." if sure else ""
    return said + (scrolled(body, "Predictions that changed") if some else "") + note(told)


def _line(folder: Path, change: Change, header: Sequence[str]) -> str:
    place = f"{change.row:,}" if change.token is None else f"{change.row:,}, token {change.token}"
    cells = {
        "what": f'<span class="verdict {_tone(change.verdict)}">{escape(change.verdict)}</span>',
        "row": place,
        "image": _thumbnail(folder, change),
        "text": f'<span class="text">{escape(change.text)}</span>',
        "label": escape(change.label) or "none",
        "original": _answer(change.before, change.before_confidence),
        "chosen": _answer(change.after, change.after_confidence),
    }
    return f"<tr>{''.join(f'<td>{cells[name]}</td>' for name in header)}</tr>"


def _tone(verdict: str) -> str:
    return {changes.LOST: "bad", changes.FARTHER: "bad", changes.WON: "good", changes.NEARER: "good"}.get(verdict, "")


def _answer(said: str, confidence: float | None) -> str:
    share = "" if confidence is None else f' <span class="soft">{confidence:.0%}</span>'
    return f"{escape(said)}{share}"


def _thumbnail(folder: Path, change: Change) -> str:
    path = folder / change.image
    if not change.image or not path.is_file() or path.stat().st_size > MOST_BYTES:
        return ""
    return _image(path.read_bytes(), f"evaluation row {change.row}", "thumbnail")


def _image(content: bytes, text: str, style: str, size: str = "") -> str:
    data = base64.b64encode(content).decode("ascii")
    return f'<img class="{style}"{size} alt="{escape(text)}" src="data:image/png;base64,{data}">'


# ---- attention


def _attention(found: Mapping[str, Any]) -> str:
    """All heads as small maps, before above after, and those that changed most as large ones with their tokens."""
    layers = found["layers"]
    parts = []
    image = base64.b64decode(found["image"], validate=True)
    if image:
        parts.append(_image(image, f"evaluation row {found['row']}", "thumbnail"))
    text = f': "{found["text"]}"' if found["text"] else ""
    cut = f", cut after {int(found['cut'])} tokens" if found["cut"] else ""
    parts.append(f'<p class="text">Evaluation row {int(found["row"]):,}{escape(text)}{cut}.</p>')
    stacks = list(dict.fromkeys(str(entry["stack"]) for entry in layers))
    for title, of_kind in _kinds(layers, stacks):
        parts.append(f"<h3>{escape(title)}</h3>" if title else "")
        parts.append(scrolled(_grid(of_kind), f"Attention of every head {title}".strip()))
    parts.append(note(_meaning(layers)))
    closest = _closest(layers)
    if closest:
        parts.append("<h3>Heads that changed most</h3>")
        parts += [_close(layers[at], head, image) for at, head in closest]
    return "".join(parts)


def _kinds(layers: Sequence[Row], stacks: Sequence[str]) -> list[tuple[str, list[Row]]]:
    """Self-attention and cross-attention of each stack, with a title where there is more than one of them."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for entry in layers:
        groups.setdefault((str(entry["stack"]), str(entry["kind"])), []).append(entry)
    titles = {"head": "Self-attention", "cross_head": "Cross-attention"}
    named = len(groups) > 1
    return [(f"{titles.get(kind, kind)} of {stack}" if named else "", of) for (stack, kind), of in groups.items()]


def _meaning(layers: Sequence[Row]) -> str:
    if any(entry["grid"] for entry in layers):
        where = "Each square is the image, patch by patch: darker is where the class token, or the mean of all, looks."
    else:
        where = "In each square rows are tokens that look and columns are tokens that are looked at; darker is more."
    return (
        f"{where} Every square has its own scale. Upper rows are before, lower rows after; a cross is a removed head."
    )


def _grid(layers: Sequence[Row]) -> str:
    heads = max(len(entry["heads"]) for entry in layers)
    head = "".join(f'<th scope="col">head {number}</th>' for number in range(heads))
    body = []
    for entry in layers:
        run = f", run {int(entry['run'])}" if entry["run"] else ""
        name = f"layer {int(entry['layer'])}{run}"
        for time in ("before", "after"):
            if time == "after" and entry["removed"]:
                cells = f'<td class="out" colspan="{len(entry["heads"])}">block removed</td>'
            else:
                cells = "".join(f"<td>{_small(one[time], f'{name}, head {n}, {time}')}</td>" for n, one in
                                enumerate(entry["heads"]))  # fmt: skip
            body.append(f'<tr class="{time}"><th scope="row">{name} {time}</th>{cells}</tr>')
    return (
        f'<table class="maps"><thead><tr><th scope="col">layer</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _small(packed: Any, text: str) -> str:
    if packed is None:
        return '<span class="map cross"><span class="unseen">removed</span></span>'
    return _image(_drawn(examples.unpacked(packed)), text, "map")


def _drawn(values: NDArray[np.float64]) -> bytes:
    """A map as an image, white to green by way of its opacity, so that it stands on any page."""
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a map of shape {list(values.shape)}")
    shade = np.sqrt(values / max(float(values.max()), 1e-12))  # else one heavy key hides all others
    return png((255 * shade).round().astype(np.uint8)[..., None], bytes(GREEN) * 256, bytes(range(256)))


def _closest(layers: Sequence[Row]) -> list[tuple[int, int]]:
    """The heads whose maps moved furthest, and then one that was removed, each by its layer's place and its own."""
    moved, gone = [], []
    for at, entry in enumerate(layers):
        for head, one in enumerate(entry["heads"]):
            before = examples.unpacked(one["before"])
            if one["after"] is None:
                gone.append((float(before.max()), at, head))
            else:
                after = examples.unpacked(one["after"])
                if after.shape == before.shape:
                    moved.append((float(np.abs(after - before).sum() / len(before)), at, head))
    moved = [entry for entry in moved if entry[0] > 0]
    picked = sorted(moved, reverse=True)[:CLOSE] + sorted(gone, reverse=True)[:1]
    return [(at, head) for _, at, head in picked]


def _close(entry: Row, head: int, image: bytes) -> str:
    one = entry["heads"][head]
    name = f"layer {int(entry['layer'])}, head {head}"
    parts = [_large(entry, one["before"], f"{name}, before", image)]
    after = f"{name}, after"
    parts.append(_large(entry, one["after"], after, image) if one["after"] else _gone(f"{after}: removed"))
    return f'<div class="pair">{"".join(parts)}</div>'


def _gone(text: str) -> str:
    return f"<figure><figcaption>{escape(text)}</figcaption></figure>"


def _large(entry: Row, packed: Any, text: str, image: bytes) -> str:
    """A map with the text of its tokens, or over the image that it is of."""
    values = examples.unpacked(packed)
    rows, columns = values.shape
    on_image = bool(entry["grid"])
    said = f"{text}; {'most' if on_image else 'darkest'} {values.max():.2f}"
    cell, left, top = (240 / max(rows, columns), 0, 0) if on_image else (13, 92, 92)
    wide, high = cell * columns, cell * rows
    box = f'x="{left}" y="{top}" width="{wide:g}" height="{high:g}"'
    layers = [image, _drawn(values)] if on_image and image else [_drawn(values)]
    parts = [
        f'<image class="{"over" if at else "under"}" {box} preserveAspectRatio="none" '
        f'href="data:image/png;base64,{base64.b64encode(content).decode("ascii")}"/>'
        for at, content in enumerate(layers)
    ]
    parts.append(f'<rect class="frame" {box}/>')
    for at, word in enumerate(entry["queries"]):
        place = f'x="{left - 5}" y="{top + cell * at + cell - 3:g}" text-anchor="end"'
        parts.append(f'<text class="token" {place}>{escape(_short(word))}</text>')
    for at, word in enumerate(entry["keys"]):
        place = f"translate({left + cell * at + cell - 3:g} {top - 5}) rotate(-90)"
        parts.append(f'<text class="token" transform="{place}">{escape(_short(word))}</text>')
    return (
        f'<figure{" class=small" if on_image else ""}><svg viewBox="0 0 {left + wide + 1:g} {top + high + 1:g}" '
        f'role="img" aria-label="{escape(said)}">{"".join(parts)}</svg><figcaption>{escape(said)}</figcaption></figure>'
    )


def _short(word: Any) -> str:
    text = str(word)
    return text if len(text) <= 12 else f"{text[:11]}…"
