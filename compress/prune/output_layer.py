"""Output layer: the layer that makes the answer is solved anew for the features that the pruned model gives it.

What    The linear layer whose output is the answer, such as a classifier, gets the ridge-regression solution that
        brings the answers back to the original's. How strong the ridge is, cross-validation over rows says.
When    After the layers before it have been solved (:mod:`.reconstruct`): it makes up for what they could not.
Cost    One forward pass of both models, and ``FOLDS`` matrices [features, features] in float64 with an
        eigendecomposition of each.
Source  Ridge regression, Hoerl & Kennard 1970 (Technometrics 12:1); the same for all outputs

Derivation. With features z the layer answers W z + b where the original answered y: e = y - W z - b is missing. The
sum over positions of |e - D z - d|² + λ |D|² is least, with the means z̄ and ē taken off, for
D = (Σ e zᵀ) (Σ z zᵀ + λ I)⁻¹ and d = ē - D z̄; W + D and b + d are the solution. Large λ leaves the layer as it is but
for the mean of its answers. A layer without a bias gets none: no means are taken off, and d = 0.

A pooled classifier sees one position of each row, often fewer positions than it has features; consumers in blocks see
thousands. A fixed λ would fit the noise of the one or waste the rows of another. So rows are dealt out to ``FOLDS``
folds, each is predicted from the others at every one of ``STRENGTHS``, and the λ of least squared error is taken, or
none of them where the layer as it is does better. Whole rows are dealt out, for positions of one row are alike. With
V = [D d], M = Σ [z; 1] [z; 1]ᵀ and N = Σ e [z; 1]ᵀ over a fold, its squared error is Σ |e|² - 2 tr(V Nᵀ) + tr(V M Vᵀ):
sums are all that is kept of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...models import padding, tasks
from ...models.memory import giving_back
from ...models.workload import Workload
from .inputs import ran
from .replay import Replay

FOLDS = 8
STRENGTHS = tuple(10.0**power for power in (-6, -5.5, -5, -4.5, -4, -3.5, -3, -2.5, -2, -1.5, -1, -0.5, 0, 0.5, 1))
"""λ in units of the largest eigenvalue of Σ z zᵀ."""
MOST = 1 << 25
"""Numbers that all sums may hold, 256 MB: those of a thousand classes do, and of a vocabulary do not."""


def output_layer(workload: Workload) -> str | None:
    """The path of the linear layer whose output is the answer.

    None where no layer's is, where other modules have its weight too, where its sums would be more than ``MOST``, and
    for models of language.
    """
    if workload.task in {tasks.LANGUAGE, tasks.GENERATION}:
        return None
    module = workload.module
    owners = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    own = [
        name
        for name, layer in module.named_modules()
        if type(layer) is nn.Linear and owners[id(layer.weight)] == 1 and _numbers(layer) <= MOST
    ]
    answer, made = ran(workload, own)
    same = [name for name, output in made if torch.equal(output, answer)]
    return same[-1] if same else None


def _numbers(layer: nn.Linear) -> int:
    """How many all folds' sums hold."""
    return FOLDS * (layer.in_features + layer.out_features) * layer.in_features


def solve(original: Replay, pruned: Replay, path: str) -> None:
    """Replace the weights of the pruned model's output layer ``path`` by the solution derived above.

    With fewer rows than ``FOLDS`` it stays as it is.
    """
    layer: Any = pruned.workload.module.get_submodule(path)
    if sum(len(batch.rows) for batch in pruned.batches) < FOLDS:
        return
    folds = _sums(original, pruned, path, layer)
    held = sum(folds[1:], folds[0])
    errors = torch.stack([fold.errors(_solutions(held - fold, centred=layer.bias is not None)) for fold in folds])
    total = errors.sum(0)
    best = int(total.argmin())
    if total[best] < held.missing:
        added = _solutions(held, centred=layer.bias is not None)[best]
        layer.weight += added[:, :-1].to(layer.weight.dtype)
        if layer.bias is not None:
            layer.bias += added[:, -1].to(layer.bias.dtype)


@dataclass(frozen=True)
class _Sums:
    """Sums over positions, in float64."""

    features: Tensor
    """M, [features + 1, features + 1]."""
    cross: Tensor
    """N, [outputs, features + 1]."""
    missing: Tensor
    """Σ |e|², a number."""

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.features + other.features, self.cross + other.cross, self.missing + other.missing)

    def __sub__(self, other: _Sums) -> _Sums:
        return _Sums(self.features - other.features, self.cross - other.cross, self.missing - other.missing)

    def errors(self, solutions: Sequence[Tensor]) -> Tensor:
        """The squared error of these positions with each V."""
        return torch.stack([self.missing + ((v @ self.features - 2 * self.cross) * v).sum() for v in solutions])


def _sums(original: Replay, pruned: Replay, path: str, layer: nn.Linear) -> list[_Sums]:
    """Those of every fold."""
    width, outputs = layer.in_features + 1, layer.out_features
    like = layer.weight.new_zeros((), dtype=torch.float64)
    folds = [
        _Sums(like.new_zeros(width, width), like.new_zeros(outputs, width), like.new_zeros(())) for _ in range(FOLDS)
    ]
    for number, batch in giving_back(enumerate(pruned.batches), every=4):
        wanted = original.through("", number, original.workload.forward)
        features, found = pruned.through("", number, lambda inputs: _seen(pruned.workload, path, inputs))
        real = padding.real(batch.inputs, found)
        rows = torch.from_numpy(batch.rows).to(found.device)
        z = nn.functional.pad(features.double(), (0, 1), value=1.0)
        missing = wanted.double() - found.double()
        for place, fold in enumerate(folds):
            mine = rows % FOLDS == place
            chosen = mine if real is None else mine[:, None] & real
            inside, e = z[chosen].flatten(0, -2), missing[chosen].flatten(0, -2)
            fold.features.addmm_(inside.T, inside)
            fold.cross.addmm_(e.T, inside)
            fold.missing.add_(e.square().sum())
    return folds


def _seen(workload: Workload, path: str, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the layer ``path`` reads, and the answer."""
    read: list[Tensor] = []
    layer = workload.module.get_submodule(path)
    handle = layer.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    try:
        answer = workload.forward(inputs)
    finally:
        handle.remove()
    return read[-1], answer


def _solutions(sums: _Sums, *, centred: bool) -> list[Tensor]:
    """V [outputs, features + 1] at each of ``STRENGTHS``."""
    count = sums.features[-1, -1].clamp(min=1)
    mean, offset = sums.features[:-1, -1] / count, sums.cross[:, -1] / count
    gram, cross = sums.features[:-1, :-1], sums.cross[:, :-1]
    if centred:
        gram, cross = gram - count * mean.outer(mean), cross - count * offset.outer(mean)
    values, vectors = torch.linalg.eigh(gram)
    turned = cross @ vectors
    found = []
    for strength in STRENGTHS:
        added = (turned / (values.clamp(min=0) + strength * values[-1].clamp(min=1e-300))) @ vectors.T
        last = offset - added @ mean if centred else torch.zeros_like(offset)
        found.append(torch.cat([added, last[:, None]], dim=1))
    return found
