"""Encoder-decoders as two graphs: what they write together, token by token, is what PyTorch's own generation writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import pytest
import torch
from edgepress.compress.quantize import choice
from edgepress.errors import UnavailableError, UsageError
from edgepress.export import cache, encoder_decoder, generate
from edgepress.export.artifact import Artifact
from edgepress.models import families, mapping, surgery
from edgepress.models.data import Data
from edgepress.models.examples import example
from edgepress.models.skeleton import Skeleton, model_class
from edgepress.models.workload import Workload
from edgepress.plan import PruningPlan, Unit
from transformers import AutoConfig

pytestmark = pytest.mark.chain

TOKENS = 24
COMMON: dict[str, Any] = {"vocab_size": 96, "d_model": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
WIDTHS = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": (
        "T5ForConditionalGeneration",
        {**COMMON, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        {**COMMON, **LAYERS, **WIDTHS, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32},
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def pruned(request: pytest.FixtureRequest) -> Workload:
    """Weights drawn at random; one decoder layer has lost a head, and a head of its cross-attention."""
    architecture, options = MODELS[request.param]
    config = AutoConfig.for_model(request.param, **options)
    torch.manual_seed(0)
    module = model_class(architecture, type(config))(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    family = families.of_model_type(request.param)
    inputs = example(module, family.inputs, TOKENS)
    structure, skeleton = mapping.structure(module, family, inputs), Skeleton(architecture, config.to_dict(), ())
    whole = Workload(request.param, module, structure, Data.empty(), skeleton, TOKENS, "drawn at random", "", inputs)
    return surgery.prune(whole, PruningPlan.of([Unit("head", 2, 1), Unit("cross_head", 3, 0), Unit("ffn", 0, 7)]))


@pytest.fixture(scope="module")
def written(pruned: Workload, tmp_path_factory: pytest.TempPathFactory) -> list[Artifact]:
    return encoder_decoder.write(pruned, TOKENS, tmp_path_factory.mktemp("parts") / "fp32", ep.export)


def test_each_part_has_the_keys_and_values_of_the_other(pruned: Workload, written: list[Artifact], sound: Any) -> None:
    for part in written:
        sound(part.model_file)
    encoder, decoder = (artifact.manifest for artifact in written)
    crossed = [name for name in decoder.inputs if cache.CROSS in name]
    assert [name.replace("present", "past_key_values") for name in encoder.outputs] == crossed
    assert decoder.outputs == ("logits", *cache.outputs(decoder.inputs))
    heads = [
        decoder.inputs[f"past_key_values.{n}.key"].shape[1]
        for n in ("0.decoder", "1.decoder", "0.encoder", "1.encoder")
    ]
    assert heads == [3, 4, 4, 3]
    assert {axis.name for axis in decoder.inputs["past_key_values.0.decoder.key"].axes.values()} == {
        "batch",
        "past_sequence",
    }
    for manifest in (encoder, decoder):
        assert manifest.parity is not None
        assert manifest.parity.max_rel < 1e-5
        assert manifest.params < pruned.params
    assert decoder.parity is not None
    assert {(1, TOKENS, 0), (3, 1, TOKENS - 1), (32, 5, 5)} <= set(decoder.parity.shapes)


@pytest.mark.parametrize("rows", [1, 3])
def test_generation_gives_the_tokens_of_pytorch(pruned: Workload, written: list[Artifact], rows: int) -> None:
    random = torch.Generator().manual_seed(rows)
    if "input_ids" in pruned.example:
        mask = torch.ones(rows, 11, dtype=torch.int64)
        for row in range(1, rows):
            mask[row, -2 * row :] = 0
        read = {"input_ids": torch.randint(3, 96, (rows, 11), generator=random) * mask, "attention_mask": mask}
    else:
        read = {"input_features": torch.randn(rows, 8, 40, generator=random)}
    module: Any = pruned.module
    start = np.full((rows, 1), module.config.decoder_start_token_id)
    opened = generate.open_decoder(written[0].folder.parent)
    new, banned = TOKENS - 4, ()
    for _ in range(2):
        options = {"do_sample": False, "num_beams": 1, "max_new_tokens": new, "pad_token_id": 0}
        if banned:
            options["suppress_tokens"] = list(banned)
        made = module.generate(**read, **options, eos_token_id=-1).numpy()[:, -new:]
        found = generate.generate(
            opened, start, read={n: t.numpy() for n, t in read.items()}, max_new_tokens=new, suppress=banned
        )
        np.testing.assert_array_equal(found[:, 1:], made)
        banned = (int(made[0, 0]),)


@pytest.mark.parametrize("scheme", ["int8-weight", "int8-dynamic", "fp16"])
def test_in_fewer_bits(pruned: Workload, written: list[Artifact], tmp_path: Path, scheme: str) -> None:
    """Each part has what the plan of the whole says of it."""
    plan = ep.quantize(pruned, scheme)
    small = encoder_decoder.write(pruned, TOKENS, tmp_path / scheme, lambda part, to: ep.export(part, to, plan))
    for one, whole in zip(small, written, strict=True):
        assert one.size_bytes < whole.size_bytes
        assert one.manifest.parity is not None
        assert one.manifest.parity.cosine > 0.95
    named = [set(one.manifest.quantized) for one in small]
    without = {"shared", "model.encoder.embed_positions"}  # no operator of a graph has their names
    assert named[0] | named[1] == set(plan.weights) - without


def test_tables_that_nothing_is_looked_up_in_stay_as_they_are(
    pruned: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T5's ``shared`` holds the weights of two tables and is read by nobody, so no graph has a look-up in it."""
    monkeypatch.setattr(choice, "LARGE", 1)
    found = set(choice.tables(pruned))
    assert len([name for name in found if "embed_tokens" in name]) == (2 if "input_ids" in pruned.example else 1)
    assert "shared" not in found


def test_what_has_no_parts_is_refused(workload: Any, pruned: Workload, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="does not read one thing"):
        encoder_decoder.write(workload, TOKENS, tmp_path / "x", ep.export)
    if pruned.name == "whisper":
        with pytest.raises(UsageError, match="takes 12 to 32"):
            encoder_decoder.write(pruned, 33, tmp_path / "x", ep.export)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_trained_model_writes_what_it_hears(tmp_path: Path, here: Any) -> None:
    done = here("export", "zoo:whisper-tiny-en", "--cache", "96", "-o", tmp_path / "whisper")
    assert done.returncode == 0, done.stderr
    workload = ep.load("zoo:whisper-tiny-en")
    module: Any = workload.module
    config = module.generation_config
    read = {"input_features": workload.data.evaluation.padded(np.arange(2))["input_features"]}
    made = module.generate(**read, do_sample=False, num_beams=1, max_new_tokens=64).numpy()
    prompt = np.tile([[config.decoder_start_token_id, config.no_timestamps_token_id]], (2, 1))
    found = generate.generate(
        generate.open_decoder(tmp_path / "whisper", threads=2),
        prompt,
        read={"input_features": read["input_features"].numpy()},
        max_new_tokens=64,
        eos=(config.eos_token_id,),
        pad=config.pad_token_id,
        suppress=config.suppress_tokens,
        suppress_first=config.begin_suppress_tokens,
    )
    texts = [[int(t) for t in row if t < config.eos_token_id] for row in made]
    assert min(map(len, texts)) > 5
    assert [[int(t) for t in row if t < config.eos_token_id] for row in found] == texts
