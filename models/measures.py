"""Measures: what each metric counts in a row, and what it makes of the counts.

A metric is a function of sums over rows: accuracy of hits, F1 of true and false positives, a correlation of moments,
perplexity of log-likelihoods and tokens. So one bootstrap serves them all: it resamples rows by weighing them, and two
variants judged on the same rows are resampled together.

Shares and correlations are in points of 100; errors are in their own unit.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from scipy.stats import rankdata

from ..errors import InputError, UnavailableError, UsageError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """``count`` maps outputs and labels of n rows to statistics [n, k]; ``value`` maps their sums [..., k] to [...]."""

    name: str
    count: Callable[[Any, Any], Floats]
    value: Callable[[Floats], Floats]
    better: int = 1
    """1 where more is better, -1 where less is."""
    against_original: bool = False
    """Whether the labels are the original's outputs, and not the data's."""
    of_texts: bool = False
    """Whether outputs and labels are texts."""
    unit: str = "points"
    """Of a value and of a drop; points are those of 100."""


def _share(hits: Any) -> Floats:
    """Statistics of a mean in points of 100."""
    hits = np.asarray(hits, dtype=np.float64)
    return np.stack([100 * hits, np.ones_like(hits)], axis=1)


def _mean(sums: Floats) -> Floats:
    return _over(sums[..., 0], sums[..., 1])


def _over(part: Floats, whole: Floats) -> Floats:
    """``part / whole``, and NaN where there is nothing to judge."""
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1), np.nan)


def _accuracy(outputs: Any, labels: Any) -> Floats:
    return _share(outputs.argmax(axis=1) == labels)


def _top(outputs: Any, labels: Any, *, k: int) -> Floats:
    """Hits where fewer than ``k`` outputs are larger than the label's."""
    own = np.take_along_axis(outputs, np.asarray(labels)[:, None], axis=1)
    return _share((outputs > own).sum(axis=1) < k)


def _errors(outputs: Any, labels: Any) -> Floats:
    """True positives, false positives and false negatives of every class: [n, 3 * classes]."""
    classes = outputs.shape[1]
    guessed, true = np.eye(classes)[outputs.argmax(axis=1)], np.eye(classes)[labels]
    return np.concatenate([guessed * true, guessed * (1 - true), (1 - guessed) * true], axis=1)


def _f1_of_classes(sums: Floats) -> Floats:
    hits, false, missed = np.split(sums, 3, axis=-1)
    return _over(200 * hits, 2 * hits + false + missed)


def _errors_of_two(outputs: Any, labels: Any) -> Floats:
    if outputs.shape[1] != 2:
        raise InputError(f"f1 is of two classes, and the model tells {outputs.shape[1]} apart; f1-macro is of any.")
    return _errors(outputs, labels)


def _f1(sums: Floats) -> Floats:
    """F1 of the last class, the positive one of two."""
    result: Floats = np.nan_to_num(_f1_of_classes(sums)[..., -1])
    return result


def _f1_macro(sums: Floats) -> Floats:
    """The mean F1 of the classes that occur, as labels or as answers."""
    each = _f1_of_classes(sums)
    return _over(np.nansum(each, axis=-1), (~np.isnan(each)).sum(axis=-1))


def _matches(outputs: Any, labels: Any) -> Floats:
    """A row, a hit, the answer's class, the label's class: [n, 2 + 2 * classes]."""
    classes, guessed = outputs.shape[1], outputs.argmax(axis=1)
    rows = np.stack([np.ones(len(guessed)), guessed == labels], axis=1)
    return np.concatenate([rows, np.eye(classes)[guessed], np.eye(classes)[labels]], axis=1)


def _matthews(sums: Floats) -> Floats:
    """The correlation of answers and labels (Gorodkin 2004, R_K), 0 where either has one class only."""
    rows, hits = sums[..., 0], sums[..., 1]
    guessed, true = np.split(sums[..., 2:], 2, axis=-1)
    spread = (rows**2 - (guessed**2).sum(-1)) * (rows**2 - (true**2).sum(-1))
    shared = hits * rows - (guessed * true).sum(-1)
    result: Floats = np.where(spread > 0, 100 * shared / np.sqrt(np.where(spread > 0, spread, 1)), 0.0)
    return result


def _moments(outputs: Any, labels: Any) -> Floats:
    x, y = _numbers(outputs), np.asarray(labels, dtype=np.float64)
    x, y = x - x.mean(), y - y.mean()  # a correlation does not move; its rounding does
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)


def _ranked_moments(outputs: Any, labels: Any) -> Floats:
    """Moments of the ranks; a resample keeps the ranks of the whole."""
    return _moments(rankdata(_numbers(outputs)), rankdata(labels))


