"""Padding: the mask is of what it was made for, and of nothing else that happens to have its shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from edgepress.compress.distance import distance
from edgepress.compress.recover.losses import look, objective
from edgepress.models import padding, surgery, tasks
from edgepress.models.data import Batch
from edgepress.plan import PruningPlan
from torch import Tensor

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
IDS = torch.arange(8).reshape(2, 4)


def test_of_one_stack() -> None:
    inputs, values = {"input_ids": IDS, "attention_mask": MASK}, torch.zeros(2, 4, 5)
    for path in (padding.ANSWER, "model.decoder.layers.0", "encoder"):
        found = padding.real(inputs, values, path)
        assert found is not None
        assert torch.equal(found, MASK.bool()), "a decoder alone reads these tokens"
    turned = padding.real(inputs, values.transpose(0, 1), "encoder", row_axis=1)
    assert turned is not None
    assert torch.equal(turned, MASK.T.bool())
    for other in (torch.zeros(2, 5), torch.zeros(2, 3, 5), torch.zeros(2, 4, 3, 5)):
        assert padding.real(inputs, other) is None
    assert padding.real({"input_ids": IDS}, values) is None


@pytest.mark.parametrize("more", [0, 1])
def test_of_two_stacks_it_is_the_encoders(more: int) -> None:
    decoded = torch.zeros(2, 4 + more, dtype=torch.int64)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": decoded}
    answer = torch.zeros(2, 4 + more, 5)
    assert padding.real(inputs, answer) is None
    assert padding.real(inputs, answer, "model.decoder.layers.0.fc2") is None
    found = padding.real(inputs, torch.zeros(2, 4, 5), "model.encoder.layers.0.fc2")
    assert found is not None
    assert torch.equal(found, MASK.bool())


def _batch(length: int, *, labels: Tensor | None = None) -> Batch:
    """Two rows of which the encoder reads 3 and 1 tokens, and the decoder ``length``."""
    random = torch.Generator().manual_seed(0)
    drawn = torch.randint(3, 50, (2, length), generator=random)
    return Batch(
        torch.arange(2).numpy(), {"input_ids": IDS + 3, "attention_mask": MASK, "decoder_input_ids": drawn}, labels
    )


def test_answers_of_a_decoder_all_count() -> None:
    random = torch.Generator().manual_seed(1)
    wanted, found = torch.randn(2, 2, 4, 7, generator=random, dtype=torch.float64)
    by_token = torch.stack([distance(wanted[:, [t]], found[:, [t]], _batch(1), by_class=True) for t in range(4)])
    assert torch.allclose(distance(wanted, found, _batch(4), by_class=True), by_token.mean(dim=0))
    assert [len(row) for row in tasks.GENERATION.answers(found, _batch(4))] == [4, 4]
    pooled = tasks.EMBEDDING.answers(found, _batch(4))
    assert torch.allclose(torch.tensor(pooled[1]).double(), found[1].mean(dim=0), atol=1e-6)


def test_states_and_answers_of_a_decoder_are_all_distilled(small_model: Callable[[str], Any]) -> None:
    original = small_model("t5")
    student = surgery.prune(original, PruningPlan.of(original.structure.find("ffn", 4).units[:12]))
    terms, batch = objective(student, original, ("hidden", "layers"), temperature=1.0), _batch(4)
    with torch.no_grad():
        ours, theirs = (look(one, batch, terms.watched(side)) for side, one in enumerate((student, original)))
        errors, sizes, _ = terms(original.task, batch, ours, theirs)
    pairs = [pair for term in terms.terms for pair in terms.pairs[term]]
    for place, (mine, their) in enumerate(pairs):
        a, b = ours[1][mine][0], theirs[1][their][0]
        real = MASK.bool() if mine.startswith("encoder") else torch.ones_like(MASK).bool()
        assert errors[place] == pytest.approx(float((a - b)[real].square().sum()), abs=1e-9)
        assert sizes[place] == pytest.approx(float(b[real].square().sum()))
