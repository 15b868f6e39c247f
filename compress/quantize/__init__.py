"""Quantizers: which weights are stored in how many bits. A quantizer returns a plan and writes no file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from inspect import signature
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ...models.dequantize import dequantized
from ...models.workload import Workload
from ...plan import QuantizationPlan
from .rotate import rotation

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("int8_dynamic", "int8", "int8_weight", "int4", "fp16", "bf16", "fp8")


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
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> QuantizationPlan:
    """The quantization plan of ``workload`` under ``scheme``; ``options`` are the method's keyword arguments.

    With ``rotate`` channels are mixed first, wherever weights can hold that (:mod:`.rotate`); ``say`` is told where
    not. ``seed`` draws the rows that the method calibrates on, and the rotation. Raises UnavailableError where channels
    can be mixed nowhere.
    """
    method = get(scheme).quantize
    if "seed" in signature(method).parameters:
        options["seed"] = seed
    if not rotate:
        plain: QuantizationPlan = method(workload, **options)
        return plain
    turned = rotation(workload, seed=seed)
    for note in turned.notes:
        say(note)
    return under(turned.state, method(dequantized(workload, QuantizationPlan("fp32", state=turned.state)), **options))


def under(state: Mapping[str, Tensor], plan: QuantizationPlan) -> QuantizationPlan:
    """``plan``, made for a module with the entries ``state``, for the module without them."""
    coded = {f"{name}.weight" for name in plan.codes}
    return replace(plan, state={**{name: one for name, one in state.items() if name not in coded}, **plan.state})