def _correlation(sums: Floats) -> Floats:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = (n * xx - x**2) * (n * yy - y**2)
    result: Floats = np.where(spread > 0, 100 * (n * xy - x * y) / np.sqrt(np.where(spread > 0, spread, 1)), 0.0)
    return result


def _squares(outputs: Any, labels: Any) -> Floats:
    error = (_numbers(outputs) - np.asarray(labels, dtype=np.float64)) ** 2
    return np.stack([error, np.ones_like(error)], axis=1)


def _numbers(outputs: Any) -> Floats:
    """One number a row, also where it comes as a column."""
    values = np.asarray(outputs, dtype=np.float64)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise InputError(f"This metric takes one number a row, and the outputs have shape {list(values.shape)}.")
    return values


def _likelihoods(outputs: Sequence[Any], labels: Any) -> Floats:
    """Negative log-likelihood and number of a row's tokens; an output is [tokens, 2], the second its likelihood."""
    return np.array([[-row[:, 1].astype(np.float64).sum(), len(row)] for row in outputs], dtype=np.float64)


def _token_hits(outputs: Sequence[Any], labels: Sequence[Any]) -> Floats:
    """Tokens of a row that were given their label, in points of 100, and how many have one."""
    return np.array([[100.0 * hits.sum(), len(hits)] for hits in map(_hits, outputs, labels)])


def _hits(output: Any, labels: Any) -> NDArray[np.bool_]:
    result: NDArray[np.bool_] = output[:, 0].astype(np.int64) == labels[labels >= 0]
    return result


def _token_agreement(outputs: Sequence[Any], original: Sequence[Any]) -> Floats:
    pairs = zip(outputs, original, strict=True)
    return np.array([[100.0 * (ours[:, 0] == theirs[:, 0]).sum(), len(ours)] for ours, theirs in pairs])


def _token_errors(outputs: Sequence[Any], labels: Sequence[Any]) -> Floats:
    """Each row's true positives, false positives and false negatives of every class, over its tokens."""
    classes = 1 + int(max(values.max(initial=0) for values in (*(row[:, 0] for row in outputs), *labels)))
    rows = []
    for output, known in zip(outputs, labels, strict=True):
        guessed, true = np.eye(classes)[output[:, 0].astype(np.int64)], np.eye(classes)[known[known >= 0]]
        counts = (guessed * true, guessed * (1 - true), (1 - guessed) * true)
        rows.append(np.concatenate([count.sum(axis=0) for count in counts]))
    return np.array(rows)


def _perplexity(sums: Floats) -> Floats:
    result: Floats = np.exp(np.minimum(_mean(sums), 700))  # more is beyond a float
    return result


def _words(text: str) -> list[str]:
    """Words without case, punctuation and articles, as SQuAD has them (Rajpurkar et al. 2016, arXiv 1606.05250)."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _exact(outputs: Sequence[str], labels: Sequence[str]) -> Floats:
    return _share([_words(ours) == _words(theirs) for ours, theirs in zip(outputs, labels, strict=True)])


def _token_f1(outputs: Sequence[str], labels: Sequence[str]) -> Floats:
    return _share([_overlap(_words(ours), _words(theirs)) for ours, theirs in zip(outputs, labels, strict=True)])


def _overlap(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def _word_errors(outputs: Sequence[str], labels: Sequence[str]) -> Floats:
    """Substitutions, insertions and deletions, in points of 100, and the words that should have been said."""
    try:
        import jiwer
    except ImportError as error:
        raise UnavailableError("The word error rate needs jiwer: install edgepress[audio].") from error
    rows = []
    for ours, theirs in zip(outputs, labels, strict=True):
        found = jiwer.process_words(" ".join(_spoken(theirs)), " ".join(_spoken(ours)))
        wrong = found.substitutions + found.insertions + found.deletions
        rows.append([100.0 * wrong, float(len(_spoken(theirs)))])
    return np.array(rows)


def _spoken(text: str) -> list[str]:
    return re.sub(r"[^\w\s']", " ", text.lower()).split()


def _agreement(outputs: Any, original: Any) -> Floats:
    return _share(outputs.argmax(axis=-1) == original.argmax(axis=-1))


def _vectors(outputs: Any) -> Floats:
    """What is answered to each row, [n, any]."""
    return np.asarray(outputs, dtype=np.float64).reshape(len(outputs), -1)


def _deviations(outputs: Any, original: Any) -> Floats:
    """A row, its squared error, its square, and the original's numbers themselves: [n, 3 + numbers]."""
    ours, theirs = _vectors(outputs), _vectors(original)
    error = np.square(ours - theirs).sum(axis=1)
    theirs = theirs - theirs.mean(axis=0)  # what they vary by does not move; its rounding does
    return np.column_stack([np.ones(len(theirs)), error, np.square(theirs).sum(axis=1), theirs])


