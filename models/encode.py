"""Encoding: rows as they were found become the inputs that a model takes, and the labels that it is judged by.

Texts go through the tokenizer in the model's folder, images and recordings through its processor, arrays as they are.
What is large is encoded when a batch asks for it.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError, UnavailableError
from . import cells, media, sources, tasks
from .data import NO_LABEL, SPLITS, Array, Data, Ints, Labels, Lazy, Rows, key_of, split
from .skeleton import Skeleton
from .sources import NO_COLUMN, Table
from .tasks import Task
from .workload import VOCABULARIES, Workload


@dataclass(frozen=True)
class Reader:
    """What a model says about the rows that it reads."""

    folder: Path | None
    """Where its tokenizer and processor are; None for a function's module, which takes arrays."""
    skeleton: Skeleton
    example: Mapping[str, Tensor]
    max_length: int

    @property
    def task(self) -> Task:
        return tasks.of(self.skeleton.architecture, self.skeleton.config, len(self.skeleton.labels))

    @property
    def decodes(self) -> bool:
        """Whether it is a decoder, which classifies a text by its last token."""
        return self.skeleton.family.name in {"gpt2", "llama"}

    def check(self, rows: Rows) -> None:
        """Raise InputError where a token is none of those that the model knows."""
        config = self.skeleton.config
        known = config.get("text_config", config).get("vocab_size", 1 << 62)
        tokens = (rows.inputs.get(name, ()) for name in ("input_ids", "decoder_input_ids") if self.folder)
        most = max((int(ids.max()) for of_rows in tokens for ids in of_rows if len(ids)), default=0)
        if most >= known:
            raise InputError(f"The tokenizer in {self.folder} makes token {most}; the model knows {known}, from 0 on.")


def load(data: str, reader: Reader, *, columns: Mapping[str, str] | None = None, seed: int = 0) -> Data:
    """The rows called ``data`` as ``reader``'s model takes them, in three splits.

    Raises InputError, naming the rows' origin, for anything in them that does not fit the model.
    """
    own = {} if reader.folder else {name: name for name in reader.example}
    named = {**own, **(columns or {})}
    table = sources.read(data, named, seed=seed)
    if reader.skeleton.config.get("problem_type") == "multi_label_classification":
        raise UnavailableError("Rows with several labels each cannot be judged in this version.")
    rows, names, of_row = _rows(table, named, reader)
    reader.check(rows)
    held_out = table.held_out[of_row] if table.held_out is not None else None
    try:
        return split(rows, names, default_metric(rows, reader), held_out=held_out, seed=seed)
    except InputError as error:
        raise InputError(f"{table.origin}: {error}") from error


def with_rows(
    workload: Workload, data: str, folder: Path | None, *, columns: Mapping[str, str] | None = None, seed: int = 0
) -> Workload:
    """``workload`` with the rows called ``data``; ``folder`` holds its tokenizer and processor.

    The classes of a function's module are its outputs, called by their numbers.
    """
    reader = Reader(folder, workload.skeleton, workload.example, workload.max_length)
    rows, example = fitted(load(data, reader, columns=columns, seed=seed), workload.module, workload.example)
    origin = f"{workload.origin} and {data}"
    workload = replace(workload, data=rows, example=example, origin=origin)
    if folder is None and workload.task is tasks.CLASSIFICATION:
        classes = _answer(workload, data).shape[-1]
        seen = {label for name in SPLITS for label in getattr(rows, name).labels.tolist()}
        strange = [label for label in seen if not 0 <= label < classes]
        if strange:
            raise InputError(
                f"{data}: a row has class {max(strange)}, and the model tells {classes} classes apart, from 0 on."
            )
        workload = replace(workload, skeleton=replace(workload.skeleton, labels=tuple(map(str, range(classes)))))
    if folder is None and workload.task is tasks.EMBEDDING:
        answer = _answer(workload, data)
        if answer.numel() == 1 or (answer.dim() > 2 and answer.shape[-1] == 1):  # between numbers there is no angle
            workload = replace(workload, data=replace(rows, metric=tasks.REGRESSION.fidelity))
    return workload


def _answer(workload: Workload, data: str) -> Tensor:
    """What a function's module answers to a row; InputError where it fails."""
    try:
        with torch.no_grad():
            return workload.forward(next(workload.data.evaluation.batches(1)).inputs)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{data}: {workload.name} fails on a row with {why}.") from error


