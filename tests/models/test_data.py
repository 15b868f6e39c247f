"""Rows: read or refused in one sentence, never in two splits, the same splits every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from edgepress.errors import EdgepressError, InputError
from edgepress.models import data
from hypothesis import given
from hypothesis import strategies as st


def test_splits_do_not_overlap_and_duplicates_are_gone(workload: Any) -> None:
    workload.data.check_disjoint()
    rows = [
        ids.tobytes()
        for split in ("train", "calibration", "evaluation")
        for ids in getattr(workload.data, split).token_ids
    ]
    assert len(rows) == len(set(rows))


def test_splits_do_not_depend_on_the_order_of_the_file(
    model_folder: Path, reviews_csv: Path, workload: Any, tmp_path: Path
) -> None:
    frame = pd.read_csv(reviews_csv, dtype=str)
    shuffled = tmp_path / "shuffled.csv"
    pd.concat([frame[::-1], frame[:50]]).to_csv(shuffled, index=False)
    mapping = {"text": "review", "label": "stars"}
    again = data.load(str(shuffled), model_folder, ("negative", "positive"), columns=mapping, max_length=64)
    assert again.evaluation.fingerprint == workload.data.evaluation.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "is empty"),
        ("b.csv", "text,label\n", "no rows"),
        ("c.csv", "review,stars\ngood,1\n", "no column 'text'.*review, stars"),
        ("d.csv", "text,label\ngood,1\n,0\n", "row 2"),
        ("e.csv", 'text,label\n"open,1\n', "cannot be read|nothing in"),
        ("f.jsonl", "{not json}\n", "cannot be read"),
        ("g.xlsx", "x", "not a .csv"),
    ],
)
def test_bad_tables_are_one_sentence(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(EdgepressError, match=message):
        data.read_table(path, {})


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        data.read_table(path, {})


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_three_formats_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    lines = {
        ".csv": 'text,label\n"a, b",1\nnull,0\n',
        ".tsv": "text\tlabel\na, b\t1\nnull\t0\n",
        ".jsonl": '{"text": "a, b", "label": 1}\n{"text": "null", "label": 0}\n',
    }
    path = tmp_path / f"rows{suffix}"
    path.write_text(lines[suffix])
    assert data.read_table(path, {}) == (["a, b", "null"], ["1", "0"])


def test_labels_by_name_by_number_and_from_one() -> None:
    names = ("bad", "fair", "good")
    assert data.label_indices(["Good", "bad"], names, "f").tolist() == [2, 0]
    assert data.label_indices(["2", "0"], names, "f").tolist() == [2, 0]
    assert data.label_indices(["1", "2", "3"], names, "f").tolist() == [0, 1, 2]
    for words, message in (
        (["0", "7"], "'7'"),
        (["1", "1"], "at least two"),
        (["2", "3"], "'3'"),
        (["bad", "1"], "label"),
    ):
        with pytest.raises(InputError, match=message):
            data.label_indices(words, names, "f")


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60))
def test_every_prefix_of_a_stratified_order_has_the_labels_in_their_share(labels: list[int]) -> None:
    array = np.array(labels)
    order = data.stratified(array)
    assert sorted(order.tolist()) == list(range(len(labels)))
    for label in set(labels):
        seen = np.cumsum(array[order] == label)
        expected = np.arange(1, len(labels) + 1) * (labels.count(label) / len(labels))
        assert np.abs(seen - expected).max() <= 2


def test_batches_hold_every_row_once_and_pad_with_mask(workload: Any) -> None:
    rows = workload.data.evaluation
    for seed in (None, 3):
        seen = []
        for batch in rows.batches(17, seed=seed):
            seen += batch.rows.tolist()
            lengths = batch.inputs["attention_mask"].sum(dim=1).tolist()
            assert lengths == [len(rows.token_ids[row]) for row in batch.rows]
            assert batch.inputs["input_ids"].shape[1] == max(lengths)
        assert sorted(seen) == list(range(len(rows)))
