"""Trains the zoo's ``vit-fashion`` and writes its weights and the log of the training.

    OMP_NUM_THREADS=1 python models/zoo/recipes/vit_fashion.py

About nine minutes on one core. AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) with warm-up and a cosine; images
mirrored and moved by up to one pixel at random. The official test images are not looked at before the end.
"""

from __future__ import annotations

import json
import math
import time
from typing import Any

import numpy as np
import torch
import transformers
from edgepress.models.zoo import fashion, vit_fashion
from edgepress.models.zoo.entry import WEIGHTS
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

SEED, EPOCHS, BATCH = 0, 8, 64
RATE, DECAY, WARM_UP = 1.5e-3, 0.05, 0.05
SHIFT = 1
PLACE = WEIGHTS / "vit-fashion"


def moved(images: Tensor, random: torch.Generator) -> Tensor:
    """``images`` [n, 1, side, side], half of them mirrored, each moved by up to ``SHIFT`` pixels; black comes in."""
    count, side = len(images), images.shape[-1]
    mirrored = torch.rand(count, 1, 1, 1, generator=random) < 0.5
    images = torch.where(mirrored, images.flip(-1), images)
    wide = pad(images, (SHIFT,) * 4, value=float(images.min()))[:, 0]
    across, down = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=random) + torch.arange(side)
    return wide[torch.arange(count)[:, None, None], down[:, :, None], across[:, None, :]][:, None]


def rate(step: int, steps: int) -> float:
    """The learning rate at a step, in units of the largest."""
    warm = step / (WARM_UP * steps)
    return min(warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def accuracy(module: Any, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        guesses = torch.cat([module(images[i : i + 500]).logits.argmax(dim=1) for i in range(0, len(images), 500)])
    return 100 * float((guesses == labels).float().mean())


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    random = torch.Generator().manual_seed(SEED)
    pictures, classes = fashion.images()
    images = torch.from_numpy(np.stack([vit_fashion.pixels(picture) for picture in pictures]))
    labels, test = torch.from_numpy(classes), torch.from_numpy(fashion.is_test(len(classes)))
    train = torch.nonzero(~test)[:, 0]
    config: Any = transformers.AutoConfig.for_model(**vit_fashion.CONFIG)
    module: Any = transformers.ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
    steps = EPOCHS * (len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    started, log = time.process_time(), []
    for epoch in range(EPOCHS):
        losses = []
        order = train[torch.randperm(len(train), generator=random)]
        for rows in order[: len(train) // BATCH * BATCH].reshape(-1, BATCH):
            loss = cross_entropy(module(moved(images[rows], random)).logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        log.append({"epoch": epoch + 1, "loss": float(np.mean(losses)), "cpu_seconds": time.process_time() - started})
        print(json.dumps(log[-1]), flush=True)
    module.eval().half()
    PLACE.mkdir(parents=True, exist_ok=True)
    save_file(module.state_dict(), PLACE / "model.safetensors", metadata={"format": "pt"})
    (PLACE / "model.safetensors").chmod(0o644)
    module.float()
    result = {
        "recipe": {"seed": SEED, "epochs": EPOCHS, "batch": BATCH, "rate": RATE, "weight_decay": DECAY},
        "rows": {"train": len(train), "test": int(test.sum())},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "epochs": log,
        "accuracy": {
            "train": accuracy(module, images[train], labels[train]),
            "test": accuracy(module, images[test], labels[test]),
        },
    }
    (PLACE / "log.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["accuracy"]))


if __name__ == "__main__":
    main()
