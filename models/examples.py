"""Examples: one row of inputs of the shapes that a model's configuration asks for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def example(module: nn.Module, inputs: tuple[str, ...], length: int, rows: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of the names in ``inputs`` that the module's forward takes; ``length`` tokens where there are any.

    Token ids are int64 [rows, length]; images [rows, channels, height, width] and log-mel frames [rows, mels, frames]
    have the type of the module's weights.
    """
    config: Any = module.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vision = getattr(config, "vision_config", config)
    random = torch.Generator().manual_seed(seed)
    dtype = next(module.parameters()).dtype
    taken = inspect.signature(module.forward).parameters
    classifies = type(module).__name__.endswith("Classification")  # an encoder-decoder then gives both sides one text
    made: dict[str, Tensor] = {}
    for name in inputs:
        if name not in taken or (name.startswith("decoder") and classifies):
            continue
        if name.endswith("input_ids"):
            tokens = min(length, longest(config, decoder=name.startswith("decoder")))
            made[name] = torch.randint(3, text.vocab_size, (rows, tokens), generator=random)
            if classifies and config.is_encoder_decoder:
                made[name][:, -1] = config.eos_token_id  # there it reads its answer
        elif name == "attention_mask":
            made[name] = torch.ones_like(made["input_ids"])
        elif name == "pixel_values":
            size = vision.image_size
            height, width = (size, size) if isinstance(size, int) else tuple(size)
            made[name] = torch.randn(rows, vision.num_channels, height, width, generator=random).to(dtype)
        elif name == "input_features":
            frames = 2 * config.max_source_positions
            made[name] = torch.randn(rows, config.num_mel_bins, frames, generator=random).to(dtype)
    return made


def longest(config: Any, *, decoder: bool = False) -> int:
    """The most tokens that a model with ``config`` takes; two positions are some models' own (RoBERTa's padding)."""
    text: Mapping[str, Any] = (config.get_text_config() if hasattr(config, "get_text_config") else config).to_dict()
    for name in (*(("max_target_positions",) if decoder else ()), "max_position_embeddings", "n_positions"):
        if isinstance(text.get(name), int) and text[name] > 0:
            return int(text[name]) - (2 if text.get("model_type") in {"roberta", "xlm-roberta", "mpnet"} else 0)
    return 1 << 20
