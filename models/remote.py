"""Code that a model's folder brings: seen and refused, or run where the user says so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError


def asked_for(folder: Path, config: Mapping[str, Any]) -> str:
    """What in ``folder`` would have to be executed, in words; empty where nothing would."""
    code = sorted(path.name for path in folder.glob("*.py"))
    if code:
        return f"brings its own code ({', '.join(code)})"
    return "asks for its own code (auto_map)" if "auto_map" in config else ""


def classes(folder: Path, config: Mapping[str, Any], architecture: str) -> tuple[Any, Any]:
    """The configuration's class and the model's, executed from the files of ``folder``.

    Raises InputError where ``auto_map`` does not name them, or where their code fails.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    named = config.get("auto_map")
    named = {str(key): str(value) for key, value in named.items()} if isinstance(named, dict) else {}
    model = next((value for value in named.values() if value.rpartition(".")[2] == architecture), None)
    if model is None or "AutoConfig" not in named:
        raise InputError(f"{folder}: auto_map in config.json does not say where {architecture} and its AutoConfig are.")
    try:
        found = [get_class_from_dynamic_module(name, str(folder)) for name in (named["AutoConfig"], model)]
    except Exception as error:  # whatever that code raises
        raise InputError(
            f"The code in {folder} fails with {type(error).__name__}: {str(error).splitlines()[0]}."
        ) from error
    return found[0], found[1]
