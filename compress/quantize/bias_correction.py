"""Bias correction: rounding shifts the mean of what a layer puts out, and the bias takes the shift back.

What    A layer that computed W x + b and now computes Q(W) Q(x) + b gets the bias b + W E[x] - Q(W) E[Q(x)]: the mean
        over the tokens of the rows stays what it was, channel by channel. Here x is the input after clipping: what is
        cut off is large at a few tokens, and a bias that made up for its mean would move all the others.
When    Always after weights and inputs are rounded; layers without a bias are left as they are.
Cost    One pass over the rows, two vectors [in] for each tensor. With ``propagated`` two, and one more for each tensor:
        x and Q(x) are then those of the original and of the quantized model, in which all layers before are corrected.
Source  Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721,
        section 4.2; the empirical form of its appendix D
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor

from ...models.layers import matrix
from ...models.workload import Progress, Workload
from ...plan import QuantizationPlan
from ..prune.inputs import visit
from ..score.readers import Mean
from .fake import holding, quantized, rounded_input
from .fold import inputs


def corrected(
    workload: Workload,
    plan: QuantizationPlan,
    *,
    propagated: bool = False,
    rows: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The biases, as entries of the state dict, of the layers whose inputs ``plan`` quantizes."""
    with holding(workload.module, plan.state):
        layers_of = {name: workload.module.get_submodule(name) for name in plan.activations}
        names = [name for name, layer in layers_of.items() if getattr(layer, "bias", None) is not None]
        tensors = [tensor.layers for tensor in inputs(workload, names)]
        means = _means(workload, [layers[0] for layers in tensors], plan, rows=rows, seed=seed, progress=progress)
        found = {}
        if not propagated:
            for layers in tensors:
                if layers[0] in means:
                    found.update(_biases(workload, plan, layers, *means[layers[0]]))
            return found
    for layers in tensors:
        if layers[0] in means:
            so_far = replace(plan, state={**plan.state, **found})
            with quantized(workload.module, so_far):
                now = _rounded_mean(workload, layers[0], rows=rows, seed=seed)
            with holding(workload.module, plan.state):
                found.update(_biases(workload, plan, layers, means[layers[0]][0], now))
    return found


def _means(
    workload: Workload,
    names: Iterable[str],
    plan: QuantizationPlan,
    *,
    rows: int,
    seed: int,
    progress: Progress | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """The mean of each layer's input x, clipped, and that of Q(x / s), float64 [in] each."""
    found: dict[str, tuple[Mean, Mean]] = {}

    def see(name: str, x: Tensor) -> None:
        scales = plan.smooth[name].to(x) if name in plan.smooth else x.new_ones(1)
        given = (x / scales).clamp(*plan.activations[name])
        plain, after = found.setdefault(name, (Mean(), Mean()))
        plain.add(given * scales)
        after.add(rounded_input(given, plan.activations[name]))

    visit(workload, names, see, rows=rows, seed=seed, progress=progress)
    return {name: (plain.value, after.value) for name, (plain, after) in found.items()}


def _rounded_mean(workload: Workload, name: str, *, rows: int, seed: int) -> Tensor:
    """The mean of what a layer of a quantized model is given, which is rounded by then, float64 [in]."""
    mean = Mean()
    visit(workload, [name], lambda _, x: mean.add(x), rows=rows, seed=seed)
    return mean.value


def _biases(
    workload: Workload, plan: QuantizationPlan, layers: Iterable[str], mean: Tensor, after: Tensor
) -> dict[str, Tensor]:
    """The corrected bias of each of ``layers``, which read the same tensor."""
    found = {}
    for name in layers:
        layer = workload.module.get_submodule(name)
        weight = matrix(layer).detach().double()
        with quantized(workload.module, replace(plan, state={}), [name]):
            stored = matrix(layer).detach().double()
        bias = layer.get_parameter("bias").detach()
        found[f"{name}.bias"] = (bias.double() + weight @ mean - stored @ after).to(bias)
    return found
