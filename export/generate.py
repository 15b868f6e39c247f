"""Generation from an artifact that keeps keys and values (``export --cache``): the most likely token each time.

It needs numpy and onnxruntime alone, so that this one file can be laid beside an artifact on a device without PyTorch:

    decoder = open_decoder("out/step", threads=4)
    tokens = generate(decoder, prompts, mask, max_new_tokens=32, eos=(2,))
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

PAST, PRESENT = "past_key_values.", "present."

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Decoder:
    session: Any
    longest: int
    """Tokens that it was proven for, those of the prompt and the new ones together."""


def open_decoder(folder: str | Path, *, threads: int = 1) -> Decoder:
    """The artifact in ``folder``, run as its manifest says; ValueError where it keeps no keys and values."""
    manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
    if not any(name.startswith(PAST) for name in manifest["inputs"]):
        raise ValueError(f"{folder} keeps no keys and values: export it with --cache.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        Path(folder) / manifest["model_file"],
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=manifest["session"]["disabled_optimizers"],
    )
    return Decoder(session, manifest["inputs"]["attention_mask"]["axes"]["1"]["max"])


def generate(
    decoder: Decoder,
    input_ids: Ints,
    attention_mask: Ints | None = None,
    *,
    max_new_tokens: int,
    eos: Collection[int] = (),
    pad: int = 0,
) -> Ints:
    """The prompts [batch, sequence] and after each up to ``max_new_tokens`` tokens, by greedy search.

    Shorter prompts are padded on the left, where ``attention_mask`` is 0. A row ends with one of ``eos`` and is filled
    with ``pad``; the search ends when all rows have. Raises ValueError for more tokens than the file was proven for.
    """
    rows, length = input_ids.shape
    if length + max_new_tokens > decoder.longest:
        raise ValueError(
            f"{length} tokens and {max_new_tokens} new ones are more than the {decoder.longest} of export --cache."
        )
    mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
    kept, ids, found = nothing(decoder.session, rows), input_ids, [input_ids]
    going = np.ones((rows, 1), bool)
    for _ in range(max_new_tokens):
        logits, kept = step(decoder.session, {"input_ids": ids, "attention_mask": mask}, kept)
        ids = np.where(going, logits[:, -1:].argmax(axis=-1), pad)
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
        if one.name.startswith(PAST)
    }


def step(session: Any, inputs: dict[str, Ints], kept: dict[str, Any]) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """The logits [batch, sequence, vocabulary] of ``inputs`` after what is ``kept``, and what is kept then.

    Keys and values stay in the runtime's own memory from step to step.
    """
    names = [one.name for one in session.get_outputs()]
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in inputs.items()
    }
    logits, *present = session.run_with_ort_values(names, {**values, **kept})
    return logits.numpy(), dict(zip((name.replace(PRESENT, PAST, 1) for name in names[1:]), present, strict=True))
