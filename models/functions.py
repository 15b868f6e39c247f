"""Models from a Python function, ``package.module:function``, that the user names on the command line.

The function takes no arguments and returns a module and one row of its inputs: ``(module, example)``, where ``example``
is a tensor, a tuple of tensors or a mapping of tensors by argument name. What is in 16 bits becomes float32. It runs
only because the user named it; a file never makes it run.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import InputError, UsageError
from .layers import SeparateAttention

if TYPE_CHECKING:
    from .workload import Workload


def named(model: str) -> bool:
    """Whether ``model`` is written like a function: ``package.module:function``, with or without ``@FOLDER``."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*(@.+)?", model) is not None


def find(name: str) -> Any:
    """The function ``package.module:function``; the folder that one is in counts as a place for packages.

    Raises UsageError where there is none, InputError where its module fails.
    """
    path, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(path)
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        if isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}."):
            raise UsageError(f"There is no function '{name}': {error}.") from error
        why = " ".join(str(error).split())
        raise InputError(f"{path}, of '{name}', cannot be imported: {type(error).__name__}: {why}.") from error
    found = getattr(module, function, None)
    if found is None:
        raise UsageError(f"There is no function '{name}': {path} has no '{function}'.")
    if not callable(found):
        raise UsageError(f"'{name}' is not a function.")
    return found


def call(name: str) -> Any:
    """What the function returns; InputError where it fails."""
    function = find(name)
    try:
        return function()
    except Exception as error:  # whatever the user's own code raises
        raise InputError(f"{name}() failed with {type(error).__name__}: {' '.join(str(error).split())}.") from error


def module_and_example(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """The module that a function makes, ready for surgery, and one row of its inputs by argument name."""
    made = call(name)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise InputError(f"{name}() returns {type(made).__name__}; it must return (module, one row of its inputs).")
    module, given = made
    example = _by_name(module, given)
    wrong = [key for key, value in example.items() if not isinstance(value, Tensor)]
    if wrong or not example:
        raise InputError(f"{name}() gives inputs that are not tensors ({', '.join(wrong) or 'none at all'}).")
    example = {key: _widened(tensor) for key, tensor in example.items()}
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = _widened(tensor.data)
    separate_attention(module)
    try:
        with torch.no_grad():
            module.eval()(**example)
    except Exception as error:  # whatever the user's own code raises
        why = " ".join(str(error).split())
        raise InputError(f"The module of {name}() fails on its own row with {type(error).__name__}: {why}.") from error
    return module, example


def _widened(tensor: Tensor) -> Tensor:
    """In float32 where it was in 16 bits, as the weights of a folder become too: NumPy knows no bfloat16."""
    return tensor.float() if tensor.dtype in {torch.float16, torch.bfloat16} else tensor


def _by_name(module: nn.Module, given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    values = given if isinstance(given, (tuple, list)) else (given,)
    return dict(zip(inspect.signature(module.forward).parameters, values, strict=False))


def load(name: str, data: str | None = None, *, columns: Mapping[str, str] | None = None, seed: int = 0) -> Workload:
    """The workload of a function's module, with the rows of ``data``, or with none."""
    from . import encode, families, mapping
    from .data import Data
    from .skeleton import Skeleton
    from .workload import Workload, check_finite

    module, example = module_and_example(name)
    check_finite(module, f"{name}()")
    workload = Workload(
        name=name.rpartition(":")[2],
        module=module,
        structure=mapping.structure(module, families.of_module(module), example),
        data=Data.empty(),
        skeleton=Skeleton(name, {}, ()),
        max_length=1,
        origin=f"{name}()",
        source="",
        example=example,
    )
    return encode.with_rows(workload, data, None, columns=columns, seed=seed) if data else workload


def separate_attention(module: nn.Module) -> None:
    """Replace every self-attention of ``nn.TransformerEncoderLayer`` by one whose projections can be cut apart.

    Raises InputError where a layer's own attention has been replaced by something else.
    """
    for name, child in list(module.named_modules()):
        if not isinstance(child, nn.TransformerEncoderLayer):
            continue
        own: Any = child.self_attn
        if not isinstance(own, nn.MultiheadAttention) or own.bias_k is not None or own.add_zero_attn:
            raise InputError(f"The attention of {name} is not the one that nn.TransformerEncoderLayer makes.")
        child.self_attn = SeparateAttention.of(own)  # type: ignore[assignment] # it answers the same calls
