"""A pair of towers as two artifacts: each embeds as its tower does in the pair, pruned or in fewer bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import pytest
import torch
from edgepress.errors import UnavailableError
from edgepress.export.backends.onnx import open_session
from edgepress.export.towers import towers
from edgepress.models import families, mapping, surgery
from edgepress.models.data import Data
from edgepress.models.examples import example
from edgepress.models.skeleton import Skeleton, model_class
from edgepress.models.workload import Workload
from edgepress.plan import PruningPlan, Unit
from transformers import AutoConfig

COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**COMMON, "vocab_size": 96, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 90}
IMAGE = {**COMMON, "image_size": 32, "patch_size": 8}
PAIRS = {
    "clip": ("CLIPModel", {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16}),
    "siglip": ("SiglipModel", {"text_config": {**TEXT, "projection_size": 32}, "vision_config": IMAGE}),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Workload:
    """Two towers of two blocks each, weights drawn at random; one head and some channels of each are gone."""
    architecture, options = PAIRS[request.param]
    config = AutoConfig.for_model(request.param, **options)
    torch.manual_seed(0)
    module = model_class(architecture, type(config))(config).eval()
    family = families.of_model_type(request.param)
    inputs = example(module, family.inputs, 24)
    structure, skeleton = mapping.structure(module, family, inputs), Skeleton(architecture, config.to_dict(), ())
    whole = Workload(request.param, module, structure, Data.empty(), skeleton, 24, "drawn at random", "", inputs)
    units = [Unit("head", 0, 1), Unit("head", 2, 3), *(Unit("ffn", layer, at) for layer in (1, 3) for at in range(20))]
    return surgery.prune(whole, PruningPlan.of(units))


@pytest.fixture(scope="module", params=["fp32", "int8-dynamic"])
def written(pair: Workload, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, found = tmp_path_factory.mktemp("towers"), {}
    for side, part in towers(pair).items():
        plan = None if request.param == "fp32" else ep.quantize(part, request.param)
        found[side] = ep.export(part, folder / side, plan)
    return found


def test_each_embeds_as_its_tower_does_in_the_pair(pair: Workload, written: dict[str, Any]) -> None:
    random = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[1, 7:] = 0
    ids = torch.randint(3, 90, (3, 11), generator=random)
    ids[:, 6] = 90
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(3, 3, 32, 32, generator=random)}
    with torch.no_grad():
        wanted = pair.module(**inputs)
    exact = written["text"].precision == "fp32"
    for side, embeds in {"text": wanted.text_embeds, "image": wanted.image_embeds}.items():
        with open_session(written[side]) as session:
            (found,) = session.run({name: inputs[name].numpy() for name in written[side].manifest.inputs})
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(found, embeds.numpy(), atol=1e-5 if exact else 0.1)


def test_a_tower_is_no_larger_than_its_half(pair: Workload, written: dict[str, Any], sound: Any) -> None:
    for tower in written.values():
        sound(tower.model_file)
    manifests = [artifact.manifest for artifact in written.values()]
    alone = sum(tensor.numel() for name, tensor in pair.module.named_parameters() if name.startswith("logit_"))
    assert sum(manifest.params for manifest in manifests) + alone == pair.params
    assert sum(manifest.macs for manifest in manifests) <= pair.macs
    assert set(written["image"].manifest.inputs) == {"pixel_values"}
    names = {name for manifest in manifests for name in manifest.quantized}
    assert bool(names) == (manifests[0].precision != "fp32")
    assert names <= {name for name, _ in pair.module.named_modules()}  # they are called as in the pair


def test_the_pair_itself_is_no_graph(pair: Workload, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="two towers"):
        ep.export(pair, tmp_path / "x")
    with pytest.raises(UnavailableError, match=r"only causal language models"):
        ep.export(towers(pair)["text"], tmp_path / "x", cache=32)
