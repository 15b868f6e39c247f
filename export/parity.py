"""Parity: the artifact against what it was made from, on real rows, over the corners of the declared shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EdgepressError
from .artifact import Parity

Feeds = dict[str, NDArray[np.int64]]
Run = Callable[[Feeds], NDArray[np.float32]]

TOLERANCE = {"fp32": 1e-3}
"""Largest absolute difference of a float precision's outputs, in units of the reference's largest output."""
INTEGER_TOLERANCE = 0.45
"""An integer precision rounds by design, and quality is judged on data; but where the root mean square difference is a
larger share of the reference's root mean square (0.45 is a cosine of 0.9 between vectors of one length), the file is
broken."""


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

    Both return [batch, labels]. The scale of a difference is that of the reference's outputs over all feeds: those of
    one row alone may all be near zero. Raises ParityError, naming the shape and both numbers, where shapes differ, an
    output is not finite, or the difference is beyond the tolerance of ``precision``.
    """
    shapes = [tuple(feed["input_ids"].shape) for feed in feeds]
    got, want = [run(feed) for feed in feeds], [reference(feed) for feed in feeds]
    for shape, ours, theirs in zip(shapes, got, want, strict=True):
        if ours.shape != theirs.shape:
            raise ParityError(f"At input shape {list(shape)} the artifact gives {ours.shape}, not {theirs.shape}.")
        if not np.isfinite(ours).all():
            raise ParityError(f"At input shape {list(shape)} the artifact gives values that are not finite.")
    all_got, all_want = (np.concatenate([part.ravel() for part in parts]).astype(np.float64) for parts in (got, want))
    largest, spread = max(float(np.abs(all_want).max()), 1e-12), max(float(_rms(all_want)), 1e-12)
    for shape, ours, theirs in zip(shapes, got, want, strict=True):
        if precision in TOLERANCE:
            error, limit, unit = np.abs(ours - theirs).max() / largest, TOLERANCE[precision], "its largest output"
        else:
            error, limit, unit = _rms(ours - theirs) / spread, INTEGER_TOLERANCE, "its root mean square output"
        if error > limit:
            raise ParityError(
                f"At input shape {list(shape)} the {precision} artifact is {error:.2e} away from {reference_name} "
                f"(relative to {unit}); at most {limit:.2g} is allowed."
            )
    max_abs = float(np.abs(all_got - all_want).max())
    norms = float(np.linalg.norm(all_got) * np.linalg.norm(all_want))
    return Parity(
        reference=reference_name,
        max_abs=max_abs,
        max_rel=max_abs / largest,
        cosine=float(all_got @ all_want) / max(norms, 1e-12),
        shapes=tuple(shapes),
    )


def _rms(values: NDArray[Any]) -> Any:
    return np.sqrt(np.mean(np.square(values.astype(np.float64))))
