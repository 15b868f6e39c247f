"""Every kind of rows through the chain: read, encoded, judged, a model pruned on them, and exported where it can be."""

from __future__ import annotations

import json
import shutil
import wave
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import pandas as pd
import pytest
import torch
from edgepress.errors import InputError, UnavailableError, UsageError
from edgepress.models import checkpoint, metrics
from PIL import Image

TEXT: dict[str, Any] = {
    "vocab_size": 2000,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 72,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION |= {"image_size": 16, "patch_size": 4}
GPT2 = {"vocab_size": 2000, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 72, "pad_token_id": 0}
PAIR = {
    "vocab_size": 2000, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
SPEECH = {**PAIR, **TOKENS, "num_mel_bins": 8, "max_source_positions": 50, "max_target_positions": 72}
IMAGES = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
RECORDINGS = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 8, "chunk_length": 1, "n_fft": 400}
RECORDINGS |= {"sampling_rate": 16000, "hop_length": 160}


def sentences(folder: Path, reviews: Path) -> pd.DataFrame:
    return pd.read_csv(reviews, dtype=str).head(120)


def pairs(folder: Path, reviews: Path) -> str:
    frame = sentences(folder, reviews)
    frame["other"] = frame["review"].to_numpy()[::-1]
    frame.to_csv(folder / "rows.csv", index=False)
    return "rows.csv"


def numbers(folder: Path, reviews: Path) -> str:
    frame = sentences(folder, reviews)
    frame["stars"] = frame["review"].str.len() / 100
    frame.to_json(folder / "rows.jsonl", orient="records", lines=True)
    return "rows.jsonl"


def tagged(folder: Path, reviews: Path) -> str:
    words = [text.split() for text in sentences(folder, reviews)["review"]]
    rows = [{"tokens": row, "label": ["long" if len(word) > 4 else "short" for word in row]} for row in words]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "rows.jsonl"


def plain(folder: Path, reviews: Path) -> str:
    sentences(folder, reviews)[["review"]].to_parquet(folder / "rows.parquet")
    return "rows.parquet"


def translated(folder: Path, reviews: Path) -> str:
    frame = sentences(folder, reviews)
    frame["target"] = frame["review"].str.split().str[:3].str.join(" ")
    frame.to_csv(folder / "rows.tsv", sep="\t", index=False)
    return "rows.tsv"


def images(folder: Path, reviews: Path) -> str:
    random = np.random.default_rng(0)
    for number in range(60):
        name = folder / "images" / ("dark", "light")[number % 2] / f"{number}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 120, (20, 24, 3)) + 120 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(name)
    return "images"


def captions(folder: Path, reviews: Path) -> str:
    images(folder, reviews)
    files = sorted((folder / "images").rglob("*.png"))
    texts = sentences(folder, reviews)["review"]
    rows = pd.DataFrame(
        {"file_name": [str(f.relative_to(folder / "images")) for f in files], "text": texts[: len(files)]}
    )
    rows.to_csv(folder / "images" / "metadata.csv", index=False)
    return "images"


def speech(folder: Path, reviews: Path) -> str:
    (folder / "speech").mkdir()
    rows = []
    for number, text in enumerate(sentences(folder, reviews)["review"].head(30)):
        with wave.open(str(folder / "speech" / f"{number}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16000)
            tone = np.sin(2 * np.pi * (200 + 20 * number) * np.arange(8000) / 16000)
            file.writeframes((9000 * tone).astype("<i2").tobytes())
        rows.append({"file_name": f"{number}.wav", "text": " ".join(text.split()[:4])})
    pd.DataFrame(rows).to_csv(folder / "speech" / "metadata.csv", index=False)
    return "speech"


@dataclass(frozen=True)
class Kind:
    architecture: str
    config: dict[str, Any]
    rows: Callable[[Path, Path], str]
    columns: dict[str, str]
    metric: str
    labels: tuple[str, ...] = ()
    processor: dict[str, Any] | None = None
    exports: bool = True


REVIEW = {"text": "review"}
BART = {**PAIR, **TOKENS, "max_position_embeddings": 72}
CLIP = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}
REVIEWED = ("negative", "positive")
KINDS = {
    "pairs": Kind(
        "BertForSequenceClassification",
        TEXT,
        pairs,
        {**REVIEW, "text_pair": "other", "label": "stars"},
        "accuracy",
        REVIEWED,
    ),
    "numbers": Kind(
        "BertForSequenceClassification", TEXT, numbers, {**REVIEW, "label": "stars"}, "spearman", ("score",)
    ),
    "tags": Kind("BertForTokenClassification", TEXT, tagged, {}, "token-accuracy", ("short", "long")),
    "language": Kind("GPT2LMHeadModel", GPT2, plain, REVIEW, "perplexity"),
    "target texts": Kind("BartForConditionalGeneration", BART, translated, REVIEW, "token-f1"),
    "images": Kind("ViTForImageClassification", VISION, images, {}, "accuracy", ("dark", "light"), IMAGES),
    "captions": Kind("CLIPModel", CLIP, captions, {}, "recall@1", (), IMAGES, exports=False),
    "speech": Kind("WhisperForConditionalGeneration", SPEECH, speech, {}, "wer", (), RECORDINGS),
    "no labels": Kind("BertForSequenceClassification", TEXT, plain, REVIEW, "agreement", REVIEWED),
    "embeddings": Kind("BertModel", TEXT, plain, REVIEW, "cosine"),
}
SLOW = {"numbers", "tags", "target texts", "no labels"}


@pytest.fixture(scope="module")
def folder_of(model_folder: Path, reviews_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a model of a kind, with random weights, its tokenizer or processor, and rows beside it."""
    import transformers

    def make(kind: Kind) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("kinds")
        model_class = getattr(transformers, kind.architecture)
        config = model_class.config_class(**kind.config)
        if kind.labels:
            config.id2label, config.label2id = dict(enumerate(kind.labels)), {n: i for i, n in enumerate(kind.labels)}
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder / "model")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(model_folder / name, folder / "model")
        if kind.processor:
            (folder / "model" / "preprocessor_config.json").write_text(json.dumps(kind.processor))
        return folder / "model", folder / kind.rows(folder, reviews_csv)

    return make


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in KINDS])
def test_the_chain(name: str, folder_of: Any, sound: Any, tmp_path: Path) -> None:
    kind = KINDS[name]
    model, rows = folder_of(kind)
    workload = ep.load(str(model), str(rows), columns=kind.columns, max_length=32)
    workload.data.check_disjoint()
    assert workload.data.metric == kind.metric
    batch = next(workload.data.calibration.batches(4))
    losses = workload.losses(batch)
    assert losses.shape == (len(batch.rows),)
    gradients = torch.autograd.grad(losses.sum(), list(workload.module.parameters()), allow_unused=True)
    assert all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)
    assert any(gradient.abs().max() > 0 for gradient in gradients if gradient is not None)
    whole = metrics.of_module(workload)
    assert whole.n == len(workload.data.evaluation)
    pruned = ep.prune(workload, ep.score(workload, "fisher", rows=8), ratio=0.5)
    figures = metrics.of_modules(pruned, workload)
    assert figures["value"] != whole.value or figures["drop"] == 0
    if kind.exports:
        artifact = ep.export(pruned, tmp_path / "artifact")
        assert artifact.manifest.parity is not None
        assert artifact.manifest.parity.cosine > 0.9999
        sound(artifact.model_file)
        from edgepress.export.backends.onnx import open_session

        judged, before = metrics.for_artifacts(pruned), metrics.for_artifacts(workload)
        with open_session(artifact) as session:
            original = metrics.answers(before, before.data.evaluation, metric=before.data.metric)
            through_file = metrics.of_session(session.run, judged, original=original)
        assert through_file.value == pytest.approx(metrics.of_modules(judged, before)["value"], abs=0.5, rel=1e-3)
        assert set(artifact.manifest.inputs) == set(workload.example)
    else:
        with pytest.raises(UnavailableError):
            ep.export(pruned, tmp_path / "artifact")


def test_a_pair_of_towers_is_two_artifacts_that_find_as_it_does(folder_of: Any, here: Any, tmp_path: Path) -> None:
    model, rows = folder_of(KINDS["captions"])
    done = here("export", model, "--data", rows, "--json", "-o", tmp_path / "pair")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [part["artifact"] for part in said["towers"]] == [
        str(tmp_path / "pair" / side) for side in ("image", "text")
    ]
    whole = metrics.of_module(ep.load(str(model), str(rows)))
    assert said["quality"]["metric"] == "recall@1"
    assert said["quality"]["value"] == pytest.approx(whole.value)


def test_sentence_pairs_tell_the_first_from_the_second(folder_of: Any) -> None:
    kind = KINDS["pairs"]
    model, rows = folder_of(kind)
    workload = ep.load(str(model), str(rows), columns=kind.columns, max_length=32)
    inputs = next(workload.data.calibration.batches(4)).inputs
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    assert set(inputs["token_type_ids"].unique().tolist()) == {0, 1}


def test_a_words_first_token_has_its_label(folder_of: Any, model_folder: Path) -> None:
    from transformers import AutoTokenizer

    kind = KINDS["tags"]
    model, rows = folder_of(kind)
    workload = ep.load(str(model), str(rows), max_length=32)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    given = [json.loads(line) for line in rows.read_text().splitlines()]
    words = {
        tuple(tokenizer(row["tokens"], is_split_into_words=True, truncation=True, max_length=32)["input_ids"]): row
        for row in given
    }
    part = workload.data.evaluation
    assert isinstance(part.labels, tuple)
    for ids, labels in zip(part.inputs["input_ids"], part.labels, strict=True):
        wanted = [kind.labels.index(label) for label in words[tuple(ids.tolist())]["label"]]
        judged = labels[labels >= 0].tolist()
        assert judged == wanted[: len(judged)]
        assert len(judged) > 0


def test_a_language_models_labels_are_its_next_tokens(folder_of: Any) -> None:
    kind = KINDS["language"]
    model, rows = folder_of(kind)
    workload = ep.load(str(model), str(rows), columns=REVIEW, max_length=16)
    part = workload.data.evaluation
    assert isinstance(part.labels, tuple)
    for ids, labels in zip(part.inputs["input_ids"], part.labels, strict=True):
        assert 1 < len(ids) <= 16
        np.testing.assert_array_equal(labels, np.append(ids[1:], -100))
    found = metrics.of_module(workload)
    losses = counts = 0.0
    for row in range(len(part)):
        ids = torch.tensor(part.inputs["input_ids"][row])[None]
        with torch.no_grad():
            logits = workload.module(input_ids=ids).logits[0, :-1]
        losses += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        counts += ids.shape[1] - 1
    assert found.value == pytest.approx(np.exp(losses / counts), rel=1e-4)


def test_rows_that_do_not_fit_are_one_sentence(folder_of: Any, tmp_path: Path, model_folder: Path) -> None:
    def refused(kind: str, rows: str, content: str, message: str, columns: dict[str, str] | None = None) -> None:
        model, _ = folder_of(KINDS[kind])
        path = tmp_path / rows
        path.write_text(content)
        with pytest.raises((InputError, UsageError), match=message):
            ep.load(str(model), str(path), columns=columns, max_length=32)

    refused("tags", "a.jsonl", '{"tokens": ["a", "b"], "label": ["short"]}', "row 1 has 2 tokens and 1 labels")
    refused("numbers", "b.csv", "text,label\na,many\n", "must hold numbers")
    refused("numbers", "c.csv", "text,label\na,inf\n", "not finite")
    refused("images", "d.csv", "text,label\na,dark\n", "no column 'image'")
    refused("no labels", "e.csv", "text,stars\na,1\n", r"map it with --columns label=…")
    lines = "\n".join(f"word {row},{row}" for row in range(30))
    refused("no labels", "f.csv", f"text,other\n{lines}\n", "no column 'label'")
    model, rows = folder_of(KINDS["images"])
    next((rows / "dark").iterdir()).write_bytes(b"not a picture")
    workload = ep.load(str(model), str(rows), max_length=32)
    with pytest.raises(InputError, match=r"\.png cannot be read as an image"):
        for part in (workload.data.train, workload.data.calibration, workload.data.evaluation):
            list(part.batches(8))
    (model / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"no preprocessor_config\.json"):
        ep.load(str(model), str(rows))


def test_processors_and_tokenizers_as_they_are_saved(folder_of: Any, reviews_csv: Path, tmp_path: Path) -> None:
    """One file for a processor of two things; a vocabulary and its merges; neither, which is refused."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    model, rows = folder_of(KINDS["captions"])
    tokens = [ep.load(str(model), str(rows), max_length=32).data.evaluation.fingerprint]
    sizes = {"size": {"height": 16, "width": 16}}
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    transformers.CLIPProcessor(transformers.ViTImageProcessor(**sizes), tokenizer).save_pretrained(tmp_path / "both")
    (model / "preprocessor_config.json").unlink()
    shutil.copy(tmp_path / "both" / "processor_config.json", model)
    tokens.append(ep.load(str(model), str(rows), max_length=32).data.evaluation.fingerprint)
    assert tokens[0] == tokens[1]

    model, _ = folder_of(KINDS["no labels"])
    words = ByteLevelBPETokenizer()
    words.train_from_iterator(pd.read_csv(reviews_csv)["review"], vocab_size=1000, special_tokens=["<s>", "<pad>"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    columns = {**REVIEW, "label": "stars"}
    with pytest.raises(InputError, match="has no tokenizer"):
        ep.load(str(model), str(reviews_csv), columns=columns)
    words.save_model(str(model))
    workload = ep.load(str(model), str(reviews_csv), columns=columns, max_length=32)
    saved = checkpoint.save(workload, tmp_path / "saved")
    again = ep.load(str(saved), str(reviews_csv), columns=columns)
    assert again.data.evaluation.fingerprint == workload.data.evaluation.fingerprint


def test_tokens_fit_the_model(folder_of: Any, reviews_csv: Path) -> None:
    columns = {**REVIEW, "label": "stars"}
    small, _ = folder_of(replace(KINDS["no labels"], config={**TEXT, "vocab_size": 500}))
    with pytest.raises(InputError, match=r"makes token 19\d\d; the model knows 500"):
        ep.load(str(small), str(reviews_csv), columns=columns)
    classifier = replace(KINDS["no labels"], architecture="GPT2ForSequenceClassification", config=GPT2)
    decoder, _ = folder_of(replace(classifier, config={**GPT2, "pad_token_id": 1}))
    workload = ep.load(str(decoder), str(reviews_csv), columns=columns)
    batch = next(workload.data.evaluation.batches(200))
    assert (batch.inputs["input_ids"][batch.inputs["attention_mask"] == 0] == 1).all()
    nameless, _ = folder_of(replace(classifier, config={**GPT2, "pad_token_id": None}))
    with pytest.raises(InputError, match="names no pad_token_id"):
        ep.load(str(nameless), str(reviews_csv), columns=columns)


@pytest.mark.parametrize("architecture", ["BartForSequenceClassification", "T5ForSequenceClassification"])
def test_classifiers_made_of_encoder_decoders(
    architecture: str, folder_of: Any, reviews_csv: Path, tmp_path: Path
) -> None:
    """They answer at the text's end: judged, scored, cut and saved, and not exported."""
    t5 = {"vocab_size": 2000, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = BART if architecture.startswith("Bart") else {**t5, **TOKENS}
    model, _ = folder_of(replace(KINDS["no labels"], architecture=architecture, config=config))
    workload = ep.load(str(model), str(reviews_csv), columns={**REVIEW, "label": "stars"}, max_length=32)
    pruned = ep.prune(workload, ep.score(workload, "fisher", rows=8), ratio=0.5)
    assert metrics.of_modules(pruned, workload)["metric"] == "accuracy"
    again = checkpoint.read(checkpoint.save(pruned, tmp_path / "saved"), workload.data)
    with torch.no_grad():
        assert torch.equal(again.forward(again.example), pruned.forward(pruned.example))
    with pytest.raises(UnavailableError, match="its export is not available yet"):
        ep.export(pruned, tmp_path / "artifact")


def test_without_labels_only_fidelity_judges(folder_of: Any) -> None:
    kind = KINDS["no labels"]
    model, rows = folder_of(kind)
    workload = ep.load(str(model), str(rows), columns=REVIEW, max_length=32)
    assert metrics.of_module(workload).value == 100.0, "a model agrees with itself"
    assert workload.judged_by("kl").data.metric == "kl"
    with pytest.raises(UsageError, match="no labels for 'accuracy'; they can be judged by agreement"):
        workload.judged_by("accuracy")
    labelled = rows.with_suffix(".csv")
    pd.DataFrame({"review": pd.read_parquet(rows)["review"], "stars": 1}).to_csv(labelled)
    said = ep.load(str(model), str(labelled), columns={**REVIEW, "label": "-"}, max_length=32)
    assert said.data.metric == "agreement"
