"""Reconstruction: what is left of each layer is solved anew so that the model computes what it did before.

What    Layer after layer, the weights of each consumer of pruned units (attention output, second feed-forward layer)
        are replaced by the ridge-regression solution that brings the residual stream back to the original's.
When    Always after pruning: it needs no labels and no training, and it gives distillation a far better start.
Cost    For each consumer, one pass of both models up to it over the rows; memory is one Gram matrix
        [features, features] in float64.
Source  Least-squares mask tuning of Kwon et al. 2022 (arXiv 2204.09656, section 4.3), here over all weights of the
        consumer (He et al. 2017, arXiv 1707.06168) and with the residual stream's own error in the target

Derivation. A consumer adds c (W x + b) to the stream s, where c is one, or the branch's learned scale. In the original
the sum is t = s_o + c (W_o x_o + b_o). In the pruned model the stream is s_p, different already, and x_p has fewer
features. The sum over tokens of |W x_p + b - (t - s_p) / c|^2 + λ |W - W_p|^2 is least, with Y = (t - s_p) / c,
z = [x_p; 1] and V = [W b], where V = (Y zᵀ + λ V_p) (z zᵀ + λ I)⁻¹: λ pulls towards the weights as they are, so few
rows cannot ruin a layer. A consumer without a bias gets none: z = x_p.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...models import hidden
from ...models.data import Rows
from ...models.layers import matrix
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
    sites = [site for site in result.structure.sites if site.block and site.kind not in {"block", "kv"}]
    stream = hidden.kept(original, pruned)
    with torch.no_grad():
        for done, site in enumerate(sites, 1):
            before = original.structure.site(site.kind, layers[site.layer])
            _solve((original, before), (result, site), sample, ridge, stream)
            if progress:
                progress(done, len(sites), "layers solved")
    return result


def _blocks_gone_since(original: Workload, pruned: Workload) -> set[int]:
    """Layers of ``original`` that ``pruned`` lacks, in ``original``'s numbering."""
    total = original.structure.num_layers + len(original.plan.blocks)
    numbering = [layer for layer in range(total) if layer not in original.plan.blocks]
    return {numbering.index(layer) for layer in pruned.plan.blocks - original.plan.blocks}


def _solve(then: tuple[Workload, Site], now: tuple[Workload, Site], rows: Rows, ridge: float, stream: Tensor) -> None:
    """Replace the weights of the consumer of ``now``, a workload and its site, by the solution derived above.

    ``stream`` names the channels of the original's residual stream that are left.
    """
    pruned, site = now
    consumer: Any = pruned.module.get_submodule(site.consumer)
    weights, bias = matrix(consumer), consumer.bias
    held = (weights if bias is None else torch.cat([weights, bias[:, None]], dim=1)).double()
    scale = pruned.module.get_parameter(site.scaled_by) if site.scaled_by else 1.0
    gram = torch.zeros(held.shape[1], held.shape[1], dtype=torch.float64)
    cross = torch.zeros_like(held)
    for batch in rows.batches(BATCH):
        wanted = _at(*then, batch.inputs)[1][..., stream]
        inputs, found = _at(*now, batch.inputs)
        real = _real(batch.inputs, inputs)
        features = nn.functional.pad(inputs[real], (0, held.shape[1] - weights.shape[1]), value=1.0).double()
        missing = (wanted - found)[real] / scale + consumer(inputs[real])
        gram += features.T @ features
        cross += missing.double().T @ features
    weight = ridge * gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=torch.float64)
    solved = torch.linalg.solve(gram + weight * eye, (cross + weight * held).T).T.to(weights.dtype)
    weights.copy_(solved[:, : weights.shape[1]])
    if bias is not None:
        bias.copy_(solved[:, -1])


def _real(inputs: Mapping[str, Tensor], features: Tensor) -> Tensor:
    """Which positions of ``features`` [..., features] are tokens and not padding."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != features.shape[:-1]:
        return torch.ones(features.shape[:-1], dtype=torch.bool)
    return mask.bool()


class _Enough(Exception):  # noqa: N818 - not an error: it ends a forward pass once what it was run for has been seen
    pass


def _at(workload: Workload, site: Site, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The consumer's input and the residual sum after it, each [batch, sequence, features]."""
    seen: dict[str, Tensor] = {}

    def consumer_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["features"] = args[0]

    def next_input(_: nn.Module, args: tuple[Tensor, ...]) -> Any:
        seen["sum"] = args[0]
        raise _Enough

    def block_output(_: nn.Module, __: Any, output: Any) -> Any:
        seen["sum"] = output[0] if isinstance(output, tuple) else output
        raise _Enough

    first = workload.module.get_submodule(site.consumer).register_forward_pre_hook(consumer_input)
    if site.sum_at:
        second = workload.module.get_submodule(site.sum_at).register_forward_pre_hook(next_input)
    else:
        second = workload.module.get_submodule(site.block).register_forward_hook(block_output)
    try:
        workload.forward(inputs)
    except _Enough:
        pass
    finally:
        first.remove()
        second.remove()
    return seen["features"], seen["sum"]
