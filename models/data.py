"""Rows: what a model is calibrated, trained and judged on; split, batched, saved.

Every choice is a function of the rows' content and the seed, so that the same rows give the same splits on any machine.
Where rows come from is told in ``sources/``, how they become a model's inputs in ``encode.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError

Ints = NDArray[np.int64]
Array = NDArray[Any]
Labels = Array | tuple[Array, ...] | None

MIN_ROWS = 20
EVALUATION, CALIBRATION = 0.4, 0.15
MOST_EVALUATION, MOST_CALIBRATION = 3000, 512
SPLITS = ("train", "calibration", "evaluation")
NO_LABEL = -100
"""The label of a token that is not judged."""


@dataclass(frozen=True)
class Batch:
    rows: Ints
    """Positions in the split, shape [batch]."""
    inputs: dict[str, Tensor]
    """The model's inputs by name, the first axis [batch]."""
    labels: Tensor | None
    """[batch] of int64 (classes) or float32 (numbers), or [batch, tokens] of int64 with ``NO_LABEL`` for none."""

    def one_by_one(self) -> Iterator[Batch]:
        """Each row as a batch of its own, padded as here."""
        for place in range(len(self.rows)):
            part = slice(place, place + 1)
            labels = None if self.labels is None else self.labels[part]
            yield Batch(self.rows[part], {name: tensor[part] for name, tensor in self.inputs.items()}, labels)


@dataclass(frozen=True)
class Lazy(Sequence[Array]):
    """Arrays that are made when they are asked for: decoded images, log-mel frames."""

    items: Sequence[Any]
    make: Callable[[Any], Array]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: Any) -> Any:
        return self.make(self.items[position])


