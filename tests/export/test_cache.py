"""Decoders that keep keys and values: a step after any past answers as the module that reads all at once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import onnx
import pytest
import torch
from edgepress.errors import UnavailableError, UsageError
from edgepress.export import cache, generate, parity
from edgepress.export.artifact import Artifact, open_artifact
from edgepress.export.backends.onnx import open_session, write
from edgepress.models import families, mapping, surgery
from edgepress.models.data import Data
from edgepress.models.examples import example
from edgepress.models.skeleton import Skeleton, model_class
from edgepress.models.workload import Workload
from edgepress.plan import PruningPlan, QuantizationPlan, Unit
from transformers import AutoConfig, DynamicCache

pytestmark = pytest.mark.chain

TOKENS = 40
SIZES: dict[str, Any] = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED: dict[str, Any] = {
    **SIZES,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {**SIZES, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "llama": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
}


def decoder(name: str) -> Workload:
    """A model of two layers, its weights drawn at random."""
    architecture, options = DECODERS[name]
    config = AutoConfig.for_model(name, **options)
    torch.manual_seed(0)
    module = model_class(architecture, type(config))(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    family = families.of_model_type(name)
    inputs = example(module, family.inputs, 24)
    structure, skeleton = mapping.structure(module, family, inputs), Skeleton(architecture, config.to_dict(), ())
    return Workload(name, module, structure, Data.empty(), skeleton, 24, "drawn at random", "", inputs)


def unevenly_pruned(workload: Workload) -> Workload:
    """One layer with fewer heads than the other; where keys are shared, a group of them."""
    kind = "kv" if any(site.kind == "kv" for site in workload.structure.sites) else "head"
    return surgery.prune(workload, PruningPlan.of([Unit(kind, 1, 0), *(Unit("ffn", 0, at) for at in range(40))]))


@pytest.fixture(scope="module")
def llama() -> Workload:
    return decoder("llama")


@pytest.fixture(scope="module")
def exported(llama: Workload, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return ep.export(llama, tmp_path_factory.mktemp("cache") / "fp32", cache=TOKENS)


def test_inputs_and_outputs_have_the_usual_names_and_free_lengths(exported: Artifact) -> None:
    graph = onnx.load(exported.model_file).graph
    shapes = {
        one.name: [size.dim_param or size.dim_value for size in one.type.tensor_type.shape.dim]
        for one in (*graph.input, *graph.output)
    }
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["attention_mask"] == ["batch", "total_sequence"]
    for layer in range(2):
        for part in ("key", "value"):
            assert shapes[f"past_key_values.{layer}.{part}"] == ["batch", 2, "past_sequence", 32]
            assert shapes[f"present.{layer}.{part}"][:2] == ["batch", 2]
    manifest = open_artifact(exported.folder).manifest
    assert list(manifest.inputs) == [one.name for one in graph.input]
    assert list(manifest.outputs) == [one.name for one in graph.output]
    assert (manifest.inputs["past_key_values.0.key"].axes["2"].min, TOKENS - 1) == (
        0,
        manifest.inputs["past_key_values.1.value"].axes["2"].max,
    )
    assert manifest.parity is not None
    assert {(1, 1, 0), (3, TOKENS, 0), (32, 1, 5), (3, 1, TOKENS - 1)} <= set(manifest.parity.shapes)
    assert manifest.parity.max_rel < 1e-5


@pytest.mark.parametrize(("batch", "past", "sequence"), [(1, 1, 1), (2, 7, 1), (4, 13, 5), (1, 30, 10)])
def test_after_any_past_the_keys_values_and_logits_are_the_modules(
    llama: Workload, exported: Artifact, batch: int, past: int, sequence: int
) -> None:
    """The past comes from the module's own cache, and what the file adds to it is what the module adds."""
    ids = torch.randint(3, 96, (batch, past + sequence), generator=torch.Generator().manual_seed(past))
    own, module = DynamicCache(), llama.module
    with torch.no_grad():
        module(ids[:, :past], past_key_values=own, use_cache=True)
        names = cache.names(exported.manifest.inputs)
        given = [tensor.numpy() for layer in own.layers for tensor in (layer.keys, layer.values)]
        wanted = module(ids[:, past:], past_key_values=own, use_cache=True).logits
        whole = module(ids).logits[:, past:]
    feeds = {"input_ids": ids[:, past:].numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
    with open_session(exported) as session:
        logits, *present = session.run({**feeds, **dict(zip(names, given, strict=True))})
    np.testing.assert_allclose(logits, wanted.numpy(), atol=1e-4)
    np.testing.assert_allclose(logits, whole.numpy(), atol=1e-4)
    for got, tensor in zip(present, (t for layer in own.layers for t in (layer.keys, layer.values)), strict=True):
        np.testing.assert_allclose(got, tensor.numpy(), atol=1e-4)


@pytest.fixture(scope="module", params=["gpt2", "qwen2"])
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workload, Artifact]:
    """Two layers of unequal heads; Qwen2's second looks at four tokens alone."""
    workload = unevenly_pruned(decoder(request.param))
    return workload, ep.export(workload, tmp_path_factory.mktemp("pruned") / "step", cache=TOKENS)


