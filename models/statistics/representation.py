"""Representation: how much each block changes what it is given, and which depths hold nearly the same.

Block influence is 1 - E[cos(input, output)] over tokens (ShortGPT: Men et al. 2024, arXiv 2403.03853). Similarity is
linear CKA (Kornblith et al. 2019, arXiv 1905.00414) between all pairs of depths of a stack, tokens being the examples.
Its three HSIC terms are the unbiased estimator (Song et al. 2012, JMLR 13), averaged over minibatches of at most
``MINIBATCH`` tokens that are drawn without replacement from each batch (Nguyen et al. 2021, arXiv 2010.15327): every
token is in one minibatch. The estimator of each minibatch is exact, its mean is unbiased whatever their size, and the
state is layers^2 numbers; the exact CKA of all tokens at once would need layers^2 matrices of hidden_size^2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from ..structure import Stack
from ..workload import Workload
from .tokens import Tokens

MINIBATCH = 256
FEWEST = 4
"""Examples that the unbiased estimator needs."""


class Change:
    """Running means, over tokens, of what one block does to its input."""

    def __init__(self) -> None:
        self.tokens, self.cosine, self.update_norm = 0, 0.0, 0.0

    def update(self, before: Tensor, after: Tensor) -> None:
        """Add tokens: [tokens, hidden_size] before and after the block."""
        self.tokens += len(before)
        self.cosine += float(cosine_similarity(before, after, dim=-1).sum(dtype=torch.float64))
        norm = before.norm(dim=-1).clamp(min=torch.finfo(before.dtype).tiny)
        self.update_norm += float(((after - before).norm(dim=-1) / norm).sum(dtype=torch.float64))

    def to_json(self) -> dict[str, float]:
        cosine = self.cosine / max(self.tokens, 1)
        return {"cosine": cosine, "influence": 1 - cosine, "update_norm": self.update_norm / max(self.tokens, 1)}


class Similarity:
    """Running mean of the HSIC of every pair of layers; CKA is made of it at the end."""

    def __init__(self, layers: int, seed: int) -> None:
        self.minibatches = 0
        self.hsic = torch.zeros(layers, layers, dtype=torch.float64)
        self.random = torch.Generator().manual_seed(seed)

    def update(self, hidden: Sequence[Tensor]) -> None:
        """Add the same tokens as each layer holds them, [tokens, features of the layer]."""
        order = torch.randperm(len(hidden[0]), generator=self.random)
        for part in order.tensor_split(math.ceil(len(order) / MINIBATCH) or 1):
            if len(part) >= FEWEST:
                self.hsic += hsic(torch.stack([_gram(layer[part].double()) for layer in hidden]))
                self.minibatches += 1

    def cka(self) -> list[list[float | None]]:
        """[layers, layers]; None where a layer holds the same for all tokens, or where there were too few of them."""
        own = self.hsic.diagonal()
        cka = self.hsic / (own[:, None] * own).clamp(min=0).sqrt()
        return [[value if math.isfinite(value) else None for value in row] for row in cka.tolist()]


def hsic(grams: Tensor) -> Tensor:
    """The unbiased HSIC [layers, layers] of Gram matrices [layers, examples, examples] with zero diagonals."""
    n = grams.shape[-1]
    flat, sums = grams.flatten(1), grams.sum(dim=-1)
    total = sums.sum(dim=-1)
    constant = total[:, None] * total / ((n - 1) * (n - 2))
    return (flat @ flat.T + constant - 2 / (n - 2) * sums @ sums.T) / (n * (n - 3))


def _gram(examples: Tensor) -> Tensor:
    """Inner products of examples [n, features]; their mean, which HSIC is blind to, would only cost precision."""
    centred = examples - examples.mean(dim=0)
    return (centred @ centred.T).fill_diagonal_(0)


class Observer:
    """Follows the hidden states through each stack."""

    def __init__(self, workload: Workload, tokens: Tokens, seed: int) -> None:
        self.tokens, self.seed = tokens, seed
        self.stacks = workload.structure.stacks
        self.row_axes = {site.layer: site.row_axis for site in workload.structure.of_kind("block")}
        self.hidden: dict[str, list[Tensor]] = {}
        self.runs: Counter[int] = Counter()
        self.changes: dict[tuple[Stack, int, int], Change] = {}
        self.similarity: dict[str, Similarity] = {}

    def see(self, stack: Stack, layer: int, before: Tensor, after: Tensor) -> None:
        """Take note of one run of a block: its input and output, [batch, length, hidden_size]."""
        before, after = before.detach(), after.detach()
        held = self.hidden.setdefault(stack.path, [])
        held += [after] if held else [before, after]
        change = self.changes.setdefault((stack, layer, self.runs[layer]), Change())
        change.update(*(self.tokens.of(stack.path, x, self.row_axes.get(layer, 0)) for x in (before, after)))
        self.runs[layer] += 1

    def end_batch(self) -> None:
        for stack in self.stacks:
            hidden, row_axis = self.hidden.get(stack.path, []), self.row_axes.get(stack.start, 0)
            if hidden:
                similarity = self.similarity.setdefault(stack.path, Similarity(len(hidden), self.seed))
                similarity.update([self.tokens.of(stack.path, layer, row_axis) for layer in hidden])
        self.hidden.clear()
        self.runs.clear()

    def summary(self) -> dict[str, Any]:
        """``layers``: for each run of a block its ``layer``, ``stack`` and ``run``; the mean over tokens of the
        ``cosine`` of its input and output, its ``influence`` 1 - cosine, and ``update_norm``, the norm of what it adds
        over the norm of its input. ``cka``: for each stack the ``names`` of its depths and ``values`` between them."""
        layers = [
            {"layer": layer, "stack": stack.path, "run": run, **change.to_json()}
            for (stack, layer, run), change in self.changes.items()
        ]
        cka = []
        for stack in self.stacks:
            if stack.path in self.similarity:
                mine = [(layer, run) for of, layer, run in self.changes if of is stack]  # in the order that they ran in
                names = ["input", *(f"{layer}, run {run}" if stack.shared else str(layer) for layer, run in mine)]
                cka.append({"stack": stack.path, "names": names, "values": self.similarity[stack.path].cka()})
        return {"layers": sorted(layers, key=lambda entry: (entry["layer"], entry["run"])), "cka": cka}

    def notes(self) -> list[str]:
        if not self.stacks:
            return ["this model has no list of blocks, so there is nothing to say about representation"]
        return []


@contextmanager
def observed(workload: Workload, tokens: Tokens, seed: int) -> Iterator[Observer]:
    """Within the context every block's input and output are compared."""
    observer = Observer(workload, tokens, seed)
    with ExitStack() as exit_:
        for stack in observer.stacks:
            for layer in stack.layers:
                block = workload.module.get_submodule(f"{stack.path}.{layer - stack.start}")
                exit_.callback(block.register_forward_hook(_hook(observer, stack, layer)).remove)
        yield observer


def _hook(observer: Observer, stack: Stack, layer: int) -> Any:
    def see(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        observer.see(stack, layer, args[0], output[0] if isinstance(output, tuple) else output)

    return see
