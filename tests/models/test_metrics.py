"""Metrics: values against the libraries that people trust, intervals against brute force, pairs against pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
import torch
from edgepress.errors import InputError, UsageError
from edgepress.models import measures, metrics, tasks
from edgepress.models.data import Batch
from scipy import stats
from sklearn import metrics as sklearn

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 4, 300)
LOGITS = (RANDOM.normal(size=(300, 4)) + 1.2 * np.eye(4)[LABELS]).astype(np.float32)
GUESSES = LOGITS.argmax(1)
MANY = RANDOM.normal(size=(300, 8))
TWO, LOGITS2 = LABELS % 2, LOGITS[:, :2] + np.eye(2)[LABELS % 2].astype(np.float32)
X = RANDOM.normal(size=300)
Y = X + RANDOM.normal(size=300)
OTHER = LOGITS2.repeat(2, 1)
WORDS = RANDOM.integers(-1, 7, (20, 9))
WORDS[WORDS < 0] = -100
TEXT_LOGITS = RANDOM.normal(size=(20, 9, 7))
OTHER_LOGITS = TEXT_LOGITS + RANDOM.normal(size=TEXT_LOGITS.shape)
REAL = WORDS[WORDS >= 0]
TOKENS = [row[row >= 0] for row in WORDS]
SAID = ["the cat sat", "a dog", "hello there world", "no", "it works"]
HEARD = ["cat sat", "the dog barks", "hello world", "yes", "It works!"]


def _answers(logits: Any) -> list[Any]:
    """What is kept of a language model's output, as the task of language modelling keeps it."""
    return tasks.LANGUAGE.answers(torch.tensor(logits), Batch(np.arange(len(logits)), {}, torch.tensor(WORDS)))


def _chosen(logits: Any) -> Any:
    return logits.argmax(-1)[WORDS >= 0]


REFERENCES: dict[str, tuple[Any, Any, Callable[[], float]]] = {
    "accuracy": (LOGITS, LABELS, lambda: 100 * sklearn.accuracy_score(LABELS, GUESSES)),
    "top5": (MANY, LABELS, lambda: 100 * sklearn.top_k_accuracy_score(LABELS, MANY, k=5, labels=range(8))),
    "f1": (LOGITS2, TWO, lambda: 100 * sklearn.f1_score(TWO, LOGITS2.argmax(1))),
    "f1-macro": (LOGITS, LABELS, lambda: 100 * sklearn.f1_score(LABELS, GUESSES, average="macro")),
    "matthews": (LOGITS, LABELS, lambda: 100 * sklearn.matthews_corrcoef(LABELS, GUESSES)),
    "pearson": (X[:, None], Y, lambda: 100 * stats.pearsonr(X, Y).statistic),
    "spearman": (X, Y, lambda: 100 * stats.spearmanr(X, Y).statistic),
    "mse": (X, Y, lambda: sklearn.mean_squared_error(Y, X)),
    "perplexity": (_answers(TEXT_LOGITS), TOKENS, lambda: math.exp(_cross_entropy())),
    "token-accuracy": (_answers(TEXT_LOGITS), WORDS, lambda: 100 * sklearn.accuracy_score(REAL, _chosen(TEXT_LOGITS))),
    "token-f1-macro": (
        _answers(TEXT_LOGITS), TOKENS,
        lambda: 100 * sklearn.f1_score(REAL, _chosen(TEXT_LOGITS), average="macro"),
    ),
    "token-agreement": (
        _answers(TEXT_LOGITS), _answers(OTHER_LOGITS),
        lambda: 100 * float(np.mean(_chosen(TEXT_LOGITS) == _chosen(OTHER_LOGITS))),
    ),
    "exact-match": (HEARD, SAID, lambda: 40.0),
    "token-f1": (HEARD, SAID, lambda: 100 * (1 + 2 / 3 + 0.8 + 0 + 1) / 5),
    "wer": (HEARD, SAID, lambda: 100 * jiwer.wer(SAID, [text.lower().strip("!") for text in HEARD])),
    "recall@1": (LOGITS, LABELS, lambda: 100 * sklearn.top_k_accuracy_score(LABELS, LOGITS, k=1)),
    "recall@5": (MANY, LABELS, lambda: 100 * sklearn.top_k_accuracy_score(LABELS, MANY, k=5, labels=range(8))),
    "recall@10": (LOGITS, LABELS, lambda: 100.0),
    "agreement": (LOGITS, OTHER, lambda: 100 * float(np.mean(OTHER.argmax(1) == GUESSES))),
    "cosine": (X[:, None] * LOGITS, LOGITS, lambda: 100 * float(np.mean(np.sign(X)))),
    "number-agreement": (X[:, None], Y, lambda: 100 * sklearn.r2_score(Y, X)),
    "kl": (LOGITS, OTHER, lambda: _mean_divergence(LOGITS, OTHER)),
}  # fmt: skip


def _cross_entropy() -> float:
    logits, labels = torch.tensor(TEXT_LOGITS).flatten(0, 1), torch.tensor(WORDS).flatten()
    return float(torch.nn.functional.cross_entropy(logits, labels))


