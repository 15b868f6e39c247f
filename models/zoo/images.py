"""Images in three splits, for several entries: evaluation on those held out, the others split by their hash."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..data import Array, Data, Ints, Lazy, Rows, hashed_order, key_of, stratified

Images = NDArray[np.uint8]

CALIBRATION = 512


def split(  # noqa: PLR0917
    name: str, images: Images, labels: Ints, held_out: NDArray[np.bool_], make: Callable[[Images], Array], seed: int
) -> Data:
    """The rows of ``images`` [n, height, width], of which ``make`` makes the model's input ``name`` when it is asked.

    ``seed`` decides which of the images that are not held out are for calibration, each class in its share.
    """
    rows = Rows({name: Lazy(list(images), make)}, labels, tuple(map(key_of, images)))
    others = np.flatnonzero(~held_out)
    order = others[hashed_order([rows.keys[i] for i in others], seed)]
    order = order[stratified(labels[order])]
    return Data(
        train=rows.pick(np.sort(order[CALIBRATION:])),
        calibration=rows.pick(np.sort(order[:CALIBRATION])),
        evaluation=rows.pick(np.flatnonzero(held_out)),
    )


def normaliser(mean: float, deviation: float) -> Callable[[Images], Array]:
    """The function from grey bytes [height, width] to float32 [1, height, width], by a share's mean and deviation."""

    def normalise(image: Images) -> Array:
        shares = image[None].astype(np.float32) / np.float32(255)
        result: Array = (shares - np.float32(mean)) / np.float32(deviation)
        return result

    return normalise
