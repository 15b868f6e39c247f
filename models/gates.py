"""Gates of one: they change no output, and only their gradients are wanted.

:func:`.surgery.gated` multiplies by gates, which takes time and keeps what was multiplied. Where every gate is one, the
tensors pass as they are instead, and the gradient is taken when backward comes by: the sum over tokens of v · dL/dv for
what a layer reads, v, and of (f(x) - x) · dL/df for a block.

For a channel of the stream let y be what a norm makes of x, c what it is of x that it divides by its size (x, less the
mean where the norm centres), and b its bias. Derived from the formula of :mod:`.hidden` at gates of one, in which H is
the number of channels,

    dL/dg_u = c_u dL/dx_u + b_u dL/dy_u + 1/2 mean_h ((y_h - b_h) dL/dy_h - c_h dL/dx_h),

where dL/dx is what comes back through this norm alone. Neither the norm's weights nor its epsilon are in it: by Euler's
theorem the last term is half of the mean share of the variance in variance plus epsilon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .counts import CONVOLUTIONS
from .layers import in_features
from .structure import Site, Structure
from .surgery import by_row


@contextmanager
def open_gates(module: nn.Module, structure: Structure, gates: Tensor) -> Iterator[None]:
    """Within the context the gradient in ``gates`` is that under :func:`.surgery.gated`, and nothing is multiplied.

    ``gates`` are ones that require gradients, [batch, num_units], of any type as fine as the module's; products are
    made and summed in it. Gradients of gradients are not there: they need ``gated``.
    """
    handles: list[Any] = []
    for site, place in structure.slices():
        part = gates[:, place]
        for name in site.norms:
            before, after = _norm_hooks(site, part)
            norm = module.get_submodule(name)
            handles += [norm.register_forward_pre_hook(before), norm.register_forward_hook(after)]
        if site.kind == "block":
            handles.append(module.get_submodule(site.block).register_forward_hook(_block_hook(site, part)))
        for cut in site.gates if not site.norms else ():
            layer = module.get_submodule(cut.layer)
            multiplier = site.multiplier(part, cut, in_features(layer))
            handles.append(layer.register_forward_pre_hook(_unit_hook(site, multiplier)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(x: Tensor) -> Tensor:
    return x


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(dim=-1, keepdim=True)


class _Open(torch.autograd.Function):
    """Passes ``x`` on; the gradient of ``gate`` is that of ``x`` times ``made(kept)``, summed to its shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, kept: Tensor, made: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.shape, ctx.dtype, ctx.made = gate.shape, gate.dtype, made
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values = ctx.made(*ctx.saved_tensors).to(ctx.dtype)
        return gradient, (values * gradient).sum_to_size(ctx.shape), None, None


def _open(x: Tensor, gate: Tensor, kept: Tensor, made: Callable[[Tensor], Tensor] = _same) -> Tensor:
    passed: Tensor = _Open.apply(x, gate, kept.detach(), made)  # type: ignore[no-untyped-call]
    return passed


def _unit_hook(site: Site, multiplier: Tensor) -> Any:
    def see(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        if isinstance(layer, CONVOLUTIONS):  # channels come before the positions
            gate = multiplier.reshape(*multiplier.shape, *[1] * (x.dim() - 2))
        else:
            gate = by_row(multiplier, x, site.row_axis)
        return (_open(x, gate, x), *args[1:])

    return see


def _block_hook(site: Site, part: Tensor) -> Any:
    def see(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        made = output[0] if isinstance(output, tuple) else output
        passed = _open(made, by_row(part, made, site.row_axis), made.detach() - args[0].detach())
        return (passed, *output[1:]) if isinstance(output, tuple) else passed

    return see


def _norm_hooks(site: Site, part: Tensor) -> tuple[Any, Any]:
    """What a norm is given is kept, as the norm does itself, and what it makes is made again."""
    half = part.mean(dim=-1, keepdim=True) / 2

    def before(norm: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        gate = by_row(part - half, args[0], site.row_axis)
        return (_open(args[0], gate, args[0], _centred if isinstance(norm, nn.LayerNorm) else _same), *args[1:])

    def after(norm: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        passed = _open(output, by_row(half, output, site.row_axis), args[0], norm.forward)
        bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
        return passed if bias is None else _open(passed, by_row(part - half, output, site.row_axis), bias)

    return before, after
