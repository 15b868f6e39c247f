"""Examples: what a run keeps of single evaluation rows, for its report.

A folder with ``examples.json``; ``changed.csv``, every prediction that changed, with thumbnails of the first images
beside it; and ``attention.json``, where each head looks in one row before and after.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..models.data import Rows
from ..models.readable import Readable
from ..models.statistics import maps
from ..models.statistics.maps import Map
from ..models.workload import Workload
from ..plan import PruningPlan
from . import changes
from .changes import Change

FOLDER, FACTS, CHANGED, ATTENTION = "examples", "examples.json", "changed.csv", "attention.json"
THUMBNAILS = 200
"""Images kept of changed rows, at most."""
TOKENS = 24
"""A row's tokens that a map is drawn of, at most; a longer one is cut."""
EXTRA = 8
"""Tokens beside an image's patches, at most: of classes, registers."""
TEXTS = ("input_ids", "decoder_input_ids", "token_type_ids", "attention_mask")


def write(  # noqa: PLR0917
    folder: Path, workload: Workload, pruned: Workload | None, plan: PruningPlan, before: Any, after: Any
) -> None:
    """Write the examples of ``workload`` and of what was made of it into ``folder``.

    ``before`` and ``after`` are the answers to the evaluation rows, ``pruned`` what is left of the module by ``plan``;
    None where nothing was pruned.
    """
    readable = Readable(workload)
    rows = workload.data.evaluation
    found = changes.of(workload, before, after, readable)
    facts: dict[str, Any] = {"by_token": workload.task.by_token, "judged": None}
    if found is not None:
        found = _with_images(folder, rows, found, readable)
        changes.write(folder / CHANGED, found)
        facts["judged"] = changes.judged(before, workload.task.by_token)
    (folder / FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    shown = attention(workload, pruned, plan, _row(rows, found or []), readable)
    if shown:
        (folder / ATTENTION).write_text(json.dumps(shown) + "\n", encoding="utf-8")


def _with_images(folder: Path, rows: Rows, found: Sequence[Change], readable: Readable) -> list[Change]:
    """The changes, those whose rows are images and that a report may list with a thumbnail in ``folder``."""
    names = {}
    for row in {change.row for change in changes.some(found, THUMBNAILS)}:
        image = readable.thumbnail(rows, row)
        if image:
            names[row] = f"{row}.png"
            (folder / names[row]).write_bytes(image)
    return [replace(change, image=names.get(change.row, "")) for change in found]


def _row(rows: Rows, found: Sequence[Change]) -> int:
    """The row whose attention is shown: of those whose answer changed, else of all, the longest that fits."""
    for among in ([change.row for change in found], range(len(rows))):
        fitting = [row for row in among if rows.lengths[row] <= TOKENS]
        if fitting:
            return int(max(fitting, key=lambda row: rows.lengths[row]))
    return int(np.argmin(rows.lengths))


# ---- attention


def attention(
    workload: Workload, pruned: Workload | None, plan: PruningPlan, row: int, readable: Readable
) -> dict[str, Any] | None:
    """Where each head looks in one evaluation row, before and after, as plain data; None where there is no attention.

    ``layers`` holds for every attention its ``stack``, ``layer``, ``kind`` and ``run``, the labels of its ``queries``
    and ``keys``, the ``grid`` [height, width] where keys are patches of an image, seen by the class token or by the
    mean of all, and its ``heads``, each ``before`` and ``after`` as :func:`_packed`; None after is removed. Layers and
    heads have the original's numbers.
    """
    rows = workload.data.evaluation
    inputs = rows.padded(np.array([row]))
    length = int(rows.lengths[row])
    inputs = {name: tensor[:, :TOKENS] if name in TEXTS else tensor for name, tensor in inputs.items()}
    first = maps.of_row(workload, inputs)
    if not first:
        return None
    closed = workload.structure.closed(plan)
    left = [layer for layer in range(workload.structure.num_layers) if layer not in closed.blocks]
    second = {(left[one.layer], one.kind, one.run): one for one in maps.of_row(pruned, inputs)} if pruned else {}
    layers = []
    for one in first:
        seen = _sequences(workload, one, inputs, readable)
        later = one if pruned is None else second.get((one.layer, one.kind, one.run))
        removed = one.layer in closed.blocks
        if seen is None or (later is None and not removed):
            continue
        gone = set(closed.indices(one.kind, one.layer))
        kept = iter(() if later is None else later.heads)
        after = [None if head in gone else next(kept, None) for head in range(len(one.heads))]
        heads = [
            {"before": _packed(_shown(was, seen)), "after": None if now is None else _packed(_shown(now, seen))}
            for was, now in zip(one.heads, after, strict=True)
        ]
        place = {"stack": one.stack, "layer": one.layer, "kind": one.kind, "run": one.run}
        layers.append({**place, **seen, "removed": removed, "heads": heads})
    image = readable.thumbnail(rows, row)
    shown = {"row": row, "text": readable.text(rows, row), "image": base64.b64encode(image).decode()}
    return {**shown, "cut": TOKENS if length > TOKENS else None, "layers": layers} if layers else None


def _sequences(workload: Workload, one: Map, inputs: Mapping[str, Tensor], readable: Readable) -> dict[str, Any] | None:
    """The labels of a map's queries and keys, or the grid of its keys; None where there are too many to be shown."""
    _, queries, keys = one.heads.shape
    grid = _grid(workload, one, inputs, keys)
    if grid:
        return {"queries": [], "keys": [], "grid": grid}
    if max(queries, keys) > TOKENS:
        return None
    known = {}
    for name in ("input_ids", "decoder_input_ids"):
        ids = inputs.get(name)
        if ids is not None:
            known[ids.shape[1]] = readable.tokens(ids[0].tolist())
    numbers = [str(place) for place in range(max(queries, keys))]
    return {"queries": known.get(queries, numbers[:queries]), "keys": known.get(keys, numbers[:keys]), "grid": None}


def _grid(workload: Workload, one: Map, inputs: Mapping[str, Tensor], keys: int) -> list[int] | None:
    """Rows and columns of an image's patches, where the keys of ``one`` are those."""
    image = inputs.get("pixel_values")
    config = workload.skeleton.config
    patch = config.get("vision_config", config).get("patch_size")
    if image is None or not isinstance(patch, int) or ("input_ids" in inputs and "vision" not in one.stack):
        return None
    grid = [int(side) // patch for side in image.shape[-2:]]
    return grid if 0 <= keys - grid[0] * grid[1] <= EXTRA else None


def _shown(head: NDArray[np.float32], seen: Mapping[str, Any]) -> NDArray[np.float32]:
    """A head's map [queries, keys] as it is drawn: of an image what the class token, or the mean of all patches, sees
    of each patch, [height, width]."""
    if not seen["grid"]:
        return head
    extra = head.shape[1] - seen["grid"][0] * seen["grid"][1]
    row = head[0] if extra else head.mean(axis=0)
    result: NDArray[np.float32] = row[extra:].reshape(seen["grid"])
    return result


def _packed(values: NDArray[np.float32]) -> dict[str, Any]:
    """``shape``, ``peak``, the largest value, and ``values``: bytes in base64, 255 for the peak."""
    peak = max(float(values.max()), 1e-12)
    data = (255 * values / peak).round().astype(np.uint8)
    return {"shape": list(values.shape), "peak": peak, "values": base64.b64encode(data.tobytes()).decode()}


def unpacked(packed: Mapping[str, Any]) -> NDArray[np.float64]:
    """The values that :func:`_packed` packed; ValueError, TypeError or KeyError for anything else."""
    data = np.frombuffer(base64.b64decode(packed["values"], validate=True), dtype=np.uint8)
    result: NDArray[np.float64] = data.reshape([int(side) for side in packed["shape"]]) / 255 * float(packed["peak"])
    return result
