"""Parity: the artifact against what it was made from, on real rows, over the corners of the declared shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import EdgepressError
from .artifact import Parity

Feeds = dict[str, NDArray[np.int64]]
Run = Callable[[Feeds], NDArray[np.float32]]

TOLERANCE = {"fp32": 1e-3}
"""Largest absolute difference of a float precision's outputs, in units of the reference's largest output."""
MIN_COSINE = 0.9
"""An integer precision rounds by design, and quality is judged on data; below this cosine the file is broken."""


class ParityError(EdgepressError):
    """The artifact does not compute what it was made from; no file is left behind."""


def corners(max_batch: int, max_sequence: int) -> tuple[tuple[int, int], ...]:
    """The corners of the (batch, sequence) range, and odd shapes inside it."""
    odd_batch, odd_sequence = min(3, max_batch), min(37, max_sequence)
    batches, sequences = {1, odd_batch, max_batch}, {1, odd_sequence, max_sequence}
    return tuple((batch, sequence) for batch in sorted(batches) for sequence in sorted(sequences))


def feeds_of_shape(token_ids: Sequence[NDArray[np.int64]], pad_id: int, batch: int, sequence: int) -> Feeds:
    """Real rows cut or padded to exactly [batch, sequence]; rows repeat where there are too few."""
    ids = np.full((batch, sequence), pad_id, dtype=np.int64)
    mask = np.zeros((batch, sequence), dtype=np.int64)
    for position in range(batch):
        row = token_ids[position % len(token_ids)][:sequence]
        ids[position, : len(row)] = row
        mask[position, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def check(run: Run, reference: Run, feeds: Sequence[Feeds], *, precision: str, reference_name: str) -> Parity:
    """Compare ``run`` with ``reference`` on every feed.

    Both return [batch, labels]. Raises ParityError, naming the shape and both numbers, where shapes differ, an output
    is not finite, or the difference is beyond the tolerance of ``precision``.
    """
    max_abs = max_rel = 0.0
    cosine = 1.0
    shapes: list[tuple[int, ...]] = []
    for feed in feeds:
        shape = tuple(feed["input_ids"].shape)
        got, want = run(feed), reference(feed)
        if got.shape != want.shape:
            raise ParityError(f"At input shape {list(shape)} the artifact gives {got.shape}, not {want.shape}.")
        if not np.isfinite(got).all():
            raise ParityError(f"At input shape {list(shape)} the artifact gives values that are not finite.")
        scale = max(float(np.abs(want).max()), 1e-12)
        difference = float(np.abs(got - want).max())
        max_abs, max_rel = max(max_abs, difference), max(max_rel, difference / scale)
        norms = float(np.linalg.norm(got) * np.linalg.norm(want))
        cosine = min(cosine, float((got * want).sum()) / max(norms, 1e-12))
        shapes.append(shape)
        limit = TOLERANCE.get(precision)
        if limit is not None and difference / scale > limit:
            raise ParityError(
                f"At input shape {list(shape)} the {precision} artifact is {difference / scale:.2e} away from "
                f"{reference_name} (relative to its largest output); at most {limit:.0e} is allowed."
            )
        if limit is None and cosine < MIN_COSINE:
            raise ParityError(
                f"At input shape {list(shape)} the {precision} artifact has a cosine of {cosine:.3f} with "
                f"{reference_name}; at least {MIN_COSINE} is needed."
            )
    return Parity(reference=reference_name, max_abs=max_abs, max_rel=max_rel, cosine=cosine, shapes=tuple(shapes))
