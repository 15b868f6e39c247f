"""Padding: which positions of what a model computes are of real tokens.

``attention_mask`` is of the tokens that the encoder reads where there are two. So what comes in another shape is all
real, and so is what a decoder computes even where its tokens are as many. That is not so of what its cross-attention
makes of the encoder's tokens: where those are as many, their padding counts.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

ANSWER = ""
"""In place of a path: what the whole model answers, which is its decoder's where there are two."""


def real(inputs: Mapping[str, Tensor], values: Tensor, path: str = ANSWER, *, row_axis: int = 0) -> Tensor | None:
    """Which positions of ``values`` [batch, tokens, features] hold real tokens, bool [batch, tokens], on their device;
    None where all do.

    ``inputs`` are the model's, by name; ``path`` is that of the module that makes or reads the values. With
    ``row_axis`` 1 they are [tokens, batch, features].
    """
    mask, decoded = inputs.get("attention_mask"), inputs.get("decoder_input_ids")
    if mask is None or (decoded is not None and decoded.shape == mask.shape and (not path or "decoder" in path)):
        return None
    mask = mask.T if row_axis else mask
    return mask.bool().to(values.device) if mask.shape == values.shape[:-1] else None
