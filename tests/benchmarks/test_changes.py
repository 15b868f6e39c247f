"""Which predictions changed: of classes, numbers and tokens, with labels and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import pytest
from edgepress.benchmarks import changes
from edgepress.benchmarks.changes import CHANGED, FARTHER, LOST, NEARER, OTHER, WON, Change
from edgepress.models import tasks
from edgepress.models.readable import Readable


def labelled(workload: Any, labels: Any) -> Any:
    rows = workload.data.evaluation
    return replace(workload, data=replace(workload.data, evaluation=replace(rows, labels=labels)))


def test_classes(workload: Any) -> None:
    rows = workload.data.evaluation
    before = np.eye(2, dtype=np.float32)[rows.labels] * 4  # all right
    after = before.copy()
    after[5] = after[5][::-1] * 0.5
    (one,) = changes.of(workload, before, after, Readable(workload)) or []
    names = workload.skeleton.labels
    right = int(rows.labels[5])
    assert (one.row, one.verdict, one.label) == (5, LOST, names[right])
    assert (one.before, one.after) == (names[right], names[1 - right])
    assert one.before_confidence == pytest.approx(1 / (1 + np.exp(-4)))
    assert one.after_confidence == pytest.approx(1 / (1 + np.exp(-2)))
    (back,) = changes.of(workload, after, before, Readable(workload)) or []
    assert back.verdict == WON
    blind = labelled(workload, None)
    (unknown,) = changes.of(blind, before, after, Readable(workload)) or []
    assert (unknown.verdict, unknown.label) == (CHANGED, "")


def test_a_wrong_answer_that_becomes_another_wrong_one() -> None:
    before, after = np.eye(3)[[0, 1]], np.eye(3)[[1, 1]]
    (one,) = changes._of_classes(before, after, np.array([2, 1]), "abc".__getitem__)
    assert (one.verdict, one.label, one.before, one.after) == (OTHER, "c", "a", "b")


def test_numbers_come_nearer_or_go_farther(workload: Any) -> None:
    rows = replace(workload.data.evaluation.pick([0, 1, 2]), labels=np.array([1.0, 1.0, 1.0], dtype=np.float32))
    listed = changes._of_numbers(rows, np.array([[0.0], [1.0], [0.5]]), np.array([[0.25], [2.0], [0.5]]))
    assert [(one.row, one.verdict) for one in listed] == [(1, FARTHER), (0, NEARER)]
    assert listed[1].before_confidence is None


def test_the_tokens_of_a_language_model() -> None:
    workload = ep.load("zoo:llama-stdlib")
    rows = workload.data.evaluation.pick([0, 1])
    workload = replace(workload, data=replace(workload.data, evaluation=rows))
    assert workload.task.by_token
    before = [np.stack([labels[labels >= 0], np.zeros((labels >= 0).sum())], axis=1) for labels in rows.labels]
    after = [answers.copy() for answers in before]
    place = len(after[1]) - 2
    after[1][place, 0] = (after[1][place, 0] + 1) % 100
    readable = Readable(workload)
    (one,) = changes.of(workload, before, after, readable) or []
    assert (one.row, one.token, one.verdict) == (1, place, LOST)
    ids = rows.inputs["input_ids"][1]
    assert one.text.endswith(f"[{readable.tokens([ids[place]])[0]}]"), "what comes next is the answer"
    assert one.label == one.before == readable.tokens([ids[place + 1]])[0]
    assert changes.judged(before, by_token=True) == sum(map(len, before))


def test_an_embedding_is_no_prediction(workload: Any) -> None:
    skeleton = replace(workload.skeleton, architecture="BertModel")
    encoder = replace(workload, skeleton=skeleton)
    assert encoder.task is tasks.EMBEDDING
    assert changes.of(encoder, np.zeros((2, 4)), np.ones((2, 4)), Readable(workload)) is None


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    listed = [
        Change(3, None, LOST, "a", "a", "b", 0.25, 0.75, 'two\nlines, "quoted" ünd <b>', "3.png"),
        Change(4, 7, CHANGED, "", "x", "y", None, None),
    ]
    changes.write(tmp_path / "changed.csv", listed)
    assert changes.read(tmp_path / "changed.csv") == listed
    assert dict(changes.counts(listed)) == {LOST: 1, CHANGED: 1}


def test_some_of_each_kind() -> None:
    lost = [Change(row, None, LOST, "a", "a", "b", None, None) for row in range(9)]
    won = [Change(row, None, WON, "a", "b", "a", None, None) for row in range(9, 11)]
    picked = changes.some([*lost, *won], 6)
    assert [one.row for one in picked] == [0, 1, 2, 3, 9, 10]
    assert changes.some([*lost, *won], 0) == []
    assert len(changes.some([*lost, *won], 100)) == 11


def test_texts_are_as_the_model_reads_them(workload: Any, reviews_csv: Path) -> None:
    import pandas as pd

    readable, rows = Readable(workload), workload.data.evaluation
    known = {"".join(text.lower().split()) for text in pd.read_csv(reviews_csv, dtype=str)["review"]}
    whole = [row for row in range(len(rows)) if rows.lengths[row] < workload.max_length]
    texts = ["".join(readable.text(rows, row).split()) for row in whole]
    plain = [text for text in texts if "[UNK]" not in text]
    assert len(plain) > 20
    assert sum(text in known for text in plain) > 0.9 * len(plain)  # but for accents, which this tokenizer takes off
    assert readable.thumbnail(rows, 0) == b""
