"""Reconstruction: what is left of each layer is solved anew so that the model computes what it did before.

What    Layer after layer, the weights of each consumer of pruned units (attention output, second feed-forward layer)
        are replaced by the ridge-regression solution that brings the residual stream back to the original's. Without
        blocks each layer brings back its own outputs (:mod:`.layerwise`). Last comes the layer that makes the answer
        (:mod:`.output_layer`).
When    Always after pruning: it needs no labels and no training, and it gives distillation a far better start.
Cost    Each block of both models is run over the rows a few times; memory is one Gram matrix [features, features] in
        float64, and in a temporary file the states of the rows after one block (:mod:`.replay`).
Source  Least-squares mask tuning of Kwon et al. 2022 (arXiv 2204.09656, section 4.3), here over all weights of the
        consumer (He et al. 2017, arXiv 1707.06168) and with the residual stream's own error in the target

Derivation. A consumer adds c (W x + b) to the stream s, where c is one, or the branch's learned scale. In the original
the sum is t = s_o + c (W_o x_o + b_o). In the pruned model the stream is s_p, different already, and x_p has fewer
features. The sum is brought back where W x_p + b is (t - s_p) / c, which :mod:`.ridge` solves for. A block that runs
several times is solved for all of its runs at once, each with the stream as it is before. Models that merge tokens are
solved with every token in its place: they would not merge the same ones, and t and s_p not be of one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ...models import hidden, low_rank, padding, token_merging
from ...models.data import Batch
from ...models.layers import matrix
from ...models.memory import give_back, giving_back
from ...models.structure import Site
from ...models.surgery import prune as copy_of
from ...models.workload import Progress, Workload
from ...plan import PruningPlan
from ..score.readers import Moments
from . import layerwise, output_layer
from .low_rank import fit
from .replay import Replay, consumed
from .ridge import Ridge

BATCH, TOKENS = 32, 256


def reconstruct(
    original: Workload,
    pruned: Workload,
    *,
    rows: int = 512,
    ridge: float = 1e-2,
    seed: int = 0,
    in_place: bool = False,
    progress: Progress | None = None,
) -> Workload:
    """A copy of ``pruned`` with every consumer and the output layer re-solved on ``rows`` calibration rows of
    ``original``.

    ``pruned`` must descend from ``original``'s module, and not be it. ``ridge`` is λ in units of the Gram matrix's mean
    diagonal. With ``in_place`` the layers of ``pruned`` itself are solved, and there is no copy.
    """
    if bool(token_merging.merged(original.module)) != bool(token_merging.merged(pruned.module)):
        raise UsageError(f"{pruned.name} merges tokens and its original does not: reconstruct first, merge then.")
    result = pruned if in_place else copy_of(pruned, PruningPlan())
    sample = original.data.calibration.take(rows, seed)
    gone = _blocks_gone_since(original, pruned)
    layers = [layer for layer in range(original.structure.num_layers) if layer not in gone]
    sites = [site for site in result.structure.sites if consumed(site)]
    stream = hidden.kept(original, pruned)
    batches = list(sample.batches(BATCH, tokens=TOKENS))
    then, now = Replay(original, batches, fixed=True), Replay(result, batches)
    last = output_layer.output_layer(result)
    steps: list[Callable[[], None]] = [
        partial(_solve, (then, original.structure.site(site.kind, layers[site.layer])), (now, site), ridge, stream)
        for site in sites
    ]
    if not result.structure.stacks:
        steps += [
            partial(layerwise.solve, then, now, name, ridge) for name in layerwise.readers(result) if name != last
        ]
    if last:
        steps.append(partial(output_layer.solve, then, now, last))
    with torch.no_grad(), token_merging.unmerged(original.module, result.module):
        for done, step in enumerate(steps, 1):
            step()
            give_back()
            if progress:
                progress(done, len(steps), "layers solved")
    return result


def _blocks_gone_since(original: Workload, pruned: Workload) -> set[int]:
    """Layers of ``original`` that ``pruned`` lacks, in ``original``'s numbering."""
    total = original.structure.num_layers + len(original.plan.blocks)
    numbering = [layer for layer in range(total) if layer not in original.plan.blocks]
    return {numbering.index(layer) for layer in pruned.plan.blocks - original.plan.blocks}


def _solve(then: tuple[Replay, Site], now: tuple[Replay, Site], ridge: float, stream: Tensor) -> None:
    """Replace the weights of the consumer of ``now``, a workload's replay and a site, by the solution derived above.

    ``stream`` names the channels of the original's residual stream that are left.
    """
    consumer = _consumer(*now)
    factored = isinstance(consumer, low_rank.LowRank)
    sums = Ridge(now[1].consumer, consumer.weight if factored else matrix(consumer), consumer.bias)
    for batch, inputs, target in _targets(then, now, stream):
        real = padding.real(batch.inputs, inputs, now[1].consumer, row_axis=now[1].row_axis)
        real = torch.ones(inputs.shape[:-1], dtype=torch.bool) if real is None else real
        sums.add(inputs[real], target[real])
    if factored:  # of that rank, what comes nearest to the solution (reduced-rank regression)
        gram = sums.gram.clone()
        _fit(consumer, sums.solution_(ridge), gram, sums.weight.shape[1])
    else:
        sums.solve_(ridge)


def _targets(
    then: tuple[Replay, Site], now: tuple[Replay, Site], stream: Tensor
) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Of each batch the pruned consumer's input and, at its positions, the Y derived above.

    Where the input does not lie as the stream does (the windows of an image), Y is what the original's consumer makes.
    """
    (original, before), (pruned, site) = then, now
    scale = pruned.workload.module.get_parameter(site.scaled_by) if site.scaled_by else 1.0
    block = pruned.workload.structure.find("block", site.layer)
    turned_round = block is not None and block.row_axis != site.row_axis
    for number, batch in giving_back(enumerate(pruned.batches), every=4):
        for (read, wanted), (inputs, found) in zip(original.at(before, number), pruned.at(site, number), strict=True):
            made = _consumer(pruned, site)(inputs)
            error = _left(wanted, found, stream) - found
            error = error.transpose(0, 1) if turned_round else error
            if error.shape == made.shape:
                yield batch, inputs, error / scale + made
            else:
                yield batch, inputs, _left(_consumer(original, before)(read), made, stream)


def _left(states: Tensor, like: Tensor, stream: Tensor) -> Tensor:
    """``states`` of the original in the channels that ``like``, of the pruned model, has."""
    return states if states.shape[-1] == like.shape[-1] else states[..., stream]


def _consumer(replay: Replay, site: Site) -> Any:
    module = replay.workload.module
    return module.get_submodule(low_rank.owner(module, site.consumer))


def _fit(factored: low_rank.LowRank, solved: Tensor, gram: Tensor, width: int) -> None:
    """``solved`` [out, width, or width + 1 with the bias] as factors, for inputs with the Gram matrix ``gram``."""
    biased = len(gram) > width
    tokens = gram[-1, -1] if biased else gram.new_ones(())
    mean = gram[-1, :width] / tokens if biased else gram.new_zeros(width)
    seen = Moments(1, mean, gram.diagonal()[:width] / tokens, gram[:width, :width] / tokens)
    fit(factored, solved[:, :width], solved[:, -1] if biased else None, seen)