def fitted(data: Data, module: nn.Module, example: Mapping[str, Tensor]) -> tuple[Data, dict[str, Tensor]]:
    """Rows without the inputs that ``module`` does not take, and ``example`` with those that rows have beyond it."""
    taken = inspect.signature(module.forward).parameters
    splits = {}
    for name in SPLITS:
        rows: Rows = getattr(data, name)
        inputs = {key: values for key, values in rows.inputs.items() if key in taken or key in example}
        splits[name] = replace(rows, inputs=inputs)
    extra = {key for key in splits["evaluation"].inputs if key not in example} & {"token_type_ids"}
    return Data(**splits, metric=data.metric), {
        **example,
        **{key: torch.zeros_like(example["input_ids"]) for key in extra},
    }


def default_metric(rows: Rows, reader: Reader) -> str:
    """What the answers are judged by where nobody says it: fidelity to the original where rows have no labels."""
    task = tasks.of_labels(rows.labels) if reader.folder is None else reader.task
    if rows.labels is None and task is not tasks.RETRIEVAL:
        return task.fidelity
    return "wer" if task is tasks.GENERATION and "input_features" in rows.inputs else task.metrics[0]


def _rows(table: Table, columns: Mapping[str, str], reader: Reader) -> tuple[Rows, list[bytes], Ints]:
    """The rows of a table, the name of each, and the table's row that each comes from."""
    everything = np.arange(len(table))
    if reader.folder is None:
        return *_arrays(table, columns, reader), everything
    if reader.task is tasks.LANGUAGE:
        return _language(table, columns, reader)
    if reader.task is tasks.TOKENS:
        return *_tokens(table, columns, reader), everything
    inputs: dict[str, Sequence[Array]] = {}
    pads: dict[str, float] = {}
    names = [b""] * len(table)
    texts: tuple[str, ...] = ()
    labels: Any = None
    if "input_ids" in reader.example:
        inputs, pads, names = _texts(table, columns, reader)
    if "pixel_values" in reader.example:
        values = sources.column(table, "image", columns)
        channels = reader.example["pixel_values"].shape[1]
        prepare = media.image_preparer(reader.folder, channels, _shape(reader, "pixel_values"))
        inputs["pixel_values"] = Lazy(values, prepare)
        names = [name + media.digest(values[i]) for i, name in enumerate(names)]
    if "input_features" in reader.example:
        values = sources.column(table, "audio", columns)
        prepare = media.audio_preparer(reader.folder, _shape(reader, "input_features"))
        inputs["input_features"] = Lazy(values, prepare)
        names = [media.digest(values[i]) for i in range(len(table))]
    if reader.task is tasks.GENERATION:
        field = "target" if "input_ids" in reader.example else "text"
        if _has_labels(table, columns, field, reader):
            texts = tuple(cells.texts(table, field, columns))
            labels, inputs["decoder_input_ids"] = _targets(texts, reader)
        else:
            inputs["decoder_input_ids"] = _starts(len(table), reader)
    elif reader.task in {tasks.CLASSIFICATION, tasks.REGRESSION} and _has_labels(table, columns, "label", reader):
        labels = _labels(table, columns, reader)
    ids = inputs.get("input_ids")
    others = ids is None or len(inputs) > 1
    keys = [hashlib.sha256(n).digest() for n in names] if others else [key_of(i) for i in ids or ()]
    return Rows(inputs, labels, tuple(keys), pads, texts), names, everything


def _texts(
    table: Table, columns: Mapping[str, str], reader: Reader
) -> tuple[dict[str, Sequence[Array]], dict[str, float], list[bytes]]:
    """The tokens of each text, or pair of texts, their padding, and the texts."""
    assert reader.folder is not None
    tokenizer = load_tokenizer(reader.folder)
    parts = [cells.texts(table, "text", columns)]
    if "text_pair" in columns or "text_pair" in table.columns:
        parts.append(cells.texts(table, "text_pair", columns))
    encoded = tokenizer(*parts, truncation=True, max_length=reader.max_length, return_attention_mask=False)
    inputs: dict[str, Sequence[Array]] = {"input_ids": _ids(encoded["input_ids"])}
    if len(parts) > 1 and "token_type_ids" in encoded:
        inputs["token_type_ids"] = _ids(encoded["token_type_ids"])
    names = ["\0".join(row).encode() for row in zip(*parts, strict=True)]
    return inputs, {"input_ids": _pad(tokenizer, reader)}, names


def _shape(reader: Reader, name: str) -> tuple[int, ...]:
    return tuple(reader.example[name].shape[1:])


