"""Quantizers: which weights are stored in how many bits. A quantizer returns a plan and writes no file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from inspect import signature
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ...errors import UnavailableError, UsageError
from ...models.dequantize import dequantized
from ...models.workload import Workload
from ...plan import QuantizationPlan
from .equalise import equalised
from .rotate import rotation

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("int8_dynamic", "int8", "int8_weight", "int4", "fp16", "bf16", "fp8")

PREPARATIONS = ("rotate", "equalise")
"""What :func:`quantize` can do to the weights before: the function stays, and rounding may lose less."""


def get(name: str) -> ModuleType:
    """The module of a scheme; ``int8-dynamic`` on the command line is ``int8_dynamic`` here."""
    word = name.replace("-", "_")
    if word in METHODS:
        return import_module(f"{__name__}.{word}")
    known = ", ".join(method.replace("_", "-") for method in METHODS)
    raise UsageError(f"There is no scheme '{name}' (available: {known}).")


def quantize(
    workload: Workload,
    scheme: str = "int8-dynamic",
    *,
    rotate: bool = False,
    equalise: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> QuantizationPlan:
    """The quantization plan of ``workload`` under ``scheme``; ``options`` are the method's keyword arguments.

    With ``rotate`` channels are mixed first, wherever weights can hold that (:mod:`.rotate`); ``say`` is told where
    not. With ``equalise`` layers in a row then share the spread of the channels between them (:mod:`.equalise`).
    ``seed`` draws the rows that the method calibrates on, and the rotation. Raises UnavailableError where channels can
    be mixed or scaled nowhere.
    """
    method = get(scheme).quantize
    if "seed" in signature(method).parameters:
        options["seed"] = seed
    state: dict[str, Tensor] = {}
    if rotate:
        turned = rotation(workload, seed=seed)
        for note in turned.notes:
            say(note)
        state |= turned.state
    if equalise:
        scaled = equalised(_holding(workload, state))
        if not scaled:
            raise UnavailableError(f"No tensor of {workload.name} lies between two layers that can share a scale.")
        state |= scaled
    return under(state, method(_holding(workload, state), **options))


def _holding(workload: Workload, state: Mapping[str, Tensor]) -> Workload:
    return dequantized(workload, QuantizationPlan("fp32", state=state)) if state else workload


def under(state: Mapping[str, Tensor], plan: QuantizationPlan) -> QuantizationPlan:
    """``plan``, made for a module with the entries ``state``, for the module without them."""
    if not state:
        return plan
    coded = {f"{name}.weight" for name in plan.codes}
    return replace(plan, state={**{name: one for name, one in state.items() if name not in coded}, **plan.state})
