"""The attention of one row of every architecture, before and after heads are removed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from edgepress.benchmarks import examples
from edgepress.models import surgery
from edgepress.models.data import Data, Rows
from edgepress.models.readable import Readable, png
from edgepress.models.statistics import maps
from edgepress.models.statistics.maps import Map
from edgepress.plan import PruningPlan, Unit

WINDOWS = "swin"
"""An image's windows are a batch of their own, so that of this model only the last layers have one map."""


def with_a_row(workload: Any) -> Any:
    names = [name for name in workload.example if name != "attention_mask"]
    rows = Rows({name: (workload.example[name][0].numpy(),) for name in names}, None, (b"row",))
    return replace(workload, data=replace(Data.empty(), evaluation=rows))


def test_every_architecture(model: Any) -> None:
    """Only the last self-attention of the first stack loses a head: what it reads is what it read before, so that the
    heads that are left look where they looked, and the pictures must say so of the right ones."""
    workload = with_a_row(model)
    found = maps.of_row(workload, workload.data.evaluation.padded(np.array([0])))
    sites = {(site.kind, site.layer): site.count for site in workload.structure.sites}
    assert found
    for one in found:
        assert len(one.heads) == sites[one.kind, one.layer]
        assert np.allclose(one.heads.sum(axis=-1), 1, atol=1e-5)
    if model.name != WINDOWS:
        assert {(one.kind, one.layer) for one in found} == {key for key in sites if key[0] in {"head", "cross_head"}}
    stack = workload.structure.stacks[0]
    layer = stack.layers[-1]
    units = [Unit("head", layer, 1)]
    if ("kv", layer) in sites:
        units = [Unit("kv", layer, 1)]
    plan = PruningPlan.of(units)
    gone = workload.structure.closed(plan).indices("head", layer)
    pruned = surgery.prune(workload, plan)
    shown = examples.attention(workload, pruned, plan, 0, Readable(workload))
    assert shown
    last = [entry for entry in shown["layers"] if (entry["layer"], entry["kind"]) == (layer, "head")]
    for entry in last:
        for number, head in enumerate(entry["heads"]):
            assert (head["after"] is None) == (number in gone)
            if head["after"] and not stack.shared:  # shared blocks run again on what has changed
                assert np.allclose(examples.unpacked(head["before"]), examples.unpacked(head["after"]), atol=0.01)


def test_a_block_that_is_removed_moves_no_other(small_model: Callable[[str], Any]) -> None:
    workload = with_a_row(small_model("t5"))
    first, second = workload.structure.stacks
    plan = PruningPlan.of([Unit("block", first.start, 0)])
    shown = examples.attention(workload, surgery.prune(workload, plan), plan, 0, Readable(workload))
    assert shown
    removed = {(entry["layer"], entry["kind"]): entry["removed"] for entry in shown["layers"]}
    assert removed.pop((first.start, "head"))
    assert not any(removed.values())
    assert {layer for layer, kind in removed if kind == "cross_head"} == set(second.layers)


def test_a_model_without_attention_has_no_maps(small_model: Callable[[str], Any]) -> None:
    workload = with_a_row(small_model("bert"))
    bare = replace(workload, structure=replace(workload.structure, sites=()))
    assert maps.of_row(bare, workload.example) == []


def test_patches_stand_where_they_are_in_the_image(small_model: Callable[[str], Any]) -> None:
    """A head that looks at the third patch of the second row of 4 x 4, the class token before all."""
    workload = with_a_row(small_model("vit"))
    heads = np.zeros((1, 17, 17), dtype=np.float32)
    heads[0, 0, 1 + 4 + 2] = 1.0
    one = Map(workload.structure.stacks[0].path, 0, "head", 0, heads)
    seen = examples._sequences(workload, one, workload.example, Readable(workload))
    assert seen
    assert seen["grid"] == [4, 4]
    drawn = examples._shown(heads[0], seen)
    assert np.argwhere(drawn == 1.0).tolist() == [[1, 2]]


@pytest.mark.parametrize("channels", [1, 3])
def test_thumbnails_are_images(channels: int) -> None:
    image = pytest.importorskip("PIL.Image")
    import io

    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels)).astype(np.uint8)
    read = np.asarray(image.open(io.BytesIO(png(pixels))))
    assert (read.reshape(pixels.shape) == pixels).all()


def test_what_was_normalised_is_shown_as_it_was(small_model: Callable[[str], Any]) -> None:
    image = pytest.importorskip("PIL.Image")
    import io

    shown = np.linspace(0, 1, 3 * 16 * 16).reshape(3, 16, 16)
    mean, spread = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.4])
    array = ((shown - mean[:, None, None]) / spread[:, None, None]).astype(np.float32)
    files = {"preprocessor_config.json": b'{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}'}
    workload = replace(small_model("vit"), files=files)
    content = Readable(workload).thumbnail(Rows({"pixel_values": (array,)}, None, (b"row",)), 0)
    read = np.asarray(image.open(io.BytesIO(content)))
    assert np.abs(read / 255 - np.moveaxis(shown, 0, -1)).max() < 0.01
