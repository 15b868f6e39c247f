"""Which positions of a stack of blocks hold real tokens in the batch at work; the others are padding.

What an attention hides from all of its queries is padding: the masks that the blocks really get say so, whatever the
model's inputs are called. A decoder is often given no mask for its own tokens, for nothing looks back at its padding:
there the labels say where the tokens end.
"""

from __future__ import annotations

from torch import Tensor

from ..structure import Structure


class Tokens:
    """The real tokens of each stack, known from its first self-attention on until the next batch is begun."""

    def __init__(self, structure: Structure) -> None:
        self._decoders = {
            stack.path for stack in structure.stacks if any(structure.find("cross_head", n) for n in stack.layers)
        }
        self._real: dict[str, Tensor | None] = {}
        self._labels: Tensor | None = None

    def start(self, labels: Tensor | None) -> None:
        """Begin a batch."""
        self._real.clear()
        self._labels = labels

    def saw(self, stack: str, keys: Tensor) -> None:
        """Note the keys [batch, length], True where some query sees them, of a self-attention of ``stack``."""
        if stack in self._real:
            return
        labels = self._labels
        if stack in self._decoders and labels is not None and labels.shape == keys.shape:
            keys = keys & (labels >= 0).flip(1).cummax(dim=1).values.flip(1)  # up to the last label
        self._real[stack] = None if bool(keys.all()) else keys

    def mask(self, stack: str, batch: int, length: int) -> Tensor | None:
        """True where a token is real, [batch, length]; None where all are."""
        real = self._real.get(stack)
        return real if real is not None and real.shape == (batch, length) else None

    def of(self, stack: str, values: Tensor, row_axis: int = 0) -> Tensor:
        """Of ``values`` [batch, length, features], or [length, batch, features] where ``row_axis`` is 1, those of real
        tokens, [tokens, features]; all where they are laid out in another way."""
        real = self._real.get(stack)
        if real is not None and row_axis == 1:
            real = real.T
        if real is not None and real.shape == values.shape[:-1]:
            return values[real]
        return values.flatten(0, -2)
