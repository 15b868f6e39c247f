"""A small vision transformer on Fashion-MNIST.

What    ViT on 28 x 28 grey images in 16 patches (0.67 M parameters, 5 layers, 4 heads, hidden 128). It was trained here
        by ``recipes/vit_fashion.py`` in eight and a half minutes on one core; ``weights/vit-fashion`` has its weights,
        in half precision, and the log of the training.
Rows    As in ``fashion.py``: evaluation is the 9,176 official test images that the package has, none of which was
        trained on. 512 of the others are for calibration.
Source  Dosovitskiy et al. 2020 (arXiv 2010.11929); Xiao et al. 2017 (arXiv 1708.07747) for the images.
"""

from __future__ import annotations

from typing import Any

from .. import checkpoint
from ..metrics import Quality
from ..skeleton import Skeleton
from ..workload import Progress, Workload
from . import fashion, images
from .entry import WEIGHTS, Entry, filled, workload

ENTRY = Entry(
    name="vit-fashion",
    what="a small vision transformer, Fashion-MNIST",
    task="classification",
    origin="trained for edgepress; Zalando, from fashion-mnist",
    licence="Apache-2.0 (weights), MIT (rows)",
    params=672_650,
    quality=Quality("accuracy", 87.18, 86.50, 87.84, 9176),
    packages=(fashion.CLOTHES,),
)
CONFIG: dict[str, Any] = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "image_size": fashion.SIDE,
    "patch_size": 7,
    "num_channels": 1,
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "id2label": {str(index): name for index, name in enumerate(fashion.LABELS)},
    "label2id": {name: index for index, name in enumerate(fashion.LABELS)},
}
pixels = images.normaliser(0.2860, 0.3530)


def load(*, seed: int = 0, progress: Progress | None = None) -> Workload:
    """The workload; only the images are downloaded. ``seed`` chooses the rows for calibration."""
    skeleton = Skeleton("ViTForImageClassification", CONFIG, fashion.LABELS)
    tensors = checkpoint.read_tensors(WEIGHTS / ENTRY.name / "model.safetensors")
    module = filled(skeleton, {name: tensor.float() for name, tensor in tensors.items()})
    pictures, labels = fashion.images(progress)
    data = images.split("pixel_values", pictures, labels, fashion.is_test(len(labels)), pixels, seed)
    return workload(ENTRY, module, skeleton, data)
