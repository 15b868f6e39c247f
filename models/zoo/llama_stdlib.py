"""A small decoder of the Llama shape on the text of Python's standard library.

What    Grouped-query attention (1.39 M parameters, 6 layers, 8 query and 2 key/value heads, hidden 128) over 2,048 byte
        pairs. It was trained here by ``recipes/llama_stdlib.py`` in under ten minutes on one core;
        ``weights/llama-stdlib`` has its tokenizer, weights (in half precision) and rows, and the log of the training.
Rows    128 tokens in succession, each labelled with the next, from Python's own modules (copyright 2001-2023 Python
        Software Foundation, all rights reserved; PSF-2.0), each module in one split only. Evaluation 300, calibration
        256, and 3,000 of those that it was trained on.
Judged  By perplexity.
Source  Touvron et al. 2023 (arXiv 2302.13971); Ainslie et al. 2023 (arXiv 2305.13245).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import checkpoint
from ..data import SPLITS, Data
from ..metrics import Quality
from ..skeleton import Skeleton
from ..workload import Progress, Workload
from . import language
from .entry import WEIGHTS, Entry, filled, workload

ENTRY = Entry(
    name="llama-stdlib",
    what="a small decoder of the Llama shape, the text of Python's standard library",
    task="language modelling",
    origin="trained for edgepress; Python Software Foundation",
    licence="Apache-2.0 (weights), PSF-2.0 (rows)",
    params=1_394_304,
    quality=Quality("perplexity", 25.22, 22.59, 28.03, 300),
)
END = 0
"""The one special token: it pads, and stands at the beginning and the end of what is generated."""
TOKENS = 128
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2048,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 384,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": END,
}
TOKENIZER_CONFIG = b'{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>"}\n'


def load(*, seed: int = 0, progress: Progress | None = None) -> Workload:
    """The workload; nothing is downloaded, and there is nothing that ``seed`` decides."""
    folder = WEIGHTS / ENTRY.name
    skeleton = Skeleton("LlamaForCausalLM", CONFIG, ())
    tensors = {name: tensor.float() for name, tensor in checkpoint.read_tensors(folder / "model.safetensors").items()}
    module = filled(skeleton, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    with np.load(folder / "rows.npz", allow_pickle=False) as arrays:
        parts = {name: language.rows(arrays[name], END) for name in SPLITS}
    files = {"tokenizer.json": (folder / "tokenizer.json").read_bytes(), "tokenizer_config.json": TOKENIZER_CONFIG}
    data = Data(**parts, metric="perplexity")
    return workload(ENTRY, module, skeleton, data, max_length=TOKENS, files=files)
