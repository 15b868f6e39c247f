"""Trains the zoo's ``llama-stdlib`` and writes its tokenizer, weights and rows, and the log of the training.

    OMP_NUM_THREADS=1 python models/zoo/recipes/llama_stdlib.py

About nine minutes on one core. The text is that of Python's standard library as this interpreter has it, without its
tests. Files, in the order of the hashes of their names, are for evaluation, for calibration, and for training; a row is
128 tokens in succession. AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101) with warm-up and a cosine, each training
row once. The evaluation rows are not looked at before the end.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import platform
import sysconfig
import time
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
import transformers
from edgepress.models.zoo import llama_stdlib
from edgepress.models.zoo.entry import WEIGHTS
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy

SEED, BATCH = 0, 16
RATE, DECAY, WARM_UP = 4e-3, 0.1, 0.05
SPLITS = {"evaluation": 300, "calibration": 256}
TRAIN_KEPT = 3000
"""Training rows that are committed, for fine-tuning."""
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "turtledemo", "pydoc_data"}
PLACE = WEIGHTS / "llama-stdlib"


def texts() -> list[str]:
    """The library's modules, in the order of the hashes of their names; those that do not parse are left out."""
    library = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(library) for path in library.rglob("*.py")]
    names = [name for name in names if not LEFT_OUT & set(name.parts)]
    found = []
    for name in sorted(names, key=lambda name: hashlib.sha256(name.as_posix().encode()).digest()):
        try:
            text = (library / name).read_text(encoding="utf-8")
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
        found.append(text)
    return found


def trained_tokenizer(training: list[str]) -> Tokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2015, arXiv 1508.07909)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = llama_stdlib.CONFIG["vocab_size"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(training, trainer)
    return tokenizer


def in_rows(text: str, tokenizer: Tokenizer) -> NDArray[np.uint16]:
    """The text's tokens in rows [n, TOKENS]; what is left at its end is lost."""
    ids = np.array(tokenizer.encode(text).ids, dtype=np.uint16)
    count = len(ids) // llama_stdlib.TOKENS
    return ids[: count * llama_stdlib.TOKENS].reshape(count, llama_stdlib.TOKENS)


def split(tokenizer: Tokenizer, modules: list[str]) -> dict[str, NDArray[np.uint16]]:
    """Rows without repetitions; a module is in one split only."""
    rows: dict[str, NDArray[np.uint16]] = {}
    seen: set[bytes] = set()
    place = 0
    for name, wanted in (*SPLITS.items(), ("train", 1 << 30)):
        taken: list[NDArray[np.uint16]] = []
        while len(taken) < wanted and place < len(modules):
            new = [row for row in in_rows(modules[place], tokenizer) if row.tobytes() not in seen]
            seen.update(row.tobytes() for row in new)
            taken += new
            place += 1
        rows[name] = np.stack(taken[:wanted])
    return rows


def rate(step: int, steps: int) -> float:
    """The learning rate at a step, in units of the largest."""
    return min(step / (WARM_UP * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))


def loss(module: Any, rows: Tensor) -> Tensor:
    logits = module(input_ids=rows).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    started = time.process_time()
    modules = texts()
    tokenizer = trained_tokenizer(modules[len(modules) // 20 :])
    rows = split(tokenizer, modules)
    print({name: len(part) for name, part in rows.items()}, f"{time.process_time() - started:.0f} s", flush=True)
    train = torch.from_numpy(rows["train"].astype(np.int64))
    config: Any = transformers.AutoConfig.for_model(**llama_stdlib.CONFIG)
    module: Any = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY, fused=True)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SEED))
    batches = order[: len(train) // BATCH * BATCH].reshape(-1, BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, len(batches)))
    started, log, losses = time.process_time(), [], []
    for step, batch in enumerate(batches, 1):
        value = loss(module, train[batch])
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(value.detach()))
        if step % 100 == 0 or step == len(batches):
            seconds = time.process_time() - started
            log.append({"step": step, "loss": float(np.mean(losses)), "cpu_seconds": seconds})
            losses = []
            print(json.dumps(log[-1]), flush=True)
    module.eval().half()
    PLACE.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor for name, tensor in module.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, PLACE / "model.safetensors", metadata={"format": "pt"})
    (PLACE / "model.safetensors").chmod(0o644)
    tokenizer.save(str(PLACE / "tokenizer.json"))
    kept = {**rows, "train": rows["train"][np.sort(order[:TRAIN_KEPT].numpy())]}
    np.savez_compressed(PLACE / "rows.npz", allow_pickle=False, **kept)
    module.float()
    with torch.no_grad():
        judged = [float(loss(module, torch.from_numpy(row[None].astype(np.int64)))) for row in rows["evaluation"]]
    result = {
        "recipe": {"seed": SEED, "batch": BATCH, "rate": RATE, "weight_decay": DECAY},
        "rows": {name: len(part) for name, part in rows.items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "steps": log,
        "perplexity": {"evaluation": math.exp(float(np.mean(judged)))},
    }
    (PLACE / "log.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["perplexity"]))


if __name__ == "__main__":
    main()
