"""Quantizers: which weights are stored in how many bits. A quantizer returns a plan and writes no file."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from ...errors import UsageError
from ...models.workload import Workload
from ...plan import QuantizationPlan

METHODS = ("int8_dynamic", "int8", "int8_weight", "int4", "fp16", "bf16", "fp8")


def get(name: str) -> ModuleType:
    """The module of a scheme; ``int8-dynamic`` on the command line is ``int8_dynamic`` here."""
    word = name.replace("-", "_")
    if word in METHODS:
        return import_module(f"{__name__}.{word}")
    known = ", ".join(method.replace("_", "-") for method in METHODS)
    raise UsageError(f"There is no scheme '{name}' (available: {known}).")


def quantize(workload: Workload, scheme: str = "int8-dynamic", **options: Any) -> QuantizationPlan:
    """The quantization plan of ``workload`` under ``scheme``; ``options`` are the method's keyword arguments."""
    plan: QuantizationPlan = get(scheme).quantize(workload, **options)
    return plan