def _determination(sums: Floats) -> Floats:
    """100 (1 - error / variance about the mean): the coefficient of determination, R^2.

    It is not clipped: 0 is as near as the original's mean answer is, below 0 is worse. Where the original answers every
    row alike there is nothing to explain: 100 where the answers are the same to the last bit, else 0.
    """
    rows, error, square = sums[..., 0], sums[..., 1], sums[..., 2]
    spread = square - np.square(sums[..., 3:]).sum(axis=-1) / np.maximum(rows, 1)
    varies = spread > 1e-12 * square  # less is rounding
    share = 1 - error / np.where(varies, spread, 1)
    result: Floats = 100 * np.where(varies, share, error == 0)
    return result


def _cosine(outputs: Any, original: Any) -> Floats:
    ours, theirs = _vectors(outputs), _vectors(original)
    if ours.shape[1] == 1:
        raise InputError(
            "The answers are one number a row, between which there is no angle: 'number-agreement' compares numbers."
        )
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    return _share((ours * theirs).sum(axis=1) / np.maximum(norms, 1e-12))


def _divergence(outputs: Any, original: Any) -> Floats:
    """Kullback-Leibler divergence of the answer's distribution from the original's, in nats."""
    ours, theirs = (log_softmax(np.asarray(x, dtype=np.float64), axis=-1) for x in (outputs, original))
    values = (np.exp(theirs) * (theirs - ours)).sum(axis=-1).reshape(len(ours), -1).mean(axis=1)
    return np.stack([values, np.ones_like(values)], axis=1)


KNOWN = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _accuracy, _mean),
        Metric("top5", partial(_top, k=5), _mean),
        Metric("f1", _errors_of_two, _f1),
        Metric("f1-macro", _errors, _f1_macro),
        Metric("matthews", _matches, _matthews),
        Metric("pearson", _moments, _correlation),
        Metric("spearman", _ranked_moments, _correlation),
        Metric("mse", _squares, _mean, better=-1, unit="of squared error"),
        Metric("perplexity", _likelihoods, _perplexity, better=-1, unit="of perplexity"),
        Metric("token-accuracy", _token_hits, _mean),
        Metric("token-f1-macro", _token_errors, _f1_macro),
        Metric("token-agreement", _token_agreement, _mean, against_original=True),
        Metric("exact-match", _exact, _mean, of_texts=True),
        Metric("token-f1", _token_f1, _mean, of_texts=True),
        Metric("wer", _word_errors, _mean, better=-1, of_texts=True),
        Metric("recall@1", partial(_top, k=1), _mean),
        Metric("recall@5", partial(_top, k=5), _mean),
        Metric("recall@10", partial(_top, k=10), _mean),
        Metric("agreement", _agreement, _mean, against_original=True),
        Metric("number-agreement", _deviations, _determination, against_original=True),
        Metric("cosine", _cosine, _mean, against_original=True),
        Metric("kl", _divergence, _mean, better=-1, against_original=True, unit="nats"),
    )
}


def get(name: str) -> Metric:
    """The metric of this name, or the user's own, ``package.module:function``: its mean over rows, more being better.

    The function maps outputs and labels of n rows to n numbers. Raises UsageError where there is no such metric.
    """
    from . import functions

    if functions.named(name):
        return Metric(name, partial(_own, functions.find(name), name), _mean)
    if name not in KNOWN:
        raise UsageError(f"There is no metric '{name}' (known: {', '.join(KNOWN)}, or package.module:function).")
    return KNOWN[name]


def told(metric: str, drop: float) -> str:
    """A drop in words: ``0.40 points lost``, ``0.02 of perplexity gained``."""
    unit = KNOWN[metric].unit if metric in KNOWN else f"of {metric}"
    return f"{abs(drop):.2f} {unit} {'lost' if drop > 0 else 'gained'}"


def _own(function: Callable[[Any, Any], Any], name: str, outputs: Any, labels: Any) -> Floats:
    try:
        values = np.asarray(function(outputs, labels), dtype=np.float64)
    except Exception as error:  # whatever the user's own code raises
        raise InputError(f"{name}() failed with {type(error).__name__}: {' '.join(str(error).split())}.") from error
    if values.shape != (len(labels),) or not np.isfinite(values).all():
        raise InputError(f"{name}() must return {len(labels)} finite numbers, one a row; it gave shape {values.shape}.")
    return np.stack([values, np.ones_like(values)], axis=1)
