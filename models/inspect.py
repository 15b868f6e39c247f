"""Inspect: a model's structure in numbers."""

from __future__ import annotations

from typing import Any

from .workload import Workload


def inspect(workload: Workload) -> dict[str, Any]:
    """Parameters and multiply-accumulates of the model and of each block, and what can be removed in it.

    MACs are those of one row at ``sequence`` tokens, counted in the matrix products. ``layers`` lists every site of
    removable units; ``blocks`` sums them up by block.
    """
    structure = workload.structure
    layers = [
        {"kind": s.kind, "layer": s.layer, "count": s.count, "params_per_unit": s.params, "macs_per_unit": s.macs}
        for s in structure.sites
    ]
    blocks = []
    for layer in range(structure.num_layers):
        head, ffn, block = (structure.site(kind, layer) for kind in ("head", "ffn", "block"))
        blocks.append(
            {
                "layer": layer,
                "heads": head.count,
                "head_dim": head.width,
                "ffn": ffn.count,
                "params": block.params,
                "macs": block.macs,
            }
        )
    return {
        "name": workload.name,
        "family": structure.family,
        "params": workload.params,
        "macs": workload.macs,
        "sequence": structure.sequence,
        "hidden_size": structure.hidden_size,
        "labels": list(workload.skeleton.labels),
        "removed": workload.plan.to_json(),
        "rows": {name: len(getattr(workload.data, name)) for name in ("train", "calibration", "evaluation")},
        "layers": layers,
        "blocks": blocks,
    }
