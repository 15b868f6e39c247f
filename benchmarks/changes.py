"""Changes: the evaluation rows, or tokens, that the original and what was made of it answer differently.

A metric says how many answers got worse; the rows say which. They are compared through the answers that both artifacts
gave, row by row.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from ..errors import InputError
from ..models import tasks
from ..models.data import Rows
from ..models.readable import Readable
from ..models.workload import Workload

LOST, WON, OTHER, CHANGED = "right to wrong", "wrong to right", "wrong to other", "changed"
FARTHER, NEARER = "farther", "nearer"
VERDICTS = (LOST, WON, OTHER, CHANGED, FARTHER, NEARER)
"""What became of an answer. Numbers always move, so that of them it is said whether they came nearer to the label;
``CHANGED`` is all that can be said without one."""
LEFT, RIGHT = 24, 8
"""Tokens shown before a token that is answered differently, and after it."""


@dataclass(frozen=True)
class Change:
    row: int
    """Position in the evaluation split."""
    token: int | None
    verdict: str
    label: str
    before: str
    after: str
    before_confidence: float | None
    """Share of the softmax that the answer has; None where answers are numbers or those of tokens."""
    after_confidence: float | None
    text: str = ""
    image: str = ""
    """File name of a thumbnail."""


def of(workload: Workload, before: Any, after: Any, readable: Readable) -> list[Change] | None:
    """The changes from the answers ``before`` to those ``after`` to the evaluation rows of ``workload``, worst first:
    what was right and is wrong, what is right now, then the rest; numbers by how far they moved.

    None where an answer is no prediction, as an embedding is not.
    """
    task, rows = workload.task, workload.data.evaluation
    if task.by_token:
        found = _of_tokens(workload, rows, before, after, readable)
    elif task is tasks.REGRESSION:
        found = _of_numbers(rows, before, after)
    elif task in {tasks.CLASSIFICATION, tasks.RETRIEVAL}:
        pairs = task is tasks.RETRIEVAL
        known = np.arange(len(rows)) if pairs else rows.labels
        names = [f"row {row}" for row in range(len(rows))] if pairs else list(workload.skeleton.labels)
        found = _of_classes(before, after, known, lambda at: names[at] if at < len(names) else str(at))
    else:
        return None
    if not task.by_token:
        found = [replace(one, text=readable.text(rows, one.row)) for one in found]
    return found


def _of_classes(before: Any, after: Any, labels: Any, name: Callable[[int], str]) -> list[Change]:
    first, second = np.asarray(before).argmax(axis=1), np.asarray(after).argmax(axis=1)
    sure, now = (softmax(np.asarray(x, dtype=np.float64), axis=1).max(axis=1) for x in (before, after))
    found = []
    for row in map(int, np.flatnonzero(first != second)):
        label = None if labels is None else int(labels[row])
        verdict = _verdict(label, int(first[row]), int(second[row]))
        said = "" if label is None else name(label)
        answers = name(int(first[row])), name(int(second[row]))
        found.append(Change(row, None, verdict, said, *answers, float(sure[row]), float(now[row])))
    return sorted(found, key=lambda one: (VERDICTS.index(one.verdict), -(one.after_confidence or 0)))


def _verdict(label: int | None, before: int, after: int) -> str:
    if label is None:
        return CHANGED
    return LOST if before == label else WON if after == label else OTHER


def _of_numbers(rows: Rows, before: Any, after: Any) -> list[Change]:
    first, second = (np.asarray(x, dtype=np.float64).reshape(len(rows), -1)[:, 0] for x in (before, after))
    found = []
    for row in map(int, np.argsort(-np.abs(first - second), kind="stable")):
        if first[row] == second[row]:
            break
        verdict, label = CHANGED, ""
        if isinstance(rows.labels, np.ndarray):
            true = float(rows.labels[row])
            verdict = FARTHER if abs(second[row] - true) > abs(first[row] - true) else NEARER
            label = f"{true:.4g}"
        found.append(Change(row, None, verdict, label, f"{first[row]:.4g}", f"{second[row]:.4g}", None, None))
    return found


def _of_tokens(workload: Workload, rows: Rows, before: Any, after: Any, readable: Readable) -> list[Change]:
    """Of language models an answer is the token that comes next, so what follows is not shown."""
    words = workload.skeleton.labels if workload.task is tasks.TOKENS else ()
    ids = rows.inputs.get("decoder_input_ids", rows.inputs.get("input_ids"))
    found = []

    def name(at: int) -> str:
        return words[at] if at < len(words) else readable.tokens([at])[0]

    for row, (first, second) in enumerate(zip(before, after, strict=True)):
        known = None if rows.labels is None else np.asarray(rows.labels[row])
        places = np.arange(len(first)) if known is None else np.flatnonzero(known >= 0)
        for at in map(int, np.flatnonzero(first[:, 0] != second[:, 0])):
            place, answers = int(places[at]), (int(first[at, 0]), int(second[at, 0]))
            label = None if known is None else int(known[place])
            said = "" if label is None else name(label)
            ahead = RIGHT if words else 0
            text = "" if ids is None else _around(readable.tokens, ids[row], place, ahead)
            verdict = _verdict(label, *answers)
            found.append(Change(row, place, verdict, said, name(answers[0]), name(answers[1]), None, None, text))
    return sorted(found, key=lambda one: VERDICTS.index(one.verdict))


def _around(tokens: Callable[[Sequence[int]], list[str]], ids: Any, place: int, ahead: int) -> str:
    start = max(0, place - LEFT)
    shown = tokens(ids[start : place + 1 + ahead])
    at = place - start
    cut = ["…"] if start else []
    return " ".join([*cut, *shown[:at], f"[{shown[at]}]", *shown[at + 1 :]])


# ---- on disk


def write(path: Path, changes: Sequence[Change]) -> None:
    """Write all of them to a CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Change)])
        table.writeheader()
        table.writerows(asdict(change) for change in changes)


def read(path: Path) -> list[Change]:
    """What :func:`write` wrote; InputError where the file holds something else."""
    try:
        lines = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
        return [_change(line) for line in lines]
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} cannot be read as a list of changed predictions: {error}.") from error


def _change(line: dict[str, Any]) -> Change:
    if line["verdict"] not in VERDICTS or Path(line["image"]).name != line["image"]:
        raise ValueError(f"row {line['row']} says '{line['verdict']}', image '{line['image']}'")
    return Change(
        int(line["row"]),
        int(line["token"]) if line["token"] else None,
        *(line[name] for name in ("verdict", "label", "before", "after")),
        *(float(line[name]) if line[name] else None for name in ("before_confidence", "after_confidence")),
        *(line[name] for name in ("text", "image")),
    )


def counts(changes: Sequence[Change]) -> Iterator[tuple[str, int]]:
    """How many there are of each verdict that occurs, in the order of ``VERDICTS``."""
    found = Counter(change.verdict for change in changes)
    return ((verdict, found[verdict]) for verdict in VERDICTS if found[verdict])


def some(changes: Sequence[Change], count: int) -> list[Change]:
    """So many of them, as even a number of each verdict as there are, in their order."""
    left = {verdict: [change for change in changes if change.verdict == verdict] for verdict in VERDICTS}
    picked: list[Change] = []
    while len(picked) < count and any(left.values()):
        picked += [of_kind.pop(0) for of_kind in left.values() if of_kind][: count - len(picked)]
    return sorted(picked, key=lambda change: VERDICTS.index(change.verdict))


def judged(answers: Any, by_token: bool) -> int:
    """How many answers were compared: rows, or tokens of all rows."""
    return sum(map(len, answers)) if by_token else len(answers)
