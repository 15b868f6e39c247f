"""Generation from an artifact that keeps keys and values (``export --cache``): the most likely token each time.

It needs numpy and onnxruntime alone, so that this one file can be laid beside an artifact on a device without PyTorch:

    decoder = open_decoder("out/step", threads=4)
    tokens = generate(decoder, prompts, mask, max_new_tokens=32, eos=(2,))
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

PAST, PRESENT, CROSS = "past_key_values.", "present.", ".encoder."

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Decoder:
    session: Any
    longest: int
    """Tokens that it was proven for, those of the prompt and the new ones together."""
    encoder: Any = None
    """What reads for it, where it is half of an encoder-decoder."""


def open_decoder(folder: str | Path, *, threads: int = 1) -> Decoder:
    """The artifact in ``folder``, or the two of an encoder-decoder, run as the manifest says.

    Raises ValueError where no keys and values are kept.
    """
    folder = Path(folder)
    if (folder / "decoder").is_dir():
        session, longest = _opened(folder / "decoder", threads)
        return Decoder(session, longest, _opened(folder / "encoder", threads)[0])
    return Decoder(*_opened(folder, threads))


def _opened(folder: Path, threads: int) -> tuple[Any, int]:
    """The session of an artifact, and how many tokens it was proven for."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if not any(name.startswith((PAST, PRESENT)) for name in (*manifest["inputs"], *manifest["outputs"])):
        raise ValueError(f"{folder} keeps no keys and values: export it with --cache.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        folder / manifest["model_file"],
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=manifest["session"]["disabled_optimizers"],
    )
    axes = [axis for one in manifest["inputs"].values() for axis in one["axes"].values()]
    return session, 1 + max((axis["max"] for axis in axes if axis["name"] == "past_sequence"), default=0)


def generate(
    decoder: Decoder,
    input_ids: Ints,
    attention_mask: Ints | None = None,
    *,
    read: Mapping[str, NDArray[Any]] | None = None,
    max_new_tokens: int,
    eos: Collection[int] = (),
    pad: int = 0,
    suppress: Collection[int] = (),
    suppress_first: Collection[int] = (),
) -> Ints:
    """The prompts [batch, sequence] and after each up to ``max_new_tokens`` tokens, by greedy search.

    Shorter prompts are padded on the left, where ``attention_mask`` is 0. An encoder is given ``read``, its inputs by
    name; the prompts are then what the decoder begins with. A row ends with one of ``eos`` and is filled with ``pad``;
    the search ends when all rows have. Tokens in ``suppress`` are never chosen, those in ``suppress_first`` not as the
    first. Raises ValueError for more tokens than the file was proven for.
    """
    rows, length = input_ids.shape
    if length + max_new_tokens > decoder.longest:
        raise ValueError(
            f"{length} tokens and {max_new_tokens} new ones are more than the {decoder.longest} of export --cache."
        )
    mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
    kept, fixed, name = nothing(decoder.session, rows), {}, "input_ids"
    if decoder.encoder is not None:
        given, name = dict(read or {}), "decoder_input_ids"
        kept |= step(decoder.encoder, given, {})[1]
        fixed = {"attention_mask": given["attention_mask"]} if "attention_mask" in given else {}
    ids, found, banned = input_ids, [input_ids], [*suppress, *suppress_first]
    going = np.ones((rows, 1), bool)
    for _ in range(max_new_tokens):
        inputs = fixed if decoder.encoder is not None else {"attention_mask": mask}
        (logits, *_), kept = step(decoder.session, {name: ids, **inputs}, kept)
        scores = logits[:, -1:].copy()
        scores[:, :, banned] = -np.inf
        ids, banned = np.where(going, scores.argmax(axis=-1), pad), list(suppress)
        found.append(ids)
        going &= ~np.isin(ids, list(eos))
        if not going.any():
            break
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
    return np.concatenate(found, axis=1)


def nothing(session: Any, rows: int) -> dict[str, Any]:
    """The keys and values of no tokens."""
    return {
        one.name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros((rows, one.shape[1], 0, one.shape[3]), np.float32))
        for one in session.get_inputs()
        if one.name.startswith(PAST) and CROSS not in one.name
    }


def step(
    session: Any, inputs: Mapping[str, NDArray[Any]], kept: dict[str, Any]
) -> tuple[list[NDArray[Any]], dict[str, Any]]:
    """What a session answers to ``inputs`` after what is ``kept``, its logits if it has any, and what is kept then.

    Keys and values stay in the runtime's own memory from step to step.
    """
    names = [one.name for one in session.get_outputs()]
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()
    }
    made = dict(zip(names, session.run_with_ort_values(names, {**values, **kept}), strict=True))
    present = {name.replace(PRESENT, PAST, 1): one for name, one in made.items() if name.startswith(PRESENT)}
    return [one.numpy() for name, one in made.items() if not name.startswith(PRESENT)], {**kept, **present}
