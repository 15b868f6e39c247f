"""NaN and infinity, caught where they arise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..data import Batch


class NotFiniteError(ArithmeticError):
    """Names the layer, and whether it is an activation, a gradient or a weight's gradient that is not finite."""


def check(values: Tensor, what: str) -> None:
    """Raise NotFiniteError where one of ``values`` is NaN or infinite."""
    if not values.is_floating_point():
        return
    total = values.detach().sum()  # one pass, no copy; only a total that is not finite calls for a closer look
    if not bool(torch.isfinite(total)) and not bool(torch.isfinite(values).all()):
        raise NotFiniteError(f"{what} is NaN or infinite")


@contextmanager
def checked(module: nn.Module) -> Iterator[None]:
    """Within the context each layer's output, and the gradient of it, are checked as they come.

    A layer is a module without modules of its own; what is computed between two layers is seen at the second one, as
    what it reads.
    """

    def see(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for value in _tensors(output):
                try:
                    check(value, f"the activation of '{name}'")
                except NotFiniteError:
                    for read in _tensors(args):
                        check(read, f"the activation that '{name}' reads")
                    raise
                if value.requires_grad:
                    on_gradient(value, lambda gradient: check(gradient, f"the gradient of the activation of '{name}'"))

        return hook

    layers = [(name, child) for name, child in module.named_modules() if not any(True for _ in child.children())]
    handles = [layer.register_forward_hook(see(name)) for name, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def complaint(batch: Batch, run: Callable[[Batch], object], name: str) -> InputError:
    """The error for a ``batch`` on which ``run`` raises NotFiniteError: what is wrong, and with which row alone if any.

    A second look at the rows, one by one, costs nothing once it is over. ``name`` is the workload's.
    """
    for row in batch.one_by_one():
        try:
            run(row)
        except NotFiniteError as error:
            return InputError(f"{name}: {error} for calibration row {row.rows[0]}.")
    try:
        run(batch)
        found = "a statistic of what its layers read is NaN or infinite"
    except NotFiniteError as error:
        found = str(error)
    return InputError(f"{name}: {found} for a batch of calibration rows that starts with row {batch.rows[0]}.")


def on_gradient(values: Tensor, look: Callable[[Tensor], None]) -> None:
    """Call ``look`` with the gradient of ``values`` once it is known."""
    values.register_hook(look)  # type: ignore[no-untyped-call] # torch leaves it without types


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