@dataclass(frozen=True, repr=False)
class Rows:
    """One split."""

    inputs: Mapping[str, Sequence[Array]]
    """Each row's array by the name of the model's input; of one name they differ in the length of the first axis."""
    labels: Labels
    """[n] of int64 (classes) or of float32 (numbers), or for every row one int64 a token, or None."""
    keys: tuple[bytes, ...]
    """A digest of each row's content: equal rows have equal keys."""
    pads: Mapping[str, float] = field(default_factory=dict)
    """What an input is padded with; 0 where it is not named."""
    texts: tuple[str, ...] = ()
    """The text that a generating model should produce, row by row."""

    def __len__(self) -> int:
        return len(self.keys)

    def __repr__(self) -> str:
        return f"Rows({len(self)} of {', '.join(self.inputs) or 'nothing'})"

    @cached_property
    def lengths(self) -> Ints:
        """Tokens of each row; 0 where rows are not made of tokens."""
        ids = self.inputs.get("input_ids", self.inputs.get("decoder_input_ids"))
        return np.array([0 if ids is None else len(ids[row]) for row in range(len(self))], dtype=np.int64)

    @property
    def classes(self) -> Ints | None:
        """The labels where each row has one class, else None."""
        whole = isinstance(self.labels, np.ndarray) and np.issubdtype(self.labels.dtype, np.integer)
        return self.labels if whole else None  # type: ignore[return-value] # whole says that it is an array

    def pick(self, positions: Sequence[int] | Ints) -> Rows:
        """The rows at ``positions``, in that order."""
        at = np.asarray(positions, dtype=np.int64)
        return replace(
            self,
            inputs={name: _picked(values, at) for name, values in self.inputs.items()},
            labels=self.labels[at] if isinstance(self.labels, np.ndarray) else self.labels and _picked(self.labels, at),
            keys=tuple(self.keys[i] for i in at),
            texts=tuple(self.texts[i] for i in at) if self.texts else (),
        )

    def take(self, count: int, seed: int = 0) -> Rows:
        """``count`` rows, each class in its share; all rows where there are no more."""
        if count >= len(self):
            return self
        order = np.random.default_rng(seed).permutation(len(self))
        chosen = order if self.classes is None else order[stratified(self.classes[order])]
        return self.pick(sorted(chosen[:count]))

    def batches(
        self, size: int, *, tokens: int | None = None, seed: int | None = None, skip: int = 0
    ) -> Iterator[Batch]:
        """All rows once, rows of similar length together, padded to the longest of each batch.

        A batch is ``size`` rows, or as many of them as make ``tokens`` with their padding, but one at least. With
        ``seed`` the rows of equal length and the order of the batches are shuffled; without, the order is fixed. The
        first ``skip`` batches are left out.
        """
        if not len(self):
            raise InputError("This needs rows: give a data file or folder with --data.")
        if seed is None:
            order = np.argsort(self.lengths, kind="stable")
        else:
            random = np.random.default_rng(seed)
            order = np.lexsort((random.random(len(self)), self.lengths))
        parts = _parts(self.lengths[order], size, tokens)
        if seed is not None:
            parts = [parts[place] for place in random.permutation(len(parts))]
        for part in parts[skip:]:
            rows = order[part]
            yield Batch(rows, self.padded(rows), self.padded_labels(rows))

    def padded(self, rows: Ints) -> dict[str, Tensor]:
        """The inputs of the given rows, each padded to its longest; ``attention_mask`` says where ``input_ids`` are."""
        inputs: dict[str, Tensor] = {}
        for name, values in self.inputs.items():
            arrays = [values[row] for row in rows]
            inputs[name] = torch.from_numpy(padded(arrays, self.pads.get(name, 0)))
            if name == "input_ids":
                mask = padded([np.ones(len(array), dtype=np.int64) for array in arrays], 0)
                inputs["attention_mask"] = torch.from_numpy(mask)
        return inputs

    def padded_labels(self, rows: Ints) -> Tensor | None:
        if self.labels is None:
            return None
        if isinstance(self.labels, np.ndarray):
            return torch.from_numpy(self.labels[rows])
        return torch.from_numpy(padded([self.labels[row] for row in rows], NO_LABEL))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over content and labels."""
        digest = hashlib.sha256(b"".join(self.keys))
        for labels in (self.labels,) if isinstance(self.labels, np.ndarray) else self.labels or ():
            digest.update(labels.tobytes())
        digest.update("\n".join(self.texts).encode())
        return digest.hexdigest()


def _parts(lengths: Ints, size: int, tokens: int | None) -> list[slice]:
    """Slices of at most ``size`` rows, of rising ``lengths``, whose padded tokens are at most ``tokens``."""
    if tokens is None:
        return [slice(start, start + size) for start in range(0, len(lengths), size)]
    parts, start = [], 0
    while start < len(lengths):
        end = start + 1
        while end < min(start + size, len(lengths)) and (end + 1 - start) * lengths[end] <= tokens:
            end += 1
        parts.append(slice(start, end))
        start = end
    return parts


def padded(arrays: Sequence[Array], value: float) -> Array:
    """``arrays``, which differ in their first axis, as one array [len(arrays), longest, …] filled up with ``value``."""
    longest = max(len(array) for array in arrays)
    whole = np.full((len(arrays), longest, *arrays[0].shape[1:]), value, dtype=arrays[0].dtype)
    for row, array in enumerate(arrays):
        whole[row, : len(array)] = array
    return whole


def _picked(values: Any, at: Ints) -> Any:
    if isinstance(values, Lazy):
        return replace(values, items=_picked(values.items, at))
    return values[at] if isinstance(values, np.ndarray) else tuple(values[i] for i in at)


@dataclass(frozen=True)
class Data:
    """The three splits of a workload; no row of one is in another."""

    train: Rows
    calibration: Rows
    evaluation: Rows
    metric: str = "accuracy"

    @classmethod
    def empty(cls, metric: str = "accuracy") -> Data:
        """No rows at all: enough to inspect a model, and to score and prune it by its weights."""
        nothing = Rows({}, None, ())
        return cls(nothing, nothing, nothing, metric)

    def check_disjoint(self) -> None:
        """Raise InputError where a row is in two splits."""
        seen: dict[bytes, str] = {}
        for name in reversed(SPLITS):
            for key in getattr(self, name).keys:
                other = seen.setdefault(key, name)
                if other != name:
                    raise InputError(f"A row of the {other} split is also in the {name} split.")


def split(rows: Rows, names: Sequence[bytes], metric: str, *, held_out: NDArray[np.bool_] | None, seed: int) -> Data:
    """Rows without repetitions, in three splits, each class in its share.

    ``names`` are what a row was before it was encoded: their hashes order the rows, so that the order does not depend
    on where a row stood in its file. ``held_out`` marks the rows that the data itself keeps for evaluation. Raises
    InputError where fewer than ``MIN_ROWS`` are left.
    """
    keep = first_of_each(rows.keys)
    if len(keep) < MIN_ROWS:
        raise InputError(f"There are {len(keep)} distinct rows; at least {MIN_ROWS} are needed.")
    order = keep[hashed_order([names[i] for i in keep], seed)]
    if rows.classes is not None:
        order = order[stratified(rows.classes[order])]
    evaluation = min(int(len(order) * EVALUATION), MOST_EVALUATION)
    if held_out is not None:
        judged, order = order[held_out[order]][:MOST_EVALUATION], order[~held_out[order]]
    else:
        judged, order = order[:evaluation], order[evaluation:]
    if not len(judged) or not len(order):
        raise InputError(f"The data's own split has {len(judged)} rows for evaluation and {len(order)} others.")
    calibration = max(1, min(int(len(order) * CALIBRATION / (1 - EVALUATION)), MOST_CALIBRATION))
    return Data(rows.pick(order[calibration:]), rows.pick(order[:calibration]), rows.pick(judged), metric)


def first_of_each(keys: Sequence[bytes]) -> Ints:
    """Positions of the first row of each distinct key: what the model cannot tell apart is one row."""
    first: dict[bytes, int] = {}
    for position, key in enumerate(keys):
        first.setdefault(key, position)
    return np.array(sorted(first.values()), dtype=np.int64)


def key_of(*arrays: Array) -> bytes:
    """The digest of a row's arrays."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.digest()


