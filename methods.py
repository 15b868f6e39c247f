"""What can be chosen from, read out of the headings of each method's docstring."""

from __future__ import annotations

import re
from importlib import import_module
from types import ModuleType

from .compress import quantize, score
from .export import backends
from .models import families, zoo

HEADINGS = ("What", "When", "Cost", "Source")


def headings(text: str) -> dict[str, str]:
    """The parts of a method's docstring by heading: What, When, Cost, Source."""
    parts = re.split(rf"^({'|'.join(HEADINGS)})\s+", text, flags=re.MULTILINE)
    return {name: " ".join(body.split("\n\n")[0].split()) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def listing() -> list[dict[str, str]]:
    """Every method as {kind, name, what, when, cost, source}."""
    rows = []
    for kind, package in (("score", score), ("quantizer", quantize), ("runtime", backends)):
        names: tuple[str, ...] = package.BACKENDS if package is backends else package.METHODS
        rows += [_row(kind, name.replace("_", "-"), package.get(name)) for name in names]
    rows += [_row("preparation", name, import_module(f"{quantize.__name__}.{name}")) for name in quantize.PREPARATIONS]
    for name in families.FAMILIES:
        family = families.get(name)
        kinds = f"model types {', '.join(family.model_types)}"
        rows.append({"kind": "family", "name": name, "what": kinds, "when": "", "cost": "", "source": family.source})
    rows += [_row("model", f"zoo:{name}", zoo.get(name)) for name in zoo.ZOO]
    return rows


def _row(kind: str, name: str, module: ModuleType) -> dict[str, str]:
    found = headings(module.__doc__ or "")
    return {"kind": kind, "name": name, **{key.lower(): found.get(key, "") for key in HEADINGS}}
