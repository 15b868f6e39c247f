"""Labelled rows: read, cleaned of duplicates, split, tokenised, batched.

Every choice is a function of the texts and the seed, so that the same rows give the same splits on any machine.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError, UnavailableError, UsageError

Ints = NDArray[np.int64]

MIN_ROWS = 20
EVALUATION, CALIBRATION = 0.4, 0.15
MOST_EVALUATION, MOST_CALIBRATION = 3000, 512


@dataclass(frozen=True)
class Batch:
    rows: Ints
    """Positions in the split, shape [batch]."""
    inputs: dict[str, Tensor]
    """``input_ids`` and ``attention_mask``, int64, shape [batch, sequence]."""
    labels: Tensor
    """int64, shape [batch]."""


@dataclass(frozen=True)
class Rows:
    """One split: token ids of each row (with the special tokens) and its label's index."""

    token_ids: tuple[Ints, ...]
    labels: Ints
    pad_id: int

    def __len__(self) -> int:
        return len(self.token_ids)

    def take(self, count: int, seed: int = 0) -> Rows:
        """``count`` rows, each label in its share; all rows where there are no more."""
        if count >= len(self):
            return self
        order = np.random.default_rng(seed).permutation(len(self))
        chosen = sorted(order[stratified(self.labels[order])[:count]])
        return Rows(tuple(self.token_ids[i] for i in chosen), self.labels[chosen], self.pad_id)

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """All rows once, rows of similar length together, padded to the longest of each batch.

        With ``seed`` the rows of equal length and the order of the batches are shuffled; without, the order is fixed.
        """
        if not len(self):
            raise InputError("This needs labelled rows: give a CSV, TSV or JSONL file with --data.")
        lengths = np.array([len(ids) for ids in self.token_ids])
        if seed is None:
            order = np.argsort(lengths, kind="stable")
            starts = np.arange(0, len(self), size)
        else:
            random = np.random.default_rng(seed)
            order = np.lexsort((random.random(len(self)), lengths))
            starts = random.permutation(np.arange(0, len(self), size))
        for start in starts:
            rows = order[start : start + size]
            yield Batch(rows, self.padded(rows), torch.from_numpy(self.labels[rows]))

    def padded(self, rows: Ints) -> dict[str, Tensor]:
        """The inputs of the given rows as tensors of shape [len(rows), longest of them]."""
        longest = max(len(self.token_ids[row]) for row in rows)
        ids = np.full((len(rows), longest), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        for position, row in enumerate(rows):
            tokens = self.token_ids[row]
            ids[position, : len(tokens)] = tokens
            mask[position, : len(tokens)] = 1
        return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over tokens and labels."""
        digest = hashlib.sha256(self.labels.tobytes())
        for ids in self.token_ids:
            digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Data:
    """The three splits of a workload; no row of one is in another."""

    train: Rows
    calibration: Rows
    evaluation: Rows
    metric: str = "accuracy"

    @classmethod
    def empty(cls) -> Data:
        """No rows at all: enough to inspect a model, and to score and prune it by its weights."""
        nothing = Rows((), np.array([], dtype=np.int64), 0)
        return cls(nothing, nothing, nothing)

    def check_disjoint(self) -> None:
        """Raise InputError where a row is in two splits."""
        seen: dict[bytes, str] = {}
        for name in ("evaluation", "calibration", "train"):
            for ids in getattr(self, name).token_ids:
                other = seen.setdefault(ids.tobytes(), name)
                if other != name:
                    raise InputError(f"A row of the {other} split is also in the {name} split.")


def load(
    path: str,
    tokenizer_folder: Path,
    label_names: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
    max_length: int = 128,
) -> Data:
    """The rows of a CSV, TSV or JSONL file, split and tokenised with the tokenizer in ``tokenizer_folder``."""
    texts, words = read_table(Path(path), columns or {})
    labels = label_indices(words, label_names, path)
    tokenizer = load_tokenizer(tokenizer_folder)
    rows = tokenise(texts, labels, tokenizer, max_length)
    keep = first_of_each(rows)
    order = keep[hashed_order([texts[i] for i in keep], seed)]
    order = order[stratified(labels[order])]
    if len(order) < MIN_ROWS:
        raise InputError(f"{path} has {len(order)} distinct rows; at least {MIN_ROWS} are needed.")
    evaluation = min(int(len(order) * EVALUATION), MOST_EVALUATION)
    calibration = min(int(len(order) * CALIBRATION), MOST_CALIBRATION)
    return Data(
        train=select(rows, order[evaluation + calibration :]),
        calibration=select(rows, order[evaluation : evaluation + calibration]),
        evaluation=select(rows, order[:evaluation]),
    )


def read_table(path: Path, columns: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Texts and labels of a CSV, TSV or JSONL file, as strings.

    ``columns`` maps ``text`` and ``label`` to the file's own column names. Raises InputError, naming the file and what
    is wrong in it, for anything that cannot be used.
    """
    frame = _frame(path)
    picked: dict[str, list[str]] = {}
    for field in ("text", "label"):
        column = columns.get(field, field)
        if column not in frame.columns:
            raise InputError(
                f"{path} has no column '{column}' (it has: {', '.join(map(str, frame.columns))}); "
                f"map it with --columns text=…,label=…."
            )
        values = ["" if pd.isna(value) else str(value).strip() for value in frame[column]]
        empty = [position for position, value in enumerate(values) if not value]
        if empty:
            raise InputError(f"{path}: {len(empty)} rows have nothing in '{column}', the first is row {empty[0] + 1}.")
        picked[field] = values
    if not picked["text"]:
        raise InputError(f"{path} has no rows.")
    return picked["text"], picked["label"]


def _frame(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise InputError(f"There is no data file '{path}'.")
    readers: dict[str, Any] = {
        ".csv": lambda: pd.read_csv(path, dtype=str, keep_default_na=False),
        ".tsv": lambda: pd.read_csv(path, dtype=str, keep_default_na=False, sep="\t"),
        ".jsonl": lambda: pd.read_json(path, lines=True, dtype=False),
    }
    if path.suffix.lower() not in readers:
        if path.suffix.lower() in {".npz"} or path.is_dir():
            raise UnavailableError(f"{path}: only CSV, TSV and JSONL files can be read in this version.")
        raise UsageError(f"{path} is not a .csv, .tsv or .jsonl file.")
    try:
        frame: pd.DataFrame = readers[path.suffix.lower()]()
    except pd.errors.EmptyDataError as error:
        raise InputError(f"{path} is empty.") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start} cannot be decoded); convert it first."
        ) from error
    except (pd.errors.ParserError, ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    if frame.empty and not len(frame.columns):
        raise InputError(f"{path} is empty.")
    return frame


def label_indices(words: Sequence[str], names: Sequence[str], origin: str) -> Ints:
    """Label words as indices of the model's ``names``: by name, or as the integers 0 … n-1, or 1 … n where all n occur.

    Raises InputError where a word fits neither, or where all rows have one label.
    """
    counts = Counter(words)
    if len(counts) < 2:
        raise InputError(
            f"{origin}: all {len(words)} rows have the label '{words[0]}'; at least two labels are needed."
        )
    by_name = {name.lower(): index for index, name in enumerate(names)}
    by_number = {str(index): index for index in range(len(names))}
    from_one = {str(index + 1): index for index in range(len(names))}
    for known in (by_name, by_number, from_one):
        if set(map(str.lower, counts)) <= set(known) and (known is not from_one or len(counts) == len(names)):
            return np.array([known[word.lower()] for word in words], dtype=np.int64)
    strange = next((word for word in counts if word.lower() not in by_name and word not in by_number), "")
    raise InputError(
        f"{origin}: the label '{strange}' ({counts[strange]} rows) is not one of the model's {len(names)} labels: "
        f"{', '.join(names)}, or 0 to {len(names) - 1}."
    )


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer in ``folder``; nothing is downloaded and no code from the folder is run."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise InputError(f"The tokenizer in {folder} cannot be loaded: {str(error).splitlines()[0]}") from error


def tokenise(texts: Sequence[str], labels: Ints, tokenizer: Any, max_length: int) -> Rows:
    """Rows of at most ``max_length`` tokens; longer texts lose their end."""
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)
    ids = tuple(np.array(tokens, dtype=np.int64) for tokens in encoded["input_ids"])
    return Rows(ids, labels, int(tokenizer.pad_token_id or 0))


def select(rows: Rows, positions: Ints) -> Rows:
    return Rows(tuple(rows.token_ids[i] for i in positions), rows.labels[positions], rows.pad_id)


def first_of_each(rows: Rows) -> Ints:
    """Positions of the first row of each distinct token sequence: what the model cannot tell apart is one row."""
    first: dict[bytes, int] = {}
    for position, ids in enumerate(rows.token_ids):
        first.setdefault(ids.tobytes(), position)
    return np.array(sorted(first.values()), dtype=np.int64)


def hashed_order(texts: Sequence[str], seed: int) -> Ints:
    """An order that depends on the texts and the seed alone, not on where they stood in their file."""
    keys = [hashlib.sha256(f"{seed}\n{text}".encode()).digest() for text in texts]
    return np.array(sorted(range(len(texts)), key=keys.__getitem__), dtype=np.int64)


def stratified(labels: Ints) -> Ints:
    """An order in which every prefix holds each label in its share: rows sorted by their rank within their label."""
    place = np.empty(len(labels))
    for label in np.unique(labels):
        of_label = np.flatnonzero(labels == label)
        place[of_label] = (np.arange(len(of_label)) + 0.5) / len(of_label)
    return np.argsort(place, kind="stable")
