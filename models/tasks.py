"""Tasks: what a model's answer to a row is, what it is trained on, and what it may be judged by.

An answer is what is kept of a row's output: small, so that the answers to all rows fit in memory, and enough for every
metric of the task. A loss is what the gradients are of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ..errors import InputError
from . import padding
from .data import NO_LABEL, Batch, Labels

Answers = list[NDArray[Any]]
FIDELITY = ("agreement", "cosine", "kl")


@dataclass(frozen=True)
class Task:
    """``answers`` maps a batch's output and inputs to one array a row; ``metrics`` judge these, the first by default.

    Without labels ``fidelity`` judges them: how near they are to the original's.
    """

    name: str
    metrics: tuple[str, ...]
    fidelity: str
    answers: Callable[[Tensor, Batch], Answers]

    @property
    def by_token(self) -> bool:
        return self.answers is _of_tokens


def _whole(output: Tensor, batch: Batch) -> Answers:
    """The row's output as it is: the logits of its classes, its number."""
    return list(output.numpy(force=True).astype(np.float32))


def _of_tokens(output: Tensor, batch: Batch) -> Answers:
    """For every judged token the class that was chosen, and the log-likelihood of its label: [tokens, 2].

    Without labels every token of the input is judged, by the class that was chosen.
    """
    logs = functional.log_softmax(output.detach().float(), dim=-1)
    chosen = logs.argmax(dim=-1)
    labels = batch.labels.to(logs.device) if batch.labels is not None else _everywhere(batch, logs, chosen)
    real = labels != NO_LABEL
    likelihood = logs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    both = torch.stack([chosen.float(), likelihood], dim=-1).numpy(force=True)
    return [row[keep] for row, keep in zip(both, real.numpy(force=True), strict=True)]


def _everywhere(batch: Batch, output: Tensor, chosen: Tensor) -> Tensor:
    """``chosen`` as labels, at every token of ``output`` that is not padding."""
    real = padding.real(batch.inputs, output)
    return chosen if real is None else chosen.masked_fill(~real.to(chosen.device), NO_LABEL)


def _pooled(output: Tensor, batch: Batch) -> Answers:
    """The mean of the row's hidden states over its real tokens (Reimers & Gurevych 2019, arXiv 1908.10084)."""
    if output.dim() < 3:
        return _whole(output, batch)
    mask = padding.real(batch.inputs, output)
    if mask is None:
        return _whole(output.flatten(1, -2).mean(dim=1), batch)
    weights = mask[..., None].to(output)
    return _whole((output * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1), batch)


OF_CLASSES = ("accuracy", "top5", "f1", "f1-macro", "matthews", *FIDELITY)

CLASSIFICATION = Task("classification", OF_CLASSES, "agreement", _whole)
REGRESSION = Task("regression", ("spearman", "pearson", "mse", "number-agreement"), "number-agreement", _whole)
TOKENS = Task(
    "token classification", ("token-accuracy", "token-f1-macro", "token-agreement"), "token-agreement", _of_tokens
)
LANGUAGE = Task(
    "language modelling", ("perplexity", "token-accuracy", "token-agreement"), "token-agreement", _of_tokens
)
GENERATION = Task(
    "generation",
    ("token-f1", "exact-match", "wer", "perplexity", "token-accuracy", "token-agreement"),
    "token-agreement",
    _of_tokens,
)
RETRIEVAL = Task("retrieval", ("recall@1", "recall@5", "recall@10", *FIDELITY), "agreement", _whole)
EMBEDDING = Task("embedding", ("cosine", "agreement", "kl", "number-agreement"), "cosine", _pooled)


def of(architecture: str, config: Mapping[str, Any], num_labels: int) -> Task:
    """The task of a model class of transformers; what its name does not say is ``EMBEDDING``."""
    if architecture.endswith("TokenClassification"):
        return TOKENS
    if architecture.endswith(("Classification", "Classifier")):
        single = num_labels == 1 or config.get("problem_type") == "regression"
        return REGRESSION if single else CLASSIFICATION
    if architecture.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")):
        return LANGUAGE
    if architecture.endswith("ForConditionalGeneration"):
        return GENERATION
    return RETRIEVAL if architecture in {"CLIPModel", "SiglipModel"} else EMBEDDING


def of_labels(labels: Labels) -> Task:
    """The task that labels speak of: classes, numbers, classes of tokens; without any, ``EMBEDDING``."""
    if labels is None:
        return EMBEDDING
    if isinstance(labels, tuple):
        return TOKENS
    return CLASSIFICATION if np.issubdtype(labels.dtype, np.integer) else REGRESSION


def losses(task: Task, output: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
    """The loss of each row, [batch]: cross-entropy with its class, or its mean over the row's tokens; of a number half
    the squared error; of a pair of towers the cross-entropy of finding the row's own partner in the batch.

    Without labels the answer is drawn from what the model gives: a class from its softmax, numbers and hidden states
    from a Gaussian around them. The expected outer product of the gradients is then the Fisher information proper, and
    not the empirical one (Kunstner et al. 2019, arXiv 1905.12558).
    """
    labels = torch.arange(len(output)) if task is RETRIEVAL else batch.labels
    labels = None if labels is None else labels.to(output.device)
    if task in {REGRESSION, EMBEDDING}:
        flat = output.flatten(1)
        if labels is not None and labels.is_floating_point():
            return 0.5 * (flat[:, 0] - labels.to(flat)).square()
        if labels is None:
            noise = torch.randn(output.shape, generator=generator).to(output)
            mask = padding.real(batch.inputs, output)
            if mask is not None:
                noise = noise * mask[..., None].to(noise)
            return (output * noise).flatten(1).sum(dim=1) / math.sqrt(flat.shape[1])
    if labels is None:
        shares = output.detach().float().softmax(dim=-1).cpu()  # where the generator draws, the same on any device
        labels = torch.multinomial(shares.flatten(0, -2), 1, generator=generator).reshape(output.shape[:-1])
        labels = labels.to(output.device)
        labels = _everywhere(batch, output, labels)
    if output.shape[:-1] != labels.shape:
        raise InputError(
            f"The model answers {list(output.shape[:-1])} tokens or rows, and {list(labels.shape)} have a label."
        )
    each = functional.cross_entropy(output.transpose(1, -1), labels, ignore_index=NO_LABEL, reduction="none")
    whole: Tensor = each.flatten(1).sum(dim=1) if labels.dim() > 1 else each
    return whole / (labels != NO_LABEL).reshape(len(labels), -1).sum(dim=1).clamp(min=1)
