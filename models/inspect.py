"""Inspect: a model's structure in numbers, and what a user's rows say about it."""

from __future__ import annotations

from typing import Any

from . import low_rank
from .layers import out_features
from .statistics import statistics
from .structure import Stack
from .workload import Progress, Workload


def inspect(workload: Workload, *, rows: int = 0, seed: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """Parameters and multiply-accumulates of the model and of each block, and what can be removed in it.

    MACs are those of one row of the shapes in ``example``, counted in the matrix products. ``layers`` lists every site
    of removable units; ``blocks`` sums them up by block; ``notes`` says what is left alone, and why. ``statistics`` are
    those of so many calibration ``rows`` (see :mod:`.statistics`), or None where the workload has no rows.
    """
    structure = workload.structure
    layers = [
        {
            "kind": s.kind,
            "layer": s.layer,
            "count": s.count,
            "params_per_unit": s.params,
            "macs_per_unit": s.macs,
            "reads": s.consumer,
        }
        for s in structure.sites
    ]
    rows = min(rows, len(workload.data.calibration))
    blocks = [_block(workload, stack, layer) for stack in structure.stacks for layer in stack.layers]
    return {
        "name": workload.name,
        "family": structure.family,
        "params": workload.params,
        "macs": workload.macs,
        "example": {name: list(tensor.shape) for name, tensor in workload.example.items()},
        "hidden_size": structure.hidden_size,
        "labels": list(workload.skeleton.labels),
        "removed": workload.plan.to_json(),
        "notes": list(structure.notes),
        "rows": {name: len(getattr(workload.data, name)) for name in ("train", "calibration", "evaluation")},
        "layers": layers,
        "blocks": blocks,
        "statistics": statistics(workload, rows=rows, seed=seed, progress=progress) if rows else None,
    }


def _block(workload: Workload, stack: Stack, layer: int) -> dict[str, Any]:
    """One row of the table. ``macs`` is None for a block that is shared: it runs more than once."""
    kinds = ("head", "kv", "cross_head", "ffn", "block")
    sites = {kind: site for kind in kinds if (site := workload.structure.find(kind, layer))}
    count = {kind: sites[kind].count if kind in sites else 0 for kind in kinds}
    head = sites["head"]
    own = workload.module.get_submodule(f"{stack.path}.{layer - stack.start}")
    return {
        "layer": layer,
        "stack": stack.path,
        "heads": count["head"],
        "kv_heads": count["kv"] or count["head"],
        "cross_heads": count["cross_head"],
        "head_dim": head.gates[0].width,
        "ffn": count["ffn"],
        "hidden_size": out_features(workload.module.get_submodule(low_rank.owner(workload.module, head.consumer))),
        "params": sum(parameter.numel() for parameter in own.parameters()),
        "macs": sites["block"].macs if "block" in sites else None,
    }