def _mean_divergence(ours: Any, theirs: Any) -> float:
    logs = [torch.tensor(x).double().log_softmax(-1) for x in (ours, theirs)]
    return float(torch.nn.functional.kl_div(*logs, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("name", measures.KNOWN)
def test_values_agree_with_a_reference(name: str) -> None:
    outputs, labels, reference = REFERENCES[name]
    metric = measures.get(name)
    assert metric.value(metric.count(outputs, labels).sum(axis=0)) == pytest.approx(reference(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    "name", ["accuracy", "f1-macro", "matthews", "pearson", "number-agreement", "mse", "perplexity"]
)
def test_the_interval_agrees_with_a_plain_bootstrap(name: str) -> None:
    outputs, labels, _ = REFERENCES[name]
    metric = measures.get(name)
    found = metrics.quality(name, outputs, labels, original=labels if metric.against_original else None)
    plain = []
    for _ in range(3000):
        rows = RANDOM.integers(0, len(labels), len(labels))
        drawn = ([values[row] for row in rows] for values in (outputs, labels))
        if name != "perplexity":
            drawn = map(np.array, drawn)
        plain.append(metric.value(metric.count(*drawn).sum(axis=0)))
    low, high = np.percentile(plain, [2.5, 97.5])
    assert [found.low, found.high] == pytest.approx([low, high], abs=0.15 * (high - low))


def test_the_drop_is_paired() -> None:
    labels = np.zeros(1000, dtype=np.int64)
    original = np.tile([[1.0, 0.0]], (1000, 1)).astype(np.float32)
    original[:300] = [0.0, 1.0]
    changed = original.copy()
    changed[300:310] = [0.0, 1.0]
    found = metrics.quality("accuracy", changed, labels, original=original)
    assert found.drop == pytest.approx(1.0)
    assert found.drop_low is not None
    assert found.drop_high is not None
    assert 0 < found.drop_low < 1 < found.drop_high < 2
    assert found.high - found.low > 3 * (found.drop_high - found.drop_low)


@pytest.mark.parametrize(("name", "worse"), [("mse", X + 1), ("pearson", X + RANDOM.normal(size=300))])
def test_a_drop_is_a_loss_whichever_way_the_metric_runs(name: str, worse: Any) -> None:
    found = metrics.quality(name, worse, Y, original=X)
    assert found.drop is not None
    assert found.drop > 0
    assert metrics.quality(name, X, Y, original=worse).drop == pytest.approx(-found.drop)


def test_fidelity_compares_with_the_original() -> None:
    assert metrics.quality("agreement", LOGITS, None).value == 100
    found = metrics.quality("agreement", OTHER, None, original=LOGITS)
    assert found.drop == pytest.approx(100 - found.value)


@pytest.mark.parametrize("width", [1, 3])
def test_numbers_agree_by_what_is_explained_of_the_originals_variance(width: int) -> None:
    """Large offsets, several numbers a row, and a change of all of them alike, which no angle or rank would show."""
    theirs = 1e4 + RANDOM.normal(size=(200, width))
    for ours in (theirs + 0.1, 0.9 * theirs, theirs + 0.3 * RANDOM.normal(size=theirs.shape), theirs[::-1]):
        found = metrics.quality("number-agreement", ours, None, original=theirs)
        expected = 100 * sklearn.r2_score(theirs, ours, multioutput="variance_weighted")
        assert found.value == pytest.approx(expected, rel=1e-9)
        assert found.drop == pytest.approx(100 - expected)
        assert found.low <= found.value <= found.high
    assert metrics.quality("number-agreement", theirs, None).value == 100
    assert metrics.quality(
        "number-agreement", theirs.mean(0) + 0 * theirs, None, original=theirs
    ).value == pytest.approx(0)


def test_numbers_that_never_change() -> None:
    same = np.full(50, 3.7)
    assert metrics.quality("number-agreement", same, None, original=same).value == 100
    found = metrics.quality("number-agreement", same + 1e-3, None, original=same)
    assert (found.value, found.low, found.high, found.drop) == (0, 0, 0, 100)


def test_one_number_has_no_angle() -> None:
    with pytest.raises(InputError, match=r"one number a row.*'number-agreement' compares numbers"):
        metrics.quality("cosine", X[:, None], None, original=Y[:, None])


def test_a_users_own_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workload: Any) -> None:
    (tmp_path / "my_metric.py").write_text(
        "def margin(logits, labels):\n    return logits[range(len(labels)), labels]\n\n\n"
        "def short(logits, labels):\n    return [1.0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = metrics.quality("my_metric:margin", LOGITS, LABELS)
    assert found.value == pytest.approx(LOGITS[np.arange(300), LABELS].mean())
    assert workload.judged_by("my_metric:margin").data.metric == "my_metric:margin"
    with pytest.raises(InputError, match="must return 300 finite numbers"):
        metrics.quality("my_metric:short", LOGITS, LABELS)
    with pytest.raises(UsageError, match="no function 'my_metric:nothing'"):
        measures.get("my_metric:nothing")


def test_rows_with_nothing_to_judge() -> None:
    """They change no figure, and a draw of none but them is not counted; alone they are refused."""
    found = metrics.quality("wer", ("hi there", "one two"), ("...", "one three"))
    assert (found.value, found.low, found.high) == (150, 50, 150)
    nothing, token = np.zeros((0, 2)), np.array([[1, -2.0]])
    assert metrics.quality("perplexity", [nothing, token], None).low == pytest.approx(math.exp(2))
    none, one = np.array([-100]), np.array([1])
    assert metrics.quality("token-f1-macro", [nothing, token], [none, one]).low == 100
    with pytest.raises(InputError, match="cannot be judged"):
        metrics.quality("wer", ("hi",), ("...",))
    assert math.isfinite(metrics.quality("perplexity", [np.array([[1, -1e6]])], None).value)
    with pytest.raises(InputError, match="f1 is of two classes, and the model tells 4 apart"):
        metrics.quality("f1", LOGITS, LABELS)


def test_unknown_metrics_are_refused(workload: Any) -> None:
    with pytest.raises(UsageError, match="accuracy"):
        measures.get("quality")
    with pytest.raises(UsageError, match="'wer' does not judge the answers of classification"):
        workload.judged_by("wer")
