"""The state of a run between two steps, in memory and on disk: a killed run goes on as if it had not been.

On disk it is one safetensors file: the trained weights and the optimizer's moments, and as JSON in its header the step,
which is also the place in the rows, what the monitor knows, and the trace. It is replaced in one step.

Of sharded weights every process keeps its own shards in memory; on disk they are whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ...errors import InputError, UsageError
from ...models.checkpoint import read_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class State:
    """``tensors`` on the CPU: ``weight.NAME``, and the moments as ``exp_avg.NAME`` and ``exp_avg_sq.NAME``; ``facts``
    are plain data."""

    tensors: dict[str, Tensor]
    facts: Mapping[str, Any]


def taken(weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of the trained ``weights`` and of what ``optimizer``, an AdamW, knows of them."""
    found = {f"weight.{name}": copied(weight) for name, weight in weights.items()}
    for name, weight in weights.items():
        known = optimizer.state.get(weight, {})
        found |= {f"{moment}.{name}": copied(known[moment]) for moment in MOMENTS if moment in known}
    return found


def local(tensor: Tensor) -> Tensor:
    """What this process has of ``tensor``, to be read and written: its shard, or all of it."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copied(tensor: Tensor) -> Tensor:
    return local(tensor).to("cpu", copy=True).contiguous()


def gathered(tensor: Tensor) -> Tensor:
    """All of ``tensor``, of which processes may hold parts."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor, weight: Tensor) -> Tensor:
    """A new tensor like ``weight`` of which this process has ``tensor``: the inverse of :func:`copied`."""
    found = torch.empty_like(weight, requires_grad=False)
    local(found).copy_(tensor)
    return found


def whole(tensors: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """``tensors`` of a state, put together from the shards of all processes, each of which has to walk through."""
    for name, tensor in tensors.items():
        weight = _owner(name, weights)
        yield name, gathered(placed(tensor, weight)).cpu() if isinstance(weight, DTensor) else tensor


def shards(tensors: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """The inverse of :func:`whole`, for each process by itself."""
    for name, tensor in tensors.items():
        weight = _owner(name, weights)
        if isinstance(weight, DTensor):
            cut = distribute_tensor(tensor, weight.device_mesh, weight.placements, src_data_rank=None)
            yield name, copied(cut)
        else:
            yield name, tensor


def _owner(name: str, weights: Mapping[str, nn.Parameter]) -> Tensor | None:
    """The weight that a tensor of a state belongs to."""
    return weights.get(name.partition(".")[2])


def lay_back(
    tensors: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, updates: int
) -> None:
    """Lay back what :func:`taken` took, after ``updates`` steps of the optimizer."""
    optimizer.state.clear()
    for name, weight in weights.items():
        local(weight).copy_(tensors[f"weight.{name}"])
        if f"{MOMENTS[0]}.{name}" in tensors:
            moments = {moment: placed(tensors[f"{moment}.{name}"], weight) for moment in MOMENTS}
            optimizer.state[weight] = {"step": torch.tensor(float(updates)), **moments}


def write(state: State, path: Path) -> None:
    """Write ``state``, in the place of the one before. Raises InputError where that cannot be."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state.tensors, temporary, metadata={"facts": json.dumps(dict(state.facts))})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {error}.") from error


def read(path: Path, run: str, weights: Mapping[str, nn.Parameter]) -> State | None:
    """The state at ``path``, None where there is none; ``run`` is the digest of all that the run depends on.

    Raises UsageError where it is of another run, InputError where it is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} does not hold the state of a recovery: {error}.") from error
    if not isinstance(facts, dict) or facts.get("run") != run:
        raise UsageError(
            f"{path} holds the state of another recovery, of another model or with other rows or options; delete it to "
            f"start anew."
        )
    tensors = read_tensors(path)
    for name, weight in weights.items():
        if f"weight.{name}" not in tensors or tensors[f"weight.{name}"].shape != weight.shape:
            raise InputError(f"{path} has no tensor 'weight.{name}' of shape {list(weight.shape)}.")
    return State(dict(shards(tensors, weights)), facts)
