"""edgepress takes a trained transformer to an edge device: score, prune, recover, quantize, export, benchmark.

The public verbs are attributes of this package and are imported when first used, so that importing edgepress does not
import torch:

    import edgepress as ep
    w = ep.load("zoo:minilm-reviews")
    s = ep.score(w, "taylor")
    p = ep.prune(w, s, ratio=0.4)
    p = ep.recover(p, w).workload
    small = ep.export(p, "out/small", ep.quantize(p, "int8-dynamic"))
    rows = ep.compare(ep.benchmark([ep.export(w, "out/original"), small], target="cpu"))
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_VERBS = {
    "load": "models.workload:load",
    "score": "compress.score:score",
    "prune": "compress.prune:prune",
    "recover": "compress.recover:recover",
    "quantize": "compress.quantize:quantize",
    "export": "export.backends.onnx:export_artifact",
    "benchmark": "benchmarks.load:benchmark",
    "compare": "benchmarks.compare:rows",
    "compress": "api:compress",
}
_BOTH = ("compress", "export")
"""Verbs that are packages too: ``edgepress.export(…)`` and ``edgepress.export.artifact`` both work."""

if TYPE_CHECKING:
    from .api import compress as compress
    from .benchmarks.compare import rows as compare
    from .benchmarks.load import benchmark as benchmark
    from .compress.prune import prune as prune
    from .compress.quantize import quantize as quantize
    from .compress.recover import recover as recover
    from .compress.score import score as score
    from .export.backends.onnx import export_artifact as export
    from .models.workload import load as load

__all__ = ["benchmark", "compare", "compress", "export", "load", "prune", "quantize", "recover", "score"]


def _function(verb: str) -> Any:
    module, name = _VERBS[verb].split(":")
    return getattr(import_module(f"{__name__}.{module}"), name)


class _VerbPackage(ModuleType):
    """A package that can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _function(self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Facade(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in _BOTH:  # the import system lays each imported package here
            value.__class__ = _VerbPackage
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in _BOTH:
            return import_module(f"{__name__}.{name}")
        if name in _VERBS:
            return _function(name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *_VERBS]


sys.modules[__name__].__class__ = _Facade
