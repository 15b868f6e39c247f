"""Fake quantization: a module computes in float what it will compute in integers, rounding and clipping included.

Weights of products are rounded to signed 8 bits with one scale for each output channel, tables with one for each row;
inputs to unsigned 8 bits in the plan's range or, where the scheme is dynamic, in their own. Halves round to even.
Gradients pass straight through the rounding, and not where a value is clipped.

Ranges of inputs are learned by the same rule: with s = (high - low) / 255, z = round(-low / s) and x rounded to
s (clip(round(x / s) + z, 0, 255) - z), the derivative by an end is that of what rounding adds where x lies within the
range, and that of the end itself where x is clipped to it.

Source: Jacob et al. 2018 (arXiv 1712.05877); Bengio et al. 2013 (arXiv 1308.3432) for the gradients; LSQ+, Bhalgat et
al. 2020 (arXiv 2004.09576) for learned ranges, and LSQ, Esser et al. 2020 (arXiv 1902.08153) for their gradients' scale
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import UnavailableError
from ...plan import QuantizationPlan

LEVELS = 255
"""Steps of an unsigned 8-bit range."""
LARGEST = 127
"""Of a signed 8-bit code; -128 is left out, so that a weight and its negative round alike."""

Span = tuple[float, float]


@contextmanager
def quantized(module: nn.Module, plan: QuantizationPlan, names: Collection[str] | None = None) -> Iterator[None]:
    """Within the context ``module`` has the plan's state, and its modules ``names`` (all the plan's) are quantized.

    Raises UnavailableError where one is recurrent.
    """
    check_imitable(module, plan.weights if names is None else names)
    with ExitStack() as stack:
        stack.enter_context(holding(module, plan.state))
        for name in plan.weights if names is None else names:
            layer = module.get_submodule(name)
            weight = _weight(layer, layer.get_parameter("weight").detach(), name, plan)
            stack.enter_context(holding(module, {f"{name}.weight": weight}))
            if name in plan.activations or _dynamic(layer, plan):
                hook = _rounding_input(plan.activations.get(name), plan.smooth.get(name))
                stack.callback(layer.register_forward_pre_hook(hook).remove)
        yield


class Ranges(nn.Module):
    """The ends of the range of a layer's input, learned as factors of where they were: e^p, with p zero at first."""

    def __init__(self, span: Span, like: Tensor) -> None:
        super().__init__()
        self.span = span
        self.powers = nn.Parameter(like.new_zeros(2))

    def ends(self) -> Tensor:
        """Low and high, [2]."""
        return self.powers.exp() * self.powers.new_tensor(self.span)

    def learned(self) -> Span:
        low, high = self.ends().detach().double().tolist()
        return low, high

    def forward(self, x: Tensor) -> Tensor:
        """``x`` rounded to the range; an end's gradient is over the root of how many numbers and levels it sums up."""
        share = (x.numel() * LEVELS) ** -0.5
        low, high = _scaled(self.ends().double(), share)  # as :func:`grid` has them
        exact = ((high - low) / LEVELS).clamp(min=torch.finfo(torch.float32).tiny)
        scale, zero = exact.to(x), _straight(-low / exact).to(x)
        found: Tensor = scale * ((_straight(x / scale) + zero).clamp(0, LEVELS) - zero)
        return found


@contextmanager
def learning(module: nn.Module, plan: QuantizationPlan) -> Iterator[dict[str, Ranges]]:
    """Within the context the layers of ``plan`` are quantized, their weights anew in every pass, so that parameters
    that an optimiser changes take effect; ranges of inputs are parameters of the layers too, and what is yielded.

    The plan has no state: it is in the module already. Layers of one range, as those that read the same tensor have,
    go on sharing it. Raises UnavailableError where a layer is recurrent.
    """
    check_imitable(module, plan.weights)
    found: dict[str, Ranges] = {}
    shared: dict[Span, Ranges] = {}
    with ExitStack() as stack:
        for name in plan.weights:
            layer = module.get_submodule(name)
            stack.enter_context(_rounding_weight(layer, name, plan))
            if name in plan.activations:
                span, like = plan.activations[name], layer.get_parameter("weight")
                found[name] = layer.input_range = shared.setdefault(span, Ranges(span, like))
                stack.callback(layer.__delattr__, "input_range")
            if name in plan.activations or _dynamic(layer, plan):
                hook = _rounding_input(found.get(name), plan.smooth.get(name))
                stack.callback(layer.register_forward_pre_hook(hook).remove)
        yield found


