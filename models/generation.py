"""Generation: the texts that an encoder-decoder produces, token by token, the most likely one each time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError, UnavailableError
from .examples import longest

if TYPE_CHECKING:
    from .data import Rows
    from .workload import Progress, Workload

MOST_TOKENS = 128


def texts(workload: Workload, rows: Rows, *, progress: Progress | None = None) -> tuple[str, ...]:
    """The text of every row by greedy search, at most ``MOST_TOKENS`` tokens each."""
    module: Any = workload.module
    if not hasattr(module, "generate"):
        raise UnavailableError(f"{workload.name} cannot be judged by its texts: its module has no generate().")
    decode = decoder(workload.files)
    most = min(MOST_TOKENS, longest(module.config, decoder=True) - 8)  # some places are for what the model begins with
    found = [""] * len(rows)
    done = 0
    for part in rows.batches(4):
        given = {name: tensor for name, tensor in part.inputs.items() if not name.startswith("decoder_")}
        with torch.no_grad():
            made = module.generate(**given, max_new_tokens=most, do_sample=False, num_beams=1)
        for row, tokens in zip(part.rows, made.tolist(), strict=True):
            found[row] = decode(tokens)
        done += len(part.rows)
        if progress:
            progress(done, len(rows), "rows generated")
    return tuple(found)


def decoder(files: Mapping[str, bytes]) -> Any:
    """The function from token ids to text, of the tokenizer among a workload's files."""
    from tokenizers import Tokenizer

    if "tokenizer.json" not in files:
        raise InputError("The model has no tokenizer.json, so the tokens that it produces cannot be read as text.")
    tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
    return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True).strip()
