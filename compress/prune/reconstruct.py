"""Reconstruction: what is left of each layer is solved anew so that the model computes what it did before.

What    Layer after layer, the weights of each consumer of pruned units (attention output, second feed-forward layer)
        are replaced by the ridge-regression solution that brings the residual stream back to the original's.
When    Always after pruning: it needs no labels and no training, and it gives distillation a far better start.
Cost    For each consumer, one pass of both models up to it over the rows; memory is one Gram matrix
        [features, features] in float64.
Source  Least-squares mask tuning of Kwon et al. 2022 (arXiv 2204.09656, section 4.3), here over all weights of the
        consumer (He et al. 2017, arXiv 1707.06168) and with the residual stream's own error in the target

Derivation. A consumer adds y = W x + b to the stream s. In the original the sum is t = s_o + W_o x_o + b_o. In the
pruned model the stream is s_p, different already, and x_p has fewer features. The sum over tokens of
|s_p + W x_p + b - t|^2 + λ |W - W_p|^2 is least, with Y = t - s_p, z = [x_p; 1] and V = [W b], where
V = (Y zᵀ + λ V_p) (z zᵀ + λ I)⁻¹: λ pulls towards the weights as they are, so few rows cannot ruin a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...models.data import Rows
from ...models.structure import Site
from ...models.surgery import prune as copy_of
from ...models.workload import Progress, Workload
from ...plan import PruningPlan

BATCH = 32


def reconstruct(
    original: Workload,
    pruned: Workload,
    *,
    rows: int = 128,
    ridge: float = 1e-2,
    seed: int = 0,
    progress: Progress | None = None,
) -> Workload:
    """A copy of ``pruned`` with every consumer re-solved on ``rows`` calibration rows of ``original``.

    ``pruned`` must descend from ``original``'s module. ``ridge`` is λ in units of the Gram matrix's mean diagonal.
    """
    result = copy_of(pruned, PruningPlan())
    sample = original.data.calibration.take(rows, seed)
    gone = _blocks_gone_since(original, pruned)
    layers = [layer for layer in range(original.structure.num_layers) if layer not in gone]
    sites = [site for site in result.structure.sites if site.kind != "block"]
    with torch.no_grad():
        for done, site in enumerate(sites, 1):
            before = original.structure.site(site.kind, layers[site.layer])
            _solve((original, before), (result, site), sample, ridge)
            if progress:
                progress(done, len(sites), "layers solved")
    return result


def _blocks_gone_since(original: Workload, pruned: Workload) -> set[int]:
    """Layers of ``original`` that ``pruned`` lacks, in ``original``'s numbering."""
    total = original.structure.num_layers + len(original.plan.blocks)
    numbering = [layer for layer in range(total) if layer not in original.plan.blocks]
    return {numbering.index(layer) for layer in pruned.plan.blocks - original.plan.blocks}


def _solve(then: tuple[Workload, Site], now: tuple[Workload, Site], rows: Rows, ridge: float) -> None:
    """Replace the weights of the consumer of ``now``, a workload and its site, by the solution derived above."""
    pruned, site = now
    consumer = pruned.module.get_submodule(site.consumer)
    assert isinstance(consumer, nn.Linear)
    width = consumer.in_features + 1
    gram = torch.zeros(width, width, dtype=torch.float64)
    cross = torch.zeros(consumer.out_features, width, dtype=torch.float64)
    for batch in rows.batches(BATCH):
        real = batch.inputs["attention_mask"].bool()
        _, wanted = _at(*then, batch.inputs)
        inputs, found = _at(*now, batch.inputs)
        features = torch.nn.functional.pad(inputs[real], (0, 1), value=1.0).double()
        missing = (wanted - found)[real] + consumer(inputs[real])
        gram += features.T @ features
        cross += missing.double().T @ features
    held = torch.cat([consumer.weight, consumer.bias[:, None]], dim=1).double()
    weight = ridge * gram.diagonal().mean()
    solved = torch.linalg.solve(gram + weight * torch.eye(width), (cross + weight * held).T).T.float()
    consumer.weight.copy_(solved[:, :-1])
    consumer.bias.copy_(solved[:, -1])


class _Enough(Exception):  # noqa: N818 - not an error: it ends a forward pass once what it was run for has been seen
    pass


def _at(workload: Workload, site: Site, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The consumer's input and the residual sum after it, each [batch, sequence, features]."""
    seen: dict[str, Tensor] = {}

    def consumer_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["features"] = args[0]

    def residual_sum(_: nn.Module, args: tuple[Tensor, ...]) -> Any:
        seen["sum"] = args[0]
        raise _Enough

    first = workload.module.get_submodule(site.consumer).register_forward_pre_hook(consumer_input)
    second = workload.module.get_submodule(site.sum_at).register_forward_pre_hook(residual_sum)
    try:
        workload.forward(inputs)
    except _Enough:
        pass
    finally:
        first.remove()
        second.remove()
    return seen["features"], seen["sum"]