def hashed_order(names: Sequence[bytes], seed: int) -> Ints:
    """An order that depends on the rows' names and the seed alone."""
    keys = [hashlib.sha256(f"{seed}\n".encode() + name).digest() for name in names]
    return np.array(sorted(range(len(names)), key=keys.__getitem__), dtype=np.int64)


def stratified(labels: Ints) -> Ints:
    """An order in which every prefix holds each label in its share: rows sorted by their rank within their label."""
    place = np.empty(len(labels))
    for label in np.unique(labels):
        of_label = np.flatnonzero(labels == label)
        place[of_label] = (np.arange(len(of_label)) + 0.5) / len(of_label)
    return np.argsort(place, kind="stable")


# ---- on disk


def save(data: Data, path: Path) -> None:
    """Write all rows to an ``.npz`` file; rows of another length side by side, with their lengths."""
    arrays: dict[str, Array] = {"metric": np.array(data.metric)}
    for name in SPLITS:
        rows: Rows = getattr(data, name)
        arrays[f"{name}/keys"] = np.frombuffer(b"".join(rows.keys), dtype=np.uint8)
        arrays[f"{name}/texts"] = np.array(rows.texts, dtype=np.str_)
        columns = {f"inputs/{key}": list(values) for key, values in rows.inputs.items()}
        if isinstance(rows.labels, np.ndarray):
            arrays[f"{name}/classes"] = rows.labels
        elif rows.labels is not None:
            columns["labels"] = list(rows.labels)
        for key, values in columns.items():
            if values:
                arrays[f"{name}/{key}"] = np.concatenate(values)
                arrays[f"{name}/{key}/lengths"] = np.array([len(value) for value in values])
        for key, pad in rows.pads.items():
            arrays[f"{name}/pads/{key}"] = np.array(pad)
    np.savez_compressed(path, allow_pickle=False, **arrays)


def read(path: Path) -> Data:
    """The rows that :func:`save` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        found = dict(arrays)
    train, calibration, evaluation = (_read(found, f"{name}/") for name in SPLITS)
    return Data(train, calibration, evaluation, str(found["metric"]))


def _read(found: Mapping[str, Array], split: str) -> Rows:
    def apart(name: str) -> tuple[Array, ...]:
        ends = np.cumsum(found[f"{name}/lengths"])[:-1]
        return tuple(np.split(found[name], ends))

    def below(part: str) -> dict[str, str]:
        names = [name for name in found if name.startswith(split + part) and not name.endswith("/lengths")]
        return {name.removeprefix(split + part): name for name in names}

    digests = found[split + "keys"].tobytes()
    labels: Labels = found.get(split + "classes")
    if split + "labels" in found:
        labels = apart(split + "labels")
    return Rows(
        inputs={key: apart(name) for key, name in below("inputs/").items()},
        labels=labels,
        keys=tuple(digests[i : i + 32] for i in range(0, len(digests), 32)),
        pads={key: found[name].item() for key, name in below("pads/").items()},
        texts=tuple(map(str, found[split + "texts"])),
    )