def check_imitable(module: nn.Module, names: Iterable[str]) -> None:
    """Raise UnavailableError where one of the modules ``names`` is recurrent: it has no weight of that name, and rounds
    its state at every step."""
    recurrent = [name for name in names if isinstance(module.get_submodule(name), nn.RNNBase)]
    if recurrent:
        raise UnavailableError(
            f"Rounding cannot be imitated yet where a layer is recurrent, so what it costs can neither be tried by "
            f"operator nor trained away: '{recurrent[0]}'."
        )


def _dynamic(layer: nn.Module, plan: QuantizationPlan) -> bool:
    return plan.scheme.endswith("-dynamic") and not isinstance(layer, nn.Embedding)


def _straight(x: Tensor) -> Tensor:
    """``x`` rounded, with the gradient of ``x``."""
    return x + (x.round() - x).detach()


def _scaled(x: Tensor, share: float) -> Tensor:
    """``x``, with ``share`` of its gradient."""
    return x * share + (x - x * share).detach()


@contextmanager
def holding(module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context ``module`` has other parameters: those of ``state``, by their names in its state dict."""
    held: list[tuple[nn.Module, str, Any]] = []
    for name, tensor in state.items():
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        held.append((owner, last, owner._parameters[last]))
        owner._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    try:
        yield
    finally:
        for owner, last, parameter in reversed(held):
            owner._parameters[last] = parameter


def rounded(weight: Tensor) -> Tensor:
    """``weight`` [out, in] after rounding to signed 8 bits, a scale for each output channel."""
    scale = (weight.detach().abs().amax(dim=1) / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    zeros = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
    return torch.fake_quantize_per_channel_affine(weight, scale.float(), zeros, 0, -LARGEST, LARGEST)


def rounded_input(x: Tensor, span: Span) -> Tensor:
    """``x`` after rounding to unsigned 8 bits in the range ``span``, which includes 0."""
    return torch.fake_quantize_per_tensor_affine(x, *grid(span), 0, LEVELS)


def grid(span: Span) -> tuple[float, int]:
    """The scale and the zero point of a range that includes 0."""
    low, high = span
    scale = (high - low) / LEVELS or 1.0
    return scale, round(-low / scale)


def _weight(layer: nn.Module, weight: Tensor, name: str, plan: QuantizationPlan) -> Tensor:
    """``weight``, in the layer's own shape, as the plan stores it."""
    if isinstance(layer, nn.Embedding):
        return rounded(weight)
    turned = isinstance(layer, Conv1D)
    if name in plan.codes:
        found = plan.codes[name].weight().to(weight)
    else:
        matrix = weight.T if turned else weight
        found = rounded(matrix * plan.smooth[name].to(matrix) if name in plan.smooth else matrix)
    return found.T if turned else found


@contextmanager
def _rounding_weight(layer: nn.Module, name: str, plan: QuantizationPlan) -> Iterator[None]:
    """Within the context the layer's weight is rounded while it runs."""
    parameter = layer.get_parameter("weight")

    def before(_: nn.Module, __: Any) -> None:
        # past nn.Module's own check: what is rounded is a function of the parameter, and no parameter itself
        layer._parameters["weight"] = _weight(layer, parameter, name, plan)  # type: ignore[assignment]

    def after(_: nn.Module, __: Any, ___: Any) -> None:
        layer._parameters["weight"] = parameter

    hooks = layer.register_forward_pre_hook(before), layer.register_forward_hook(after, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rounding_input(span: Span | Ranges | None, smooth: Tensor | None) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0] if smooth is None else args[0] / smooth.to(args[0])
        if isinstance(span, Ranges):
            return span(x), *args[1:]
        low, high = span or (float(x.detach().amin().clamp(max=0)), float(x.detach().amax().clamp(min=0)))
        return rounded_input(x, (low, high)), *args[1:]

    return hook
