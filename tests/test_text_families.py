"""The chain on every kind of text classifier: score, prune, reconstruct, distil, export, quantize, parity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import edgepress as ep
import pandas as pd
import pytest
import torch
from edgepress.compress.prune.reconstruct import reconstruct

TEXT: dict[str, Any] = {
    "vocab_size": 2000,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 72,
    "pad_token_id": 0,
}
DEBERTA = {
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
}
SLOW = pytest.mark.slow
MODELS = [
    pytest.param("albert", "AlbertForSequenceClassification", {**TEXT, "embedding_size": 16}),
    pytest.param(
        "gpt2",
        "GPT2ForSequenceClassification",
        {"vocab_size": 2000, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 72, "pad_token_id": 0},
    ),
    pytest.param("roberta", "RobertaForSequenceClassification", TEXT, marks=SLOW),
    pytest.param("electra", "ElectraForSequenceClassification", {**TEXT, "embedding_size": 16}, marks=SLOW),
    pytest.param(
        "distilbert",
        "DistilBertForSequenceClassification",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 2000, "max_position_embeddings": 72},
        marks=SLOW,
    ),
    pytest.param("mpnet", "MPNetForSequenceClassification", TEXT, marks=SLOW),
    pytest.param("deberta-v2", "DebertaV2ForSequenceClassification", {**TEXT, **DEBERTA}, marks=SLOW),
    pytest.param("llama", "LlamaForSequenceClassification", {**TEXT, "num_key_value_heads": 2}, marks=SLOW),
]


@pytest.mark.parametrize(("model_type", "architecture", "options"), MODELS)
def test_the_chain(
    model_type: str,
    architecture: str,
    options: dict[str, Any],
    model_folder: Path,
    reviews_csv: Path,
    sound: Callable[[Path], None],
    tmp_path: Path,
) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **options)
    module = getattr(transformers, architecture)(config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    module.save_pretrained(tmp_path / model_type)
    transformers.BertTokenizer(str(model_folder / "vocab.txt")).save_pretrained(tmp_path / model_type)
    rows = tmp_path / "rows.csv"
    pd.read_csv(reviews_csv, dtype=str).head(300).to_csv(rows, index=False)
    columns = {"text": "review", "label": "stars"}
    workload = ep.load(str(tmp_path / model_type), str(rows), columns=columns, max_length=64)
    pruned = ep.prune(workload, ep.score(workload, "fisher", rows=64), ratio=0.5)
    solved = reconstruct(workload, pruned, rows=64)
    student = ep.recover(solved, workload, steps=3).workload
    assert student.params < workload.params
    plan = ep.quantize(student, "int8-dynamic")
    inside = sum(name.startswith(student.structure.stacks[0].path) for name in plan.weights)
    assert inside >= 2 * student.structure.stacks[0].count
    floats, integers = ep.export(student, tmp_path / "fp32"), ep.export(student, tmp_path / "int8", plan)
    for artifact in (floats, integers):
        assert artifact.manifest.parity is not None
        assert len(artifact.manifest.parity.shapes) == 9
        sound(artifact.model_file)
    assert integers.manifest.operators["MatMulIntegerToFloat"] >= inside