def test_pruned_to_layers_of_unequal_heads(pruned: tuple[Workload, Artifact], sound: Any) -> None:
    workload, artifact = pruned
    sound(artifact.model_file)
    heads = [artifact.manifest.inputs[f"past_key_values.{layer}.key"].shape[1] for layer in (0, 1)]
    assert heads == ([4, 3] if workload.name == "gpt2" else [2, 1])
    assert artifact.manifest.parity is not None
    assert artifact.manifest.parity.max_rel < 1e-5


@pytest.mark.parametrize("scheme", ["int4", "int8-weight", "int8-dynamic", "fp16"])
def test_in_fewer_bits(llama: Workload, exported: Artifact, sound: Any, tmp_path: Path, scheme: str) -> None:
    plan = ep.quantize(llama, scheme, **({"method": "rtn"} if scheme == "int4" else {}))
    base = None if plan.state else exported
    small = write(llama, plan, tmp_path / scheme, base=base, cache=TOKENS)
    assert small.size_bytes < 0.7 * exported.size_bytes
    sound(small.model_file)
    assert small.manifest.outputs == exported.manifest.outputs
    assert small.manifest.parity is not None
    assert small.manifest.parity.cosine > 0.95


def test_a_file_that_forgets_its_past_is_refused(llama: Workload, exported: Artifact) -> None:
    """Proof looks at what is answered after a past, and not only at what follows nothing."""
    step = cache.with_past(llama, TOKENS)
    with open_session(exported) as session:

        def forgetful(feeds: dict[str, Any]) -> list[Any]:
            return session.run({name: array if "past" not in name else 0 * array for name, array in feeds.items()})

        with pytest.raises(parity.ParityError, match=r"\[1, 1, 5\]"):
            parity.prove_steps(step, forgetful, precision="fp32")
        assert parity.prove_steps(step, session.run, precision="fp32").max_rel < 1e-5


def test_keys_and_values_after_a_past_are_proven_too(llama: Workload, exported: Artifact) -> None:
    step = cache.with_past(llama, TOKENS)
    with open_session(exported) as session:

        def lost(feeds: dict[str, Any]) -> list[Any]:
            logits, *kept = session.run(feeds)
            follows = any(array.shape[2] for name, array in feeds.items() if "past" in name)
            return [logits, *(0 * array if follows else array for array in kept)]

        with pytest.raises(parity.ParityError, match="away"):
            parity.prove_steps(step, lost, precision="fp32")


def test_what_cannot_keep_any_is_refused(workload: Any, llama: Workload, exported: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="BertForSequenceClassification"):
        ep.export(workload, tmp_path / "x", cache=TOKENS)
    with pytest.raises(UsageError, match="65 tokens"):
        ep.export(llama, tmp_path / "x", cache=65)
    with pytest.raises(UsageError, match="other inputs"):
        write(llama, QuantizationPlan("fp32"), tmp_path / "x", base=exported)
    assert not list(tmp_path.iterdir())


def test_a_length_that_would_be_fixed_is_refused(llama: Workload, tmp_path: Path) -> None:
    """A module that takes the past for one of five tokens takes no other."""

    class Fixed(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, past_key_values: Any = None, **inputs: Any) -> Any:
            for layer in past_key_values.layers if past_key_values else ():
                if layer.is_initialized:
                    layer.keys = layer.keys.reshape(layer.keys.shape[0], 2, cache.TRACED[0], 32)
            return self.model(past_key_values=past_key_values, **inputs)

    with pytest.raises(UnavailableError, match="past_sequence"):
        ep.export(replace(llama, module=Fixed(llama.module)), tmp_path / "x", cache=TOKENS)


