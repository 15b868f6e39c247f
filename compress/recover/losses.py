"""What is distilled: how far the student's answers and states are from the original's, a term for each.

Every term is an error over the size of its own target: 0 is no difference, 1 is as far off as a student that knows
nothing, so that terms add up without weights. Errors and sizes are sums over rows and tokens, divided at the very end,
so that the shares of a batch that several processes look at add up to the whole batch.

    logits     squared error of the answer, over its mean square
    kl         Kullback-Leibler divergence of the answer's classes at a temperature, over that of giving every row the
               same, average shares (Hinton et al. 2015, arXiv 1503.02531)
    hidden     squared error of what each stack's last block puts out, over its squares
    layers     the same after every block; where blocks are gone, of what the next one left should read
    relations  Kullback-Leibler divergence of how alike tokens are to the queries, keys and values of each stack's last
               self-attention, over that of all being alike (MiniLMv2, Wang et al. 2020, arXiv 2012.15828; one relation
               head over all attention heads, since the student has fewer)
    labels     the loss of the rows' labels, over that of guessing
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import UsageError
from ...models import families, hidden, padding, tasks
from ...models.data import Batch
from ...models.workload import Workload

Term = Literal["logits", "kl", "hidden", "layers", "relations", "labels"]
TERMS = get_args(Term)
DEFAULT: tuple[Term, ...] = ("hidden", "logits")
LEAST = 1e-6
"""The size of a target is never taken to be less."""
SAMPLE = 256
"""Calibration rows that tell the size of the original's answers."""

Pairs = tuple[tuple[str, str], ...]
Seen = tuple[Tensor, dict[str, list[Tensor]]]
"""The answer of a forward pass, and what the watched modules put out in it, by path, one for each call."""