def _ids(lists: Sequence[Sequence[int]]) -> tuple[Ints, ...]:
    return tuple(np.array(ids, dtype=np.int64) for ids in lists)


def _has_labels(table: Table, columns: Mapping[str, str], field: str, reader: Reader) -> bool:
    """Whether the rows have labels: not where the user says so, nor where there is nothing that could be one."""
    if columns.get(field) == NO_COLUMN:
        return False
    inputs = {columns.get(name, name) for name in sources.FIELDS if name not in {"label", field}} | set(reader.example)
    return field in columns or field in table.columns or not set(table.columns) <= inputs


def _labels(table: Table, columns: Mapping[str, str], reader: Reader) -> Array:
    name = columns.get("label", "label")
    values = cells.filled(sources.column(table, "label", columns), table, name)
    if reader.task is tasks.REGRESSION:
        return cells.numbers(values, table, name)
    return cells.classes(cells.words(values, table), reader.skeleton.labels, table)


# ---- token by token


def _language(table: Table, columns: Mapping[str, str], reader: Reader) -> tuple[Rows, list[bytes], Ints]:
    """Each text in windows of at most ``max_length`` tokens; a token's label is the one after it.

    A model of masked tokens has no labels: it is judged by what it answers.
    """
    assert reader.folder is not None
    tokenizer = load_tokenizer(reader.folder)
    texts = cells.texts(table, "text", columns)
    encoded = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    windows = [
        (row, np.array(ids[start : start + reader.max_length], dtype=np.int64))
        for row, ids in enumerate(encoded)
        for start in range(0, len(ids), reader.max_length)
    ]
    windows = [(row, ids) for row, ids in windows if len(ids) > 1]
    labels = None
    if not reader.skeleton.architecture.endswith("ForMaskedLM"):
        labels = tuple(np.append(ids[1:], NO_LABEL) for _, ids in windows)
    ids = tuple(ids for _, ids in windows)
    pads = {"input_ids": _pad(tokenizer, reader)}
    names = [texts[row].encode() for row, _ in windows]
    of_row = np.array([row for row, _ in windows], dtype=np.int64)
    return Rows({"input_ids": ids}, labels, tuple(map(key_of, ids)), pads), names, of_row


def _tokens(table: Table, columns: Mapping[str, str], reader: Reader) -> tuple[Rows, list[bytes]]:
    """Words with a class each; of a word's tokens the first has its label (Devlin et al. 2018, section 5.3)."""
    assert reader.folder is not None
    tokenizer = load_tokenizer(reader.folder)
    words = [_listed(value) for value in cells.filled(sources.column(table, "tokens", columns), table, "tokens")]
    options = {"truncation": True, "max_length": reader.max_length, "return_attention_mask": False}
    encoded = tokenizer(words, is_split_into_words=True, **options)
    ids = _ids(encoded["input_ids"])
    pads = {"input_ids": _pad(tokenizer, reader)}
    names = [" ".join(row).encode() for row in words]
    labels = None
    if _has_labels(table, columns, "label", reader):
        tags = [_listed(value) for value in cells.filled(sources.column(table, "label", columns), table, "label")]
        uneven = next((i for i, (w, t) in enumerate(zip(words, tags, strict=True)) if len(w) != len(t)), None)
        if uneven is not None:
            raise InputError(
                f"{table.origin}: row {uneven + 1} has {len(words[uneven])} tokens and {len(tags[uneven])} labels."
            )
        flat = cells.classes(cells.words([t for row in tags for t in row], table), reader.skeleton.labels, table)
        per_row = np.split(flat, np.cumsum([len(row) for row in tags])[:-1])
        labels = tuple(_of_first(encoded.word_ids(row), known) for row, known in enumerate(per_row))
    return Rows({"input_ids": ids}, labels, tuple(map(key_of, ids)), pads), names


def _listed(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, (list, tuple, np.ndarray)) else str(value).split()


def _of_first(word_of: Sequence[int | None], known: Ints) -> Ints:
    labels = np.full(len(word_of), NO_LABEL, dtype=np.int64)
    for place, word in enumerate(word_of):
        if word is not None and (place == 0 or word_of[place - 1] != word):
            labels[place] = known[word]
    return labels


def _targets(texts: Sequence[str], reader: Reader) -> tuple[tuple[Ints, ...], tuple[Ints, ...]]:
    """The tokens of what should be produced, and what the decoder is given: the same, one place later."""
    assert reader.folder is not None
    start = _start(reader)
    tokenizer = load_tokenizer(reader.folder)
    ids = tokenizer(text_target=list(texts), truncation=True, max_length=reader.max_length)["input_ids"]
    ids = [row[1:] if row and row[0] == start else row for row in ids]
    return _ids(ids), _ids([[start, *row[:-1]] for row in ids])


