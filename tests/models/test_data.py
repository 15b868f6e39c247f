"""Rows: never in two splits, the same splits every time, batches that hold each once, files that bring them back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import pandas as pd
import pytest
import torch
from edgepress.errors import InputError
from edgepress.models import data
from edgepress.models.data import Data, Lazy, Rows
from hypothesis import given
from hypothesis import strategies as st


def test_splits_do_not_overlap_and_duplicates_are_gone(workload: Any) -> None:
    workload.data.check_disjoint()
    rows = [ids.tobytes() for split in data.SPLITS for ids in getattr(workload.data, split).inputs["input_ids"]]
    assert len(rows) == len(set(rows))


def test_splits_do_not_depend_on_the_order_of_the_file(
    model_folder: Path, reviews_csv: Path, workload: Any, tmp_path: Path
) -> None:
    frame = pd.read_csv(reviews_csv, dtype=str)
    shuffled = tmp_path / "shuffled.csv"
    pd.concat([frame[::-1], frame[:50]]).to_csv(shuffled, index=False)
    mapping = {"text": "review", "label": "stars"}
    again = ep.load(str(model_folder), str(shuffled), columns=mapping, max_length=64)
    assert again.data.evaluation.fingerprint == workload.data.evaluation.fingerprint


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
            assert lengths == [len(rows.inputs["input_ids"][row]) for row in batch.rows]
            assert batch.inputs["input_ids"].shape[1] == max(lengths)
        assert sorted(seen) == list(range(len(rows)))


def test_printed_rows_and_workloads_are_short(workload: Any) -> None:
    assert repr(workload.data.calibration) == f"Rows({len(workload.data.calibration)} of input_ids)"
    assert len(repr(replace(workload, module=torch.nn.Identity(), example={}))) < 20_000


@pytest.mark.parametrize("seed", [None, 3])
def test_batches_hold_no_more_tokens_than_asked_for(workload: Any, seed: int | None) -> None:
    rows, seen = workload.data.evaluation, []
    sizes = []
    for batch in rows.batches(17, tokens=60, seed=seed):
        seen += batch.rows.tolist()
        count, length = batch.inputs["input_ids"].shape
        assert count == 1 or (count <= 17 and count * length <= 60)
        sizes.append(count)
    assert sorted(seen) == list(range(len(rows)))
    assert max(sizes) > 1, "as many as there is room for"
    longest = int(rows.lengths.max())
    roomy, plain = (list(rows.batches(17, tokens=tokens, seed=seed)) for tokens in (17 * longest, None))
    assert [one.rows.tolist() for one in roomy] == [one.rows.tolist() for one in plain]


def made_up(count: int, labels: Any, start: int = 0) -> Rows:
    """Rows with tokens of many lengths and a picture each."""
    random = np.random.default_rng(start)
    ids = tuple(random.integers(1, 99, random.integers(1, 9)) for _ in range(count))
    images = Lazy(random.integers(0, 255, (count, 2, 3), dtype=np.uint8), lambda item: item.astype(np.float32) / 255)
    keys = tuple(data.key_of(array, np.array(start)) for array in ids)
    texts = tuple(f"text {row}" for row in range(count))
    return Rows({"input_ids": ids, "pixel_values": images}, labels, keys, {"input_ids": 7.0}, texts)


LABELS: list[Any] = [
    None,
    np.arange(40) % 3,
    np.linspace(0, 1, 40, dtype=np.float32),
    tuple(np.arange(1 + row % 4) for row in range(40)),
]


@pytest.mark.parametrize("labels", LABELS, ids=["none", "classes", "numbers", "tokens"])
def test_rows_of_every_kind_are_picked_padded_and_come_back_from_disk(labels: Any, tmp_path: Path) -> None:
    rows = made_up(40, labels)
    splits = Data(rows, rows.pick([3]), made_up(40, labels, 1), "f1")
    data.save(splits, tmp_path / "rows.npz")
    again = data.read(tmp_path / "rows.npz")
    assert again.metric == "f1"
    for name in data.SPLITS:
        before, after = getattr(splits, name), getattr(again, name)
        assert after.fingerprint == before.fingerprint
        for ours, theirs in zip(before.batches(7), after.batches(7), strict=True):
            assert set(ours.inputs) == {"input_ids", "attention_mask", "pixel_values"}
            for key, tensor in ours.inputs.items():
                torch.testing.assert_close(theirs.inputs[key], tensor, rtol=0, atol=0)
            assert (ours.labels is None) == (labels is None)
            if ours.labels is not None:
                torch.testing.assert_close(theirs.labels, ours.labels, rtol=0, atol=0)
    picked = rows.pick([5, 2])
    assert picked.texts == ("text 5", "text 2")
    assert picked.keys == (rows.keys[5], rows.keys[2])
    ids = picked.padded(np.array([0, 1]))["input_ids"]
    lengths = [len(rows.inputs["input_ids"][row]) for row in (5, 2)]
    assert ids.shape == (2, max(lengths))
    assert (ids[0, lengths[0] :] == 7).all()
    assert (ids[1, lengths[1] :] == 7).all()


def test_the_datas_own_split_is_kept() -> None:
    rows = made_up(100, np.arange(100) % 2)
    held_out = np.arange(100) >= 70
    found = data.split(rows, list(rows.keys), "accuracy", held_out=held_out, seed=0)
    unique = {key for key, held in zip(rows.keys, held_out, strict=True) if held}
    assert set(found.evaluation.keys) <= unique
    assert not set(found.train.keys) & set(found.evaluation.keys)
    with pytest.raises(InputError, match="0 rows for evaluation"):
        data.split(rows, list(rows.keys), "accuracy", held_out=np.zeros(100, dtype=bool), seed=0)
    with pytest.raises(InputError, match="3 distinct rows; at least 20"):
        data.split(rows.pick([0, 1, 2, 2]), list(rows.keys[:4]), "accuracy", held_out=None, seed=0)


def test_a_row_in_two_splits_is_noticed() -> None:
    rows = made_up(40, None)
    with pytest.raises(InputError, match="also in the"):
        Data(rows, rows.pick([0]), made_up(4, None, 1)).check_disjoint()