@dataclass(frozen=True)
class Objective:
    """The ``terms`` of a student and its original.

    ``pairs`` names for each term that compares states the modules of the student with those of the original; ``sizes``
    holds for the others the mean size of a target, for one row or token. ``stream`` are the channels of the original's
    residual stream that the student has.
    """

    terms: tuple[str, ...]
    temperature: float
    pairs: Mapping[str, Pairs]
    sizes: Mapping[str, float]
    stream: Tensor

    def watched(self, side: int) -> list[str]:
        """Paths of the modules that :func:`look` has to watch, of the student (0) or of the original (1)."""
        return list(dict.fromkeys(pair[side] for pairs in self.pairs.values() for pair in pairs))

    def __call__(self, task: tasks.Task, batch: Batch, ours: Seen, theirs: Seen) -> tuple[Tensor, Tensor, Tensor]:
        """Errors, sizes and weights, each [parts]: the loss is the sum of weight * error / size.

        ``ours`` and ``theirs`` are what :func:`look` saw of the student and of the original on ``batch``.
        """
        found = []
        for term in self.terms:
            parts = list(self._parts(term, task, batch, ours, theirs))
            found += [(error, size, 1 / len(parts)) for error, size in parts]
        errors, sizes, weights = zip(*found, strict=True)
        return torch.stack(errors), torch.stack(sizes).detach(), torch.tensor(weights).to(errors[0])

    def _parts(
        self, term: str, task: tasks.Task, batch: Batch, ours: Seen, theirs: Seen
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for student, original in self.pairs.get(term, ()):
            for mine, target in zip(ours[1][student], theirs[1][original], strict=True):
                mask = padding.real(batch.inputs, mine, student)
                if term == "relations":
                    yield _relations(_fine(mine), _fine(target), mask)
                else:
                    whole = target if target.shape == mine.shape else target[..., self.stream.to(target.device)]
                    a, b = _real(_fine(mine), mask), _real(_fine(whole), mask)
                    yield (a - b).square().sum(), b.square().sum()
        if term in self.sizes:
            error, count = self._answer(term, task, batch, _fine(ours[0]), _fine(theirs[0]))
            yield error, torch.full_like(error, count * self.sizes[term])

    def _answer(self, term: str, task: tasks.Task, batch: Batch, mine: Tensor, target: Tensor) -> tuple[Tensor, int]:
        """The summed error of a term about the answers, and over how many it is summed."""
        if term == "labels":
            each = tasks.losses(task, mine, batch, torch.Generator())
            return each.sum(), len(each)
        mask = padding.real(batch.inputs, mine)
        a, b = _real(mine, mask), _real(target, mask)
        if term == "logits":
            return (a - b).square().sum(), a.numel()
        logs, targets = (functional.log_softmax(x / self.temperature, dim=-1) for x in (a, b))
        return functional.kl_div(logs, targets, reduction="sum", log_target=True), logs[..., 0].numel()


def objective(student: Workload, original: Workload, terms: Sequence[str], *, temperature: float) -> Objective:
    """The objective of ``terms`` for a ``student`` that descends from ``original``.

    A model without blocks has no states to compare, and goes by its answers. Raises UsageError for a term that does not
    exist, or that this model or its rows cannot have.
    """
    unknown = sorted(set(terms) - set(TERMS))
    if unknown or not terms:
        raise UsageError(f"There is no loss '{', '.join(unknown)}' to distil with (there are: {', '.join(TERMS)}).")
    if "labels" in terms and original.data.train.labels is None:
        raise UsageError("The loss 'labels' needs rows with labels.")
    if "kl" in terms and original.task in {tasks.REGRESSION, tasks.EMBEDDING}:
        raise UsageError(f"The loss 'kl' compares classes; a model of {original.task.name} is distilled with 'logits'.")
    pairs: dict[str, Pairs] = {}
    for term in terms:
        if term in {"hidden", "layers", "relations"} and original.structure.stacks:
            pairs[term] = tuple(
                _relation_pairs(student, original) if term == "relations" else _blocks(student, original, term)
            )
    answers = [term for term in terms if term in {"logits", "kl", "labels"}]
    kept = tuple(term for term in terms if term in pairs or term in answers)
    if not kept:
        raise UsageError(f"{original.name} has no blocks, so only its answers can be distilled: logits or kl.")
    sizes = _sizes(original, answers, temperature)
    return Objective(kept, temperature, pairs, sizes, hidden.kept(original, student))


def look(workload: Workload, batch: Batch, paths: Sequence[str]) -> Seen:
    """Run ``workload`` on ``batch``, and return its answer and what the modules at ``paths`` put out."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}

    def keep(path: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[path].append(output[0] if isinstance(output, tuple) else output)

        return hook

    module: Any = workload.module
    inner = module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module
    handles = [inner.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    try:
        answer = workload.forward(batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return answer, seen


def _blocks(student: Workload, original: Workload, term: str) -> Iterator[tuple[str, str]]:
    """Blocks of the student, each with the block of the original whose output it should give: the one before the next
    block that is left, at the end of a stack its last. Of a shared block, which runs many times, all runs count."""
    before, after = original.structure, student.structure
    total = before.num_layers + len(original.plan.blocks)
    numbers = [layer for layer in range(total) if layer not in original.plan.blocks]
    left = [numbers.index(layer) for layer in range(total) if layer not in student.plan.blocks]
    for then, now in zip(before.stacks, after.stacks, strict=True):
        for layer in now.layers if term == "layers" else now.layers[-1:]:
            last = layer == now.layers[-1]
            source = then.layers[-1] if last else left[layer + 1] - 1
            yield f"{now.path}.{layer - now.start}", f"{then.path}.{source - then.start}"


def _relation_pairs(student: Workload, original: Workload) -> Iterator[tuple[str, str]]:
    """The query, key and value projections of the last block of each stack that has them apart."""
    declared = [a for blocks in families.get(original.structure.family).blocks for a in blocks.attentions]
    found = False
    for ours, theirs in _blocks(student, original, "hidden"):
        for attention in declared:
            names = {attention.query, attention.key, attention.value}
            if (
                attention.kind == "head"
                and len(names) == 3
                and _has(student, ours, names)
                and _has(original, theirs, names)
            ):
                found = True
                yield from ((f"{ours}.{name}", f"{theirs}.{name}") for name in sorted(names))
                break
    if not found:
        raise UsageError(f"{original.name} has no queries, keys and values apart, so its relations cannot be compared.")


def _has(workload: Workload, block: str, names: set[str]) -> bool:
    modules = {name for name, _ in workload.module.get_submodule(block).named_modules()}
    return names <= modules


def _relations(mine: Tensor, target: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Divergence of the softmax over tokens of scaled products, and the same of a uniform one; states are [batch,
    sequence, features]."""
    logs = []
    for states in (mine, target):
        products = states @ states.transpose(-1, -2) / math.sqrt(states.shape[-1])
        if real is not None:
            products = products.masked_fill(~real[:, None, :], torch.finfo(products.dtype).min)
        logs.append(functional.log_softmax(products, dim=-1))
    shares = logs[1].exp()
    each = (shares * (logs[1] - logs[0])).sum(dim=-1)
    known = (shares * logs[1]).sum(dim=-1)
    tokens = (
        torch.full_like(known, target.shape[-2]) if real is None else real.sum(dim=-1, keepdim=True).expand_as(known)
    )
    size = known + tokens.to(known).log()
    return (each if real is None else each[real]).sum(), (size if real is None else size[real]).sum()


def _fine(values: Tensor) -> Tensor:
    """At least float32: sums of squares overflow sooner."""
    return values if values.dtype in {torch.float32, torch.float64} else values.float()


def _real(values: Tensor, mask: Tensor | None) -> Tensor:
    """The entries of ``values`` that ``mask`` says are of real tokens, [tokens, features]; without one all."""
    return values if mask is None else values[mask]


def _sizes(original: Workload, terms: Sequence[str], temperature: float) -> dict[str, float]:
    """The mean size of a target of each of ``terms``, from the original's answers to calibration rows."""
    if not terms:
        return {}
    squares = count = rows = certain = 0.0
    shares: Any = 0.0
    numbers = 0.0
    device = next(original.module.parameters()).device
    with torch.no_grad():
        for batch in (moved(part, device) for part in original.data.calibration.take(SAMPLE).batches(32)):
            answer = _fine(original.forward(batch.inputs))
            answer = _real(answer, padding.real(batch.inputs, answer))
            squares, count = squares + float(answer.square().sum()), count + answer.numel()
            if "kl" in terms:
                logs = functional.log_softmax(answer / temperature, dim=-1).flatten(0, -2)
                shares, rows = shares + logs.exp().sum(dim=0), rows + len(logs)
                certain += float((logs.exp() * logs).sum())
            if batch.labels is not None and batch.labels.is_floating_point():
                numbers += float(batch.labels.square().sum())
    sizes = {"logits": squares / count}
    if "kl" in terms:
        mean = shares / rows
        sizes["kl"] = certain / rows - float(torch.special.xlogy(mean, mean).sum())
    if "labels" in terms:
        of_numbers = original.task in {tasks.REGRESSION, tasks.EMBEDDING}
        known = len(original.data.calibration.take(SAMPLE))
        sizes["labels"] = numbers / known / 2 if of_numbers else math.log(answer.shape[-1])
    return {term: max(sizes[term], LEAST) for term in terms}


def moved(batch: Batch, device: torch.device) -> Batch:
    """``batch`` with its tensors on ``device``."""
    labels = None if batch.labels is None else batch.labels.to(device)
    return Batch(batch.rows, {name: tensor.to(device) for name, tensor in batch.inputs.items()}, labels)