def same_tokens(workload: Workload, artifact: Artifact, prompts: torch.Tensor, new: int) -> None:
    """The tokens of ``module.generate``, one row at least ended by a token that is one of its own."""
    mask = torch.ones_like(prompts)
    for row in range(1, len(prompts)):
        mask[row, : 2 * row], prompts[row, : 2 * row] = 0, 0
    module: Any = workload.module
    greedy = {"attention_mask": mask, "do_sample": False, "num_beams": 1, "max_new_tokens": new, "pad_token_id": 0}
    free = module.generate(prompts, **greedy, eos_token_id=-1)
    assert free.shape[1] == prompts.shape[1] + new
    end = int(free[0, prompts.shape[1] + new // 3])
    opened = generate.open_decoder(artifact.folder)
    for eos in ((), (end,), free[:, -new // 2].unique().tolist()):
        wanted = module.generate(prompts, **greedy, eos_token_id=list(eos) or -1)
        found = generate.generate(opened, prompts.numpy(), mask.numpy(), max_new_tokens=new, eos=eos)
        np.testing.assert_array_equal(found, wanted.numpy())


@pytest.mark.parametrize("rows", [1, 3])
def test_generation_gives_the_tokens_of_pytorch(llama: Workload, exported: Artifact, rows: int) -> None:
    prompts = torch.randint(3, 96, (rows, 9), generator=torch.Generator().manual_seed(rows))
    same_tokens(llama, exported, prompts, new=TOKENS - 9)


def test_generation_from_a_pruned_model(pruned: tuple[Workload, Artifact]) -> None:
    prompts = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(0))
    same_tokens(*pruned, prompts, new=TOKENS - 9)


@pytest.mark.slow
def test_generation_of_a_trained_model(tmp_path: Path) -> None:
    workload = ep.load("zoo:smollm2-135m")
    artifact = ep.export(workload, tmp_path / "step", cache=96)
    prompts = workload.data.evaluation.padded(np.arange(3))["input_ids"][:, :32].clone()
    same_tokens(workload, artifact, prompts, new=64)


def test_generation_needs_no_torch(exported: Artifact, tmp_path: Path) -> None:
    """One file beside the artifact, in a process that can import neither torch nor edgepress."""
    shutil.copy(generate.__file__, tmp_path / "generate.py")
    code = (
        "import sys; sys.modules['torch'] = sys.modules['edgepress'] = None\n"
        "import generate, numpy\n"
        f"decoder = generate.open_decoder({str(exported.folder)!r})\n"
        "print(generate.generate(decoder, numpy.array([[3, 4, 5]]), max_new_tokens=4).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(1, 7)", done.stderr


def test_generation_refuses_what_was_not_proven(exported: Artifact, tmp_path: Path) -> None:
    opened = generate.open_decoder(exported.folder)
    with pytest.raises(ValueError, match=f"30 tokens and 11 new ones are more than the {TOKENS}"):
        generate.generate(opened, np.ones((1, 30), np.int64), max_new_tokens=11)
    manifest = exported.manifest.model_copy(update={"inputs": {}, "outputs": ("logits",)})
    (tmp_path / "manifest.json").write_text(manifest.model_dump_json())
    with pytest.raises(ValueError, match="keeps no keys and values"):
        generate.open_decoder(tmp_path)


def test_from_the_command_line(
    edgepress: Callable[..., subprocess.CompletedProcess[str]],
    here: Callable[..., subprocess.CompletedProcess[str]],
    exported: Artifact,
    tmp_path: Path,
) -> None:
    """Also with the quality of the rows, which follow no past."""
    done = here("export", "zoo:llama-stdlib", "--cache", 32, "--scheme", "int4", "-o", tmp_path / "step")
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
    for shape in (("--seq", "16"), ("--seq", "1", "--past", "31")):
        done = here("bench", tmp_path / "step", *shape, "--queries", 40, "--seconds", 1)
        assert done.returncode == 0, done.stderr
    assert "x sequence 1 after 31" in done.stdout
    beyond = here("bench", tmp_path / "step", "--seq", "2", "--past", "31")
    assert beyond.returncode == 2
    assert "total_sequence 1 to 32, not 33" in beyond.stderr
    elsewhere = here("export", "zoo:llama-stdlib", "--to", "openvino", "--cache", "32")
    assert elsewhere.returncode == 2
    assert "--cache is of --to onnx" in elsewhere.stderr