def _starts(count: int, reader: Reader) -> tuple[Ints, ...]:
    return tuple(np.array([_start(reader)]) for _ in range(count))


def _start(reader: Reader) -> int:
    start = reader.skeleton.config.get("decoder_start_token_id")
    if not isinstance(start, int):
        raise InputError("The model's configuration has no decoder_start_token_id, so its decoder cannot be started.")
    return start


def _pad(tokenizer: Any, reader: Reader) -> float:
    """The token that rows are filled up with: the model's own, where it has one, for some look for it."""
    known = reader.skeleton.config.get("pad_token_id")
    if known is None and reader.task in {tasks.CLASSIFICATION, tasks.REGRESSION} and reader.decodes:
        raise InputError(f"{reader.folder}: config.json names no pad_token_id, by which the model finds a text's end.")
    return float(known if known is not None and known >= 0 else tokenizer.pad_token_id or 0)


def tokenise(texts: Sequence[str], labels: Labels, tokenizer: Any, max_length: int) -> Rows:
    """Rows of at most ``max_length`` tokens; longer texts lose their end."""
    ids = _ids(tokenizer(list(texts), truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"])
    return Rows({"input_ids": ids}, labels, tuple(map(key_of, ids)), {"input_ids": float(tokenizer.pad_token_id or 0)})


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer in ``folder``; nothing is downloaded and no code from the folder is run."""
    import transformers

    if not any((folder / name).is_file() for name in VOCABULARIES):  # the library would make one without words
        raise InputError(f"{folder} has no tokenizer: none of {', '.join(VOCABULARIES)}.")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise InputError(f"The tokenizer in {folder} cannot be loaded: {str(error).splitlines()[0]}") from error


# ---- a function's module


def _arrays(table: Table, columns: Mapping[str, str], reader: Reader) -> tuple[Rows, list[bytes]]:
    """Arrays by the names of a function's inputs, of the shapes of its example; images of bytes as shares of 255.

    Classes are numbers, or folders' names in the order of the alphabet, as torchvision's ``ImageFolder`` counts them.
    """
    inputs: dict[str, Sequence[Array]] = {}
    for name, like in reader.example.items():
        single = {"image"} & set(table.columns) if len(reader.example) == 1 and name not in table.columns else set()
        values = sources.column(table, next(iter(single), name), columns)
        inputs[name] = Lazy(values, _shaper(table.origin, name, like))
    labels: Array | None = None
    if _has_labels(table, columns, "label", replace(reader, example={**reader.example, "image": Tensor()})):
        values = cells.filled(sources.column(table, "label", columns), table, "label")
        names = table.label_names
        if all(value in names for value in values) and not all(name.isdecimal() for name in names):
            values = [names.index(value) for value in values]
        numbers = cells.numbers(cells.words(values, Table(table.origin, {})), table, "label")
        whole = np.asarray(values).dtype.kind != "f" and bool((numbers == numbers.astype(np.int64)).all())
        labels = numbers.astype(np.int64) if whole else numbers
    keys = [key_of(*(values[row] for values in inputs.values())) for row in range(len(table))]
    return Rows(inputs, labels, tuple(keys)), keys


def _shaper(origin: str, name: str, like: Tensor) -> Callable[[Any], Array]:
    kind: Any = like.numpy().dtype
    shape = tuple(like.shape[1:])

    def shaped(value: Any) -> Array:
        try:
            array = np.asarray(media.pixels(value, shape) if isinstance(value, (Path, bytes)) else value)
            if array.ndim == 3 and (array.shape[2], *array.shape[:2]) == shape:
                array = np.moveaxis(array, 2, 0)  # images are kept with their channels last
            fits = array.ndim < 2 or [n for n in array.shape if n != 1] == [n for n in shape if n != 1]
            if not fits or array.size != int(np.prod(shape)):
                raise ValueError(f"it has shape {list(array.shape)}, the model takes {list(shape)}")
            if array.dtype == np.uint8 and np.issubdtype(kind, np.floating):
                array = array / 255
            result: Array = np.ascontiguousarray(array.reshape(shape), dtype=kind)
            if np.isnan(result).any():
                raise ValueError("it holds NaN")
        except (ValueError, TypeError) as error:
            raise InputError(f"{origin}: a row of '{name}' cannot be used: {error}.") from error
        return result

    return shaped
