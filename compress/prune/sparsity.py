"""Sparsity: single weights are set to zero, layer by layer; every shape stays as it is.

What    A share of each linear layer's weights goes (unstructured, 0.5 say), or all but N of every M along the inputs
        (N:M, 2:4 say). Which ones: by magnitude, by Wanda's |w| |x|, or by OBS, which also changes what stays so that
        the layer's outputs on calibration rows change least. Biases make up for the mean of the change.
When    2:4 for TensorRT, whose sparse tensor cores skip the zeros; unstructured for files that are compressed. ONNX
        Runtime on a CPU multiplies zeros like anything else: there it is not faster.
Cost    One pass over the rows; for each layer a Gram matrix [in, in] and, for OBS, its inverse.
Source  Magnitude: Han et al. 2015 (arXiv 1506.02626); Wanda: Sun et al. 2023 (arXiv 2306.11695); OBS: Hassibi and Stork
        1992, column by column as SparseGPT, Frantar and Alistarh 2023 (arXiv 2301.00774); 2:4: Mishra et al. 2021
        (arXiv 2104.08378)

Derivation of OBS. With C the second moment of the inputs (about their mean, which the bias answers for), a row w of the
matrix that becomes w' changes its output by (w - w') C (w - w')ᵀ on average. Columns are decided from the first to the
last, and those decided stay. Setting w_i to zero costs w_i² / D_ii² at least, and does so when the columns after i take
up -w_i / D_ii D_i,: with D the upper Cholesky factor of C⁻¹, D^T D = C⁻¹, whose row i is what the Schur complements of
i columns leave of the inverse. The last columns cannot be made up for by any after them, so a row whose change came out
larger than that of plain zeros in the same places gets these.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ...models.layers import matrix
from ...models.workload import Progress, Workload
from ..cholesky import damp_, inverse_
from ..score.readers import Moments
from .inputs import linear_layers, moments

METHODS = ("obs", "wanda", "magnitude")
BLOCK = 128
"""Columns between which zeros are shared out by OBS where there is no pattern, as in SparseGPT."""
RIDGE = 1e-2
"""Added to C, in units of its mean diagonal, so that it can be inverted."""


@dataclass(frozen=True)
class Pattern:
    """The share ``zeros`` of the weights of a layer goes; where ``group`` is set, of every so many along the inputs."""

    zeros: Fraction
    group: int = 0

    @classmethod
    def parse(cls, text: str | float) -> Pattern:
        """``0.5``, or ``2:4`` for two of four that stay. Raises UsageError for anything else."""
        try:
            if isinstance(text, str) and ":" in text:
                kept, group = (int(part) for part in text.split(":"))
                found = cls(Fraction(group - kept, group), group)
            else:
                found = cls(Fraction(str(float(text))))
        except (ValueError, ZeroDivisionError, OverflowError) as error:
            raise UsageError(f"'{text}' is not a sparsity like 0.5, the share of zeros, or like 2:4.") from error
        if not 0 < found.zeros < 1 or found.group < 0:
            raise UsageError(f"A sparsity of {text} leaves all weights or none; it must leave some and take some.")
        return found


def sparsify(
    workload: Workload,
    sparsity: str | float,
    *,
    method: str = "obs",
    names: Sequence[str] | None = None,
    rows: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> Workload:
    """A copy of ``workload`` with zeros in the layers ``names``, by default in all linear ones of the blocks.

    ``sparsity`` is a share or a pattern, see :meth:`Pattern.parse`; a layer whose inputs do not come in whole groups is
    left alone, or refused where it was named. Rows are needed but for ``method="magnitude"``. Raises UsageError.
    """
    pattern = Pattern.parse(sparsity)
    if method not in METHODS:
        raise UsageError(f"There is no method '{method}' (known: {', '.join(METHODS)}).")
    known = linear_layers(workload)
    for name in names or ():
        if name not in known:
            raise UsageError(f"'{name}' is not a linear layer in a block of {workload.name}.")
        _check(name, matrix(workload.module.get_submodule(name)), pattern)
    wanted = [n for n in known if not _remainder(matrix(workload.module.get_submodule(n)), pattern)]
    wanted = wanted if names is None else list(names)
    if not wanted:
        raise UsageError(f"{workload.name} has no linear layer whose inputs come in groups of {pattern.group}.")
    seen: dict[str, Moments] = {}
    if method != "magnitude":
        seen = moments(workload, wanted, rows=rows, seed=seed, progress=progress)
    result = workload.with_module(copy.deepcopy(workload.module), workload.structure, workload.plan)
    with torch.no_grad():
        for name in wanted:
            layer: Any = result.module.get_submodule(name)
            _thin(layer, pattern, method, seen.get(name))
    return result


def _thin(layer: Any, pattern: Pattern, method: str, seen: Moments | None) -> None:
    weight = matrix(layer)
    before = weight.detach().double()
    if seen is None:
        after = before * _kept(before, pattern)
    elif method == "obs":
        after = obs(before, seen.covariance(centred=layer.bias is not None), pattern)
    else:
        after = before * _kept(before * seen.square.double().sqrt(), pattern, rows=True)
    weight.copy_(after)
    if seen is not None and layer.bias is not None:
        layer.bias.add_(((before - after) @ seen.mean.double()).to(layer.bias.dtype))


def obs(weight: Tensor, moment: Tensor, pattern: Pattern) -> Tensor:
    """``weight`` [out, in] with zeros after ``pattern``, the rest changed so that outputs on inputs with the second
    moment ``moment`` [in, in] change little; both float64."""
    columns = weight.shape[1]
    factor = torch.linalg.cholesky(inverse_(damp_(moment.clone(), ridge=RIDGE)), upper=True)
    diagonal = factor.diagonal()
    found, kept = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    step = pattern.group * max(BLOCK // pattern.group, 1) if pattern.group else BLOCK
    for start in range(0, columns, step):
        block = slice(start, min(start + step, columns))
        errors = torch.zeros_like(found[:, block])
        if not pattern.group:
            kept[:, block] = _kept(found[:, block] / diagonal[block], pattern)
        for column in range(block.start, block.stop):
            if pattern.group and column % pattern.group == 0:
                group = slice(column, column + pattern.group)
                kept[:, group] = _kept(found[:, group] / diagonal[group], pattern)
            lost = torch.where(kept[:, column], 0.0, found[:, column]) / diagonal[column]
            found[:, column : block.stop] -= lost[:, None] * factor[column, column : block.stop]
            errors[:, column - block.start] = lost
        found[:, block.stop :] -= errors @ factor[block, block.stop :]
    found = torch.where(kept, found, 0.0)
    plain = torch.where(kept, weight, 0.0)
    better = _change(weight - found, moment) < _change(weight - plain, moment)
    return torch.where(better[:, None], found, plain)


def _change(difference: Tensor, moment: Tensor) -> Tensor:
    """How much each output changes, E[(d x)²] of every row d of ``difference`` [out, in]: [out]."""
    return ((difference @ moment) * difference).sum(dim=1)


def _kept(scores: Tensor, pattern: Pattern, *, rows: bool = False) -> Tensor:
    """Which weights stay, those of largest |score| [out, in]: in each group where there are groups, else in each row
    where ``rows``, else in all."""
    pool = scores.abs()
    if pattern.group:
        pool = pool.reshape(len(scores), -1, pattern.group)
    elif not rows:
        pool = pool.reshape(1, -1)
    going = round(pattern.zeros * pool.shape[-1])
    lowest = pool.argsort(dim=-1, stable=True)[..., :going]
    kept = torch.ones_like(pool, dtype=torch.bool).scatter(-1, lowest, torch.zeros_like(lowest, dtype=torch.bool))
    return kept.reshape(scores.shape)


def _remainder(weight: Tensor, pattern: Pattern) -> int:
    return weight.shape[1] % pattern.group if pattern.group else 0


def _check(name: str, weight: Tensor, pattern: Pattern) -> None:
    if _remainder(weight, pattern):
        raise UsageError(f"'{name}' has {weight.shape[1]} inputs, which are no whole groups of {pattern.group}.")


def zeros(workload: Workload) -> dict[str, float]:
    """The share of zeros in the matrix of every linear layer in the blocks, by path."""
    of = {name: matrix(workload.module.get_submodule(name)) for name in linear_layers(workload)}
    return {name: float((weight == 0).double().mean()) for name, weight in of.items()}


def follows(weight: Tensor, sparsity: str) -> bool:
    """Whether ``weight`` [out, in] has at most N of every M weights along the inputs other than zero, for "N:M"."""
    pattern = Pattern.parse(sparsity)
    if not pattern.group or _remainder(weight, pattern):
        return False
    groups = weight.reshape(len(weight), -1, pattern.group)
    return bool(((groups != 0).sum(dim=-1) <= round((1 - pattern.zeros) * pattern.group)).all())
