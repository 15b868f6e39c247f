"""A small model of every supported architecture, its weights drawn at random, wide enough to be cut unevenly."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
from edgepress.errors import InputError
from edgepress.models.structure import Structure
from edgepress.plan import PruningPlan, Unit
from hypothesis import assume
from hypothesis import strategies as st

TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 16,
    "patch_size": 4,
}
GROUPED = {**TEXT, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
PAIR = {
    "vocab_size": 50,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
SPEECH = {
    **PAIR,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5 = {
    "vocab_size": 50,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
DEBERTA = {
    **TEXT,
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", TEXT),
    "roberta": ("RobertaForSequenceClassification", TEXT),
    "electra": ("ElectraForSequenceClassification", {**TEXT, "embedding_size": 16}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "vocab_size": 50, "max_position_embeddings": 40},
    ),
    "mpnet": ("MPNetForSequenceClassification", TEXT),
    "albert": ("AlbertForSequenceClassification", {**TEXT, "embedding_size": 16, "num_hidden_layers": 3}),
    "albert, two groups": (
        "AlbertForSequenceClassification",
        {**TEXT, "embedding_size": 16, "num_hidden_layers": 4, "num_hidden_groups": 2},
    ),
    "deberta-v2": ("DebertaV2ForSequenceClassification", {**DEBERTA, "share_att_key": True}),
    "deberta-v2, separate": ("DebertaV2ForSequenceClassification", {**DEBERTA, "share_att_key": False}),
    "vit": ("ViTForImageClassification", IMAGE),
    "deit": ("DeiTForImageClassification", IMAGE),
    "beit": ("BeitForImageClassification", {**IMAGE, "use_relative_position_bias": True}),
    "dinov2": ("Dinov2ForImageClassification", {**IMAGE, "mlp_ratio": 2}),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "clip": ("CLIPModel", {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16}),
    "siglip": ("SiglipModel", {"text_config": TEXT, "vision_config": IMAGE}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40}),
    "llama": ("LlamaForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", {**GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", GROUPED),
    "gemma": ("GemmaForCausalLM", GROUPED),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5, gated": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
    "bart": ("BartForConditionalGeneration", {**PAIR, "max_position_embeddings": 40}),
    "whisper": ("WhisperForConditionalGeneration", SPEECH),
}


def _norm(self: Any, x: Any) -> Any:
    """The norm by the root mean square of x, in the type that x has; Gemma's weights are kept less one."""
    import torch

    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    weight = 1 + self.weight if type(self).__name__.startswith("Gemma") else self.weight
    return weight * x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def build(name: str, length: int = 12) -> Any:
    """The workload of one of ``MODELS``, without rows, in float64; every weight is drawn, tables and norms too."""
    import torch
    from edgepress.models import families, mapping
    from edgepress.models.data import Data
    from edgepress.models.examples import example
    from edgepress.models.skeleton import Skeleton, model_class
    from edgepress.models.workload import Workload
    from transformers import AutoConfig

    architecture, options = MODELS[name]
    model_type = name.split(",", maxsplit=1)[0]
    config = AutoConfig.for_model(model_type, **options)
    with torch.random.fork_rng():  # what a library draws as it builds a model comes from the global generator
        torch.manual_seed(0)
        module = model_class(architecture, type(config))(config).double().eval()
    for child in module.modules():
        if type(child).__name__.endswith(("RMSNorm", "T5LayerNorm")):  # the library computes these in float32
            child.forward = MethodType(_norm, child)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random, dtype=torch.float64), alpha=0.2)
    family = families.of_model_type(model_type)
    inputs = example(module, family.inputs, length)
    labels = ("no", "yes") if architecture.endswith("Classification") else ()
    return Workload(
        name=name,
        module=module,
        structure=mapping.structure(module, family, inputs),
        data=Data.empty(),
        skeleton=Skeleton(architecture, config.to_dict(), labels),
        max_length=length,
        origin="drawn at random",
        source="",
        example=inputs,
    )


@st.composite
def _plans(draw: Any, structure: Structure) -> PruningPlan:
    """Any plan that leaves every attention a head and every stack a block; all of a feed-forward may go."""
    units: list[Unit] = []
    for site in structure.sites:
        if site.kind == "block":
            continue
        most = site.count if site.kind == "ffn" else site.count - 1
        count = draw(st.one_of(st.just(most), st.just(0), st.integers(0, most)))
        units += draw(st.permutations(site.units))[:count]
    for stack in structure.stacks:
        if not stack.shared:
            going = draw(st.lists(st.sampled_from(stack.layers), max_size=stack.count - 1, unique=True))
            units += [Unit("block", layer, 0) for layer in going]
    plan = PruningPlan.of(units)
    try:
        structure.check(structure.closed(plan))
    except InputError:
        assume(False)
    return plan


@pytest.fixture(scope="session")
def plans() -> Any:
    """The strategy that draws plans for a structure."""
    return _plans


@pytest.fixture(scope="session")
def model_names() -> list[str]:
    return list(MODELS)


@pytest.fixture(scope="session", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    """Each of ``MODELS`` in turn."""
    return build(request.param)


@pytest.fixture(scope="session")
def small_model() -> Callable[[str], Any]:
    """Builds one of ``MODELS`` by name."""
    return build
