"""Statistics against what their definitions give, row by row and without padding, in float64."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from edgepress.errors import InputError
from edgepress.models import families, mapping, surgery
from edgepress.models.data import Batch, Data, Rows, key_of
from edgepress.models.functions import separate_attention
from edgepress.models.skeleton import Skeleton
from edgepress.models.statistics import attention, statistics
from edgepress.models.statistics.representation import Similarity, hsic
from edgepress.models.statistics.tokens import Tokens
from edgepress.models.structure import Structure
from edgepress.models.workload import Workload
from edgepress.plan import PruningPlan, Unit
from torch import nn

COUNT = 5


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def with_rows(workload: Any, count: int = COUNT) -> Any:
    """The workload with drawn rows: texts and targets of other lengths in every row, and labels where it has a loss
    of its own."""
    random = np.random.default_rng(3)
    lengths = {"input_ids": random.integers(4, 12, count), "decoder_input_ids": random.integers(3, 10, count)}
    inputs: dict[str, tuple[Any, ...]] = {}
    for name, tensor in workload.example.items():
        if name == "attention_mask":
            continue
        shape = tensor.shape[1:]
        if name in lengths:
            inputs[name] = tuple(random.integers(3, 50, n) for n in lengths[name])
        elif tensor.dtype == torch.int64:
            inputs[name] = tuple(random.integers(1, 50, n) for n in lengths["input_ids"])
        else:
            inputs[name] = tuple(random.standard_normal(shape) for _ in range(count))
    by_token = inputs.get("decoder_input_ids", inputs.get("input_ids")) if not workload.skeleton.labels else None
    labels: Any = None
    if workload.skeleton.labels:
        labels = np.arange(count) % 2
    elif by_token is not None and workload.task.by_token:
        labels = tuple(random.integers(0, 50, len(tokens)) for tokens in by_token)
    keys = tuple(key_of(*(values[row] for values in inputs.values())) for row in range(count))
    rows = Rows(inputs, labels, keys)
    return replace(workload, data=Data(rows, rows, rows))


def alone(workload: Any) -> list[Batch]:
    """Each row as a batch of its own, which needs no padding."""
    rows = workload.data.calibration
    return [
        Batch(np.array([row]), rows.padded(np.array([row])), rows.padded_labels(np.array([row])))
        for row in range(len(rows))
    ]


def unevenly_pruned(workload: Any) -> Any:
    """Without one head of the first layer (which leaves groups of unequal size, where there are groups), without
    channels of the second, and without a block where one can go."""
    heads = [Unit("head", 0, 1)]
    channels = [Unit("ffn", 1, index) for index in (0, 3, 4)]
    return surgery.prune(workload, PruningPlan.of(heads + channels))


MADE = ("bert", "deberta-v2", "llama", "vit", "clip", "t5", "whisper", "bert, pruned", "llama, pruned")


@pytest.fixture(scope="module", params=MADE)
def judged(request: pytest.FixtureRequest, small_model: Callable[[str], Any]) -> Any:
    """A workload with rows, and its statistics over two batches."""
    name = request.param.removesuffix(", pruned")
    workload = small_model(name)
    workload = with_rows(unevenly_pruned(workload) if name != request.param else workload)
    return workload, statistics(workload, batch=3)


def eager(workload: Any) -> tuple[Any, list[Any]]:
    """A copy of the module whose outputs hold its attentions and hidden states, and these outputs, row by row."""
    module = copy.deepcopy(workload.module)
    module.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = [module(**part.inputs, output_attentions=True, output_hidden_states=True) for part in alone(workload)]
    return module, outputs


def of_stack(output: Any, stack: str, what: str) -> Any:
    """The ``attentions``, ``cross_attentions`` or ``hidden_states`` of one stack, by the names of transformers."""
    if "text_model" in stack or "vision_model" in stack:
        return getattr(output["text_model_output" if "text_model" in stack else "vision_model_output"], what)
    if "encoder_last_hidden_state" in output:
        side = "decoder" if "decoder" in stack else "encoder"
        return output[what if what.startswith("cross") else f"{side}_{what}"]
    return output[what]


def heads_by_hand(maps: Sequence[torch.Tensor], head: int, *, cross: bool) -> dict[str, Any]:
    """One head's figures from its maps [1, heads, queries, keys], one a row, query by query."""
    entropies, lists = [], {name: [] for name in ("distance", "later", "near", "1", "4", "16")}
    shares: dict[str, float] = {"first": 0.0, "last": 0.0, "peak": 0.0}
    for one in maps:
        rows = one[0, head].numpy()
        for query, row in enumerate(rows):
            visible = int((row > 0).sum())
            if visible > 1:
                entropies.append(-sum(p * math.log(p) for p in row if p > 0) / math.log(visible))
            lists["distance"].append(sum(p * abs(query - key) for key, p in enumerate(row)))
            lists["later"].append(sum(p for key, p in enumerate(row) if key > query))
            lists["near"].append(sum(p for key, p in enumerate(row) if abs(key - query) <= 2))
            for k in (1, 4, 16):
                lists[str(k)].append(sum(sorted(row, reverse=True)[:k]))
        shares["first"] += rows[:, 0].sum()
        shares["last"] += rows[:, -1].sum()
        shares["peak"] += rows.sum(axis=0).max()
    queries = sum(one.shape[2] for one in maps)
    figures: dict[str, Any] = {name: float(np.mean(values)) for name, values in lists.items()}
    figures |= {name: share / queries for name, share in shares.items()}
    figures["entropy"] = float(np.mean(entropies))
    return figures | (dict.fromkeys(("distance", "later", "near")) if cross else {})


def similarity_by_hand(maps: Sequence[torch.Tensor]) -> np.ndarray:
    beyond = []
    for one in maps:
        visible = (one[0] > 0).double()
        beyond.append(((one[0] - visible / visible.sum(dim=-1, keepdim=True)) * visible).flatten(1))
    whole = torch.cat(beyond, dim=1)
    unit = whole / whole.norm(dim=1, keepdim=True)
    return (unit @ unit.T).numpy()


def test_attention_is_what_eager_attention_says(judged: Any) -> None:
    workload, found = judged
    _, outputs = eager(workload)
    structure = workload.structure
    layers = found["attention"]["layers"]
    kinds = ("head", "cross_head")
    assert [(e["layer"], e["kind"]) for e in layers] == [
        (layer, kind)
        for stack in structure.stacks
        for layer in stack.layers
        for kind in kinds
        if structure.find(kind, layer)
    ]
    starts = {stack.path: stack.start for stack in structure.stacks}
    rounded = structure.family in {"llama", "vit", "clip"}  # their eager attention takes its softmax in float32
    tolerance = 1e-6 if rounded else 1e-9
    for entry in layers:
        cross = entry["kind"] == "cross_head"
        what = "cross_attentions" if cross else "attentions"
        place = entry["layer"] - starts[entry["stack"]]
        maps = [of_stack(output, entry["stack"], what)[place] for output in outputs]
        assert len(entry["heads"]) == maps[0].shape[1] == structure.find(entry["kind"], entry["layer"]).count
        for one in entry["heads"]:
            figures = heads_by_hand(maps, one["head"], cross=cross)
            shown = {**one, **one["top"]}
            assert {name: shown[name] for name in figures} == pytest.approx(figures, abs=tolerance)
            assert one["sink"] == (figures["peak"] >= 0.3)
            assert one["causal"] == (not cross and figures["later"] < 0.01)
            assert one["local"] == (not cross and figures["near"] >= 0.5)
        correlation = similarity_by_hand(maps)
        np.testing.assert_allclose(entry["similarity"], correlation, atol=10 * tolerance)
        pairs = itertools.combinations(range(len(correlation)), 2)
        assert entry["alike"] == [[a, b] for a, b in pairs if correlation[a, b] >= 0.9]


def u_statistic(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC as the mean of its kernel over all ordered quadruples of distinct examples."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    total = 0.0
    for i, j, q, r in itertools.permutations(range(n), 4):
        total += k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
    return total / (n * (n - 1) * (n - 2) * (n - 3))


def test_the_estimator_of_hsic() -> None:
    random = np.random.default_rng(0)
    layers = [random.standard_normal((7, width)) + 3 for width in (3, 5)]
    grams = torch.stack([torch.from_numpy(layer @ layer.T).fill_diagonal_(0) for layer in layers])
    wanted = [[u_statistic(a, b) for a in layers] for b in layers]
    np.testing.assert_allclose(hsic(grams), wanted, rtol=1e-9)


def test_minibatches_estimate_what_all_tokens_give() -> None:
    """CKA of correlated layers from minibatches, against the one that all examples at once give."""
    random = torch.Generator().manual_seed(0)
    first = torch.randn(20000, 6, generator=random, dtype=torch.float64) + 5
    second = first @ torch.randn(6, 4, generator=random, dtype=torch.float64)
    second += torch.randn(second.shape, generator=random, dtype=torch.float64)
    whole = Similarity(2, seed=0)
    centred = [layer - layer.mean(dim=0) for layer in (first, second)]  # plain linear CKA: the bias is of order 1/n
    products = [[float((a.T @ b).square().sum()) for a in centred] for b in centred]
    exact = products[0][1] / math.sqrt(products[0][0] * products[1][1])
    for part in range(0, 20000, 1000):
        whole.update([first[part : part + 1000], second[part : part + 1000]])
    cka = whole.cka()
    assert cka[0][1] == pytest.approx(exact, abs=0.005)
    assert cka[0][0] == pytest.approx(1)


def test_representation_is_what_the_hidden_states_say(judged: Any) -> None:
    workload, _ = judged
    found = statistics(workload, batch=COUNT)["representation"]
    seen = blocks_of(workload)
    for entry in found["layers"]:
        pairs = seen[entry["stack"]]
        before, after = pairs[entry["layer"] - min(e["layer"] for e in found["layers"] if e["stack"] == entry["stack"])]
        cosines = [float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)) for a, b in zip(before, after, strict=True)]
        norms = [float((b - a).norm() / a.norm()) for a, b in zip(before, after, strict=True)]
        assert entry["cosine"] == pytest.approx(np.mean(cosines), abs=1e-9)
        assert entry["influence"] == pytest.approx(1 - np.mean(cosines), abs=1e-9)
        assert entry["update_norm"] == pytest.approx(np.mean(norms), rel=1e-9)
    for entry in found["cka"]:
        depths = [seen[entry["stack"]][0][0], *(after for _, after in seen[entry["stack"]])]
        grams = [torch.einsum("id,jd->ij", depth, depth).fill_diagonal_(0) for depth in depths]
        products = hsic(torch.stack(grams)).numpy()
        own = np.sqrt(np.diag(products))
        assert len(entry["names"]) == len(depths)
        np.testing.assert_allclose(np.array(entry["values"]), products / own / own[:, None], atol=1e-7)


def blocks_of(workload: Any) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """For each stack the input and output of each block, over the tokens of all rows, each row run alone."""
    seen: dict[str, list[Any]] = {}

    def note(held: list[Any]) -> Any:
        def hook(_: Any, args: Any, output: Any) -> None:
            held.append((args[0][0], (output[0] if isinstance(output, tuple) else output)[0]))

        return hook

    module = copy.deepcopy(workload.module)
    for stack in workload.structure.stacks:
        seen[stack.path] = [[] for _ in range(stack.count)]
        for held, block in zip(seen[stack.path], module.get_submodule(stack.path), strict=True):
            block.register_forward_hook(note(held))
    with torch.no_grad():
        for part in alone(workload):
            module(**part.inputs)
    return {
        path: [tuple(torch.cat([run[side] for run in held]) for side in (0, 1)) for held in lists]  # type: ignore[misc]
        for path, lists in seen.items()
    }


def mean_loss(workload: Any, batches: Sequence[Batch] | None = None) -> torch.Tensor:
    return torch.cat([workload.losses(part) for part in batches or alone(workload)]).mean()


def test_gradients_against_finite_differences(small_model: Callable[[str], Any]) -> None:
    workload = with_rows(small_model("bert"))
    found = {entry["name"]: entry for entry in statistics(workload, batch=2)["gradient_flow"]["layers"]}
    parameters = dict(workload.module.named_parameters())
    for name in ("classifier.weight", "bert.embeddings.token_type_embeddings.weight"):
        values = parameters[name].data
        slopes = []
        for place in range(values.numel()):
            ends = []
            for step in (1e-5, -1e-5):
                values.view(-1)[place] += step
                with torch.no_grad():
                    ends.append(float(mean_loss(workload)))
                values.view(-1)[place] -= step
            slopes.append((ends[0] - ends[1]) / 2e-5)
        norm = float(np.linalg.norm(slopes))
        entry = found[name.removesuffix(".weight")]
        assert entry["gradient_norm"] == pytest.approx(norm, rel=1e-6)
        assert entry["weight_norm"] == pytest.approx(float(values.norm()), rel=1e-12)
        assert entry["update_ratio"] == pytest.approx(norm / float(values.norm()), rel=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "vit", "bart", "whisper", "llama", "t5"])
def test_the_slope_along_each_gradient_is_its_norm(small_model: Callable[[str], Any], name: str) -> None:
    """The directional derivative along the unit gradient, by finite differences, for blocks and matrices.

    Llama and T5 take their norms in float32, which leaves no digits for differences: there autograd's word, row by row
    and without padding, has to do.
    """
    workload = with_rows(small_model(name))
    workload.module.requires_grad_(True)
    step = 1e-5
    found = statistics(workload, batch=3)
    loss = mean_loss(workload)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
    parameters = dict(workload.module.named_parameters())
    slopes = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    gradients = {key: slope for key, slope in zip(parameters, slopes, strict=True) if slope is not None}
    for entry in found["gradient_flow"]["layers"][::3]:
        inside = f"{entry['name']}." if entry["kind"] == "block" else ""
        names = [
            n for n in gradients if (n.startswith(inside) if inside else n.removesuffix(".weight") == entry["name"])
        ]
        norm = math.sqrt(sum(float(gradients[n].square().sum()) for n in names))
        assert entry["gradient_norm"] == pytest.approx(norm, rel=1e-5), entry["name"]
        ends = []
        for side in (step, -step) if name not in {"llama", "t5"} else ():
            for n in names:
                parameters[n].data += side * gradients[n] / norm
            with torch.no_grad():
                ends.append(float(mean_loss(workload)))
            for n in names:
                parameters[n].data -= side * gradients[n] / norm
        slope = (ends[0] - ends[1]) / step / 2 if ends else norm
        assert norm == pytest.approx(slope, rel=1e-5, abs=1e-9), entry["name"]


def test_layers_that_gradients_do_not_reach_are_flagged(small_model: Callable[[str], Any]) -> None:
    workload = with_rows(small_model("gpt2"))
    with torch.no_grad():
        for factor, layer in ((1e4, 0), (1e-4, 1)):  # an input so much larger, the gradient so much larger
            block = workload.module.get_submodule(f"transformer.h.{layer}")
            block.mlp.c_proj.weight.zero_()
            block.mlp.c_fc.weight.zero_()
            block.mlp.c_fc.bias.fill_(factor)
        workload.module.transformer.h[2].mlp.c_proj.weight.zero_()
    found = {entry["name"]: entry for entry in statistics(workload)["gradient_flow"]["layers"]}
    assert found["transformer.h.0.mlp.c_proj"]["flag"] == "exploding"
    assert found["transformer.h.1.mlp.c_proj"]["flag"] == "vanishing"
    assert found["transformer.h.2.mlp.c_fc"]["flag"] == "zero"
    assert found["transformer.h.2.mlp.c_proj"]["flag"] is None


def test_dead_units(small_model: Callable[[str], Any]) -> None:
    workload = with_rows(small_model("bert"))
    layer = workload.module.bert.encoder.layer[1]
    with torch.no_grad():
        layer.intermediate.dense.weight[[2, 5]] = 0
        layer.intermediate.dense.bias[2], layer.intermediate.dense.bias[5] = -200, 1
        layer.output.dense.weight[:, 7] = 0
        layer.attention.self.value.weight[8:16] = 0
        layer.attention.self.value.bias[8:16] = 0
    dead = statistics(workload, batch=2)["gradient_flow"]["dead"]
    assert dead == [
        {"kind": "head", "layer": 1, "count": 4, "zero": [1], "constant": [], "no_gradient": []},
        {"kind": "ffn", "layer": 1, "count": 24, "zero": [2], "constant": [5], "no_gradient": [7]},
    ]


def test_dead_groups(small_model: Callable[[str], Any]) -> None:
    """A key/value group is dead with the query heads that read it, also where they are unequal in number."""
    workload = with_rows(unevenly_pruned(small_model("llama")))
    holder = workload.module.model.layers[0].self_attn
    assert holder.v_proj.groups == (0, 1, 1, 2, 2)
    with torch.no_grad():
        holder.v_proj.weight[8:16] = 0
    dead = statistics(workload)["gradient_flow"]["dead"]
    assert [(entry["kind"], entry["zero"]) for entry in dead] == [("head", [1, 2]), ("kv", [1])]


def test_every_architecture(model: Any) -> None:
    """All heads of all attentions are seen, whatever the family, and everything is plain JSON."""
    workload = with_rows(model, 3)
    before = {name: tensor.clone() for name, tensor in workload.module.state_dict().items()}
    found = statistics(workload, batch=2)
    json.dumps(found, allow_nan=False)
    assert found["notes"] == []
    structure = workload.structure
    for kind in ("head", "cross_head"):
        layers = [entry for entry in found["attention"]["layers"] if entry["kind"] == kind]
        assert {entry["layer"]: len(entry["heads"]) for entry in layers} == {
            site.layer: site.count for site in structure.of_kind(kind)
        }
        for one in (head for entry in layers for head in entry["heads"]):
            assert 0 <= one["entropy"] <= 1 + 1e-9
            assert 0 <= one["top"]["1"] <= one["top"]["4"] <= one["top"]["16"] <= 1 + 1e-9
            assert max(one["first"], one["last"]) <= one["peak"] + 1e-9
    runs = {entry["layer"] for entry in found["representation"]["layers"]}
    assert runs == set(range(structure.num_layers))
    flow = found["gradient_flow"]["layers"]
    assert [entry["block"] for entry in flow if entry["kind"] == "block"] == list(range(structure.num_layers))
    matrices = [p for p in workload.module.parameters() if p.dim() > 1]
    assert sum(entry["params"] for entry in flow if entry["kind"] != "block") == sum(p.numel() for p in matrices)
    assert all(torch.equal(before[name], tensor) for name, tensor in workload.module.state_dict().items())


def test_shared_blocks_are_told_apart_by_their_runs(small_model: Callable[[str], Any]) -> None:
    found = statistics(with_rows(small_model("albert")))
    assert [(entry["layer"], entry["run"]) for entry in found["attention"]["layers"]] == [(0, 0), (0, 1), (0, 2)]
    assert [(entry["layer"], entry["run"]) for entry in found["representation"]["layers"]] == [(0, 0), (0, 1), (0, 2)]
    assert found["representation"]["cka"][0]["names"] == ["input", "0, run 0", "0, run 1", "0, run 2"]
    assert len({entry["cosine"] for entry in found["representation"]["layers"]}) == 3


@pytest.mark.parametrize("hidden", [-100.0, -math.inf, float(torch.finfo(torch.float64).min)])
def test_every_way_to_hide_a_key(hidden: float) -> None:
    """A mask of bools, one that is added (Swin's says -100), a causal flag and a mask without batch or heads."""
    query, key, value = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
    key, value = key[:, :2], value[:, :2]  # two groups for four heads
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    added = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~mask, hidden)
    ways: list[dict[str, Any]] = [{"attn_mask": m[place]} for m in (mask, added) for place in (..., None, (None, None))]
    for options in ({"is_causal": True}, *ways):
        maps = attention.of_product(query, key, value, enable_gqa=True, **options)
        assert torch.equal(maps.visible.expand(2, 5, 5), mask.expand(2, 5, 5))
        mixed = maps.part(slice(0, 2)) @ value.repeat_interleave(2, dim=1)
        whole = nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
        torch.testing.assert_close(mixed, whole[:, :, :2], rtol=0, atol=1e-12)


def test_eager_attention_is_seen_as_it_is(small_model: Callable[[str], Any]) -> None:
    workload = with_rows(small_model("bert"))
    found = statistics(workload)
    workload.module.set_attn_implementation("eager")
    assert flat(statistics(workload)["attention"]) == pytest.approx(flat(found["attention"]), abs=1e-9)
    assert workload.module.config._attn_implementation == "eager"


# ---- what a user's own function makes


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` over padded tokens, either way round."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=batch_first, norm_first=True)
        self.embedding, self.head, self.batch_first = nn.Embedding(50, 16, padding_idx=0), nn.Linear(16, 3), batch_first
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = self.encoder(x if self.batch_first else x.transpose(0, 1), src_key_padding_mask=tokens == 0)
        weights = (tokens != 0).to(x.dtype)[..., None]
        logits: torch.Tensor = self.head(((x if self.batch_first else x.transpose(0, 1)) * weights).sum(dim=1))
        return logits


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.hidden, self.head = nn.LSTM(3, 12, batch_first=True), nn.Linear(12, 10), nn.Linear(10, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.relu(self.hidden(self.rnn(x)[0][:, -1])))
        return logits


def convolutional() -> nn.Module:
    first = nn.Conv2d(3, 6, 3)
    with torch.no_grad():
        first.bias[4] = -1e3  # dead behind a ReLU
    rest = [nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2)]
    return nn.Sequential(first, *rest)


def of_module(module: nn.Module, example: torch.Tensor, name: str) -> Any:
    """The workload of a module, with labelled rows."""
    separate_attention(module)
    module = module.double().eval()
    inputs = {name: example.double() if example.is_floating_point() else example}
    structure = mapping.structure(module, families.of_module(module), inputs)
    workload = Workload("net", module, structure, Data.empty(), Skeleton("nets:net", {}, ()), 1, "", "", inputs)
    ours = with_rows(workload)
    rows = replace(ours.data.calibration, labels=np.arange(COUNT) % 2)
    return replace(ours, data=Data(rows, rows, rows))


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_encoder(batch_first: bool) -> None:
    workload = of_module(Encoder(batch_first=batch_first), torch.randint(1, 50, (1, 9)), "tokens")
    padded, unpadded = statistics(workload, batch=COUNT), statistics(workload, batch=1)
    for name in ("attention", "gradient_flow"):
        assert flat(padded[name]) == pytest.approx(flat(unpadded[name]), abs=1e-9)
    assert flat(padded["representation"]["layers"]) == pytest.approx(
        flat(unpadded["representation"]["layers"]), abs=1e-9
    )
    assert [len(entry["heads"]) for entry in padded["attention"]["layers"]] == [4, 4]
    assert padded["notes"] == []


def test_tokens_are_found_whichever_way_they_lie() -> None:
    keys = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    values = torch.arange(9).reshape(3, 3, 1)
    tokens = Tokens(Structure("net", (), ()))
    tokens.start(None)
    tokens.saw("stack", keys)
    for row_axis in (0, 1):
        laid = values.transpose(0, row_axis)
        assert sorted(tokens.of("stack", laid, row_axis).flatten().tolist()) == [0, 1, 3, 6, 7, 8]
        assert len(tokens.of("stack", torch.zeros(2, 3, 1), row_axis)) == 6
        assert len(tokens.of("another", laid, row_axis)) == 9


def flat(values: Any) -> list[float]:
    """All numbers of a nested document, in order."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list):
        return [number for value in values for number in flat(value)]
    return [float(values)] if isinstance(values, (int, float)) else []


def test_networks_without_blocks() -> None:
    for module, example, name in (
        (convolutional(), torch.randn(1, 3, 12, 12), "input"),
        (Recurrent(), torch.randn(1, 7, 3), "x"),
    ):
        workload = of_module(module, example, name)
        found = statistics(workload, batch=2)
        assert found["notes"] == [
            "this model has no list of blocks, so there is nothing to say about representation",
            "no attention is known in this model, so there is nothing to say about heads",
        ]
        named = {f"{n.removesuffix('.weight')}" for n, p in workload.module.named_parameters() if p.dim() > 1}
        assert {entry["name"] for entry in found["gradient_flow"]["layers"]} == named
        assert all(entry["gradient_norm"] > 0 for entry in found["gradient_flow"]["layers"])
        if name == "input":
            dead = found["gradient_flow"]["dead"][0]
            assert (dead["kind"], dead["zero"]) == ("channel", [4])


# ---- bounded, harmless, and strict


def test_parts_and_batches_do_not_change_the_figures(
    small_model: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = with_rows(small_model("bert"))
    whole = statistics(workload, batch=COUNT)
    monkeypatch.setattr(attention, "LIMIT", 100)  # one query at a time
    for batch in (1, 2):
        parts = statistics(workload, batch=batch)
        assert flat(parts["attention"]) == pytest.approx(flat(whole["attention"]), abs=1e-9)
        assert flat(parts["gradient_flow"]) == pytest.approx(flat(whole["gradient_flow"]), abs=1e-9)
        assert flat(parts["representation"]["layers"]) == pytest.approx(
            flat(whole["representation"]["layers"]), abs=1e-9
        )


def test_what_is_kept_does_not_grow_with_the_rows(small_model: Callable[[str], Any]) -> None:
    workload = with_rows(small_model("bert"), 12)
    kept: list[int] = []

    def count(done: int, total: int, note: str) -> None:
        gc.collect()
        kept.append(sum(x.numel() for x in gc.get_objects() if type(x) is torch.Tensor))

    statistics(workload, rows=12, batch=4, progress=count)
    assert len(kept) == 3
    assert max(kept[1:]) <= kept[0] * 1.01


def traces(module: nn.Module) -> list[Any]:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]
    return [*hooks, *((p.requires_grad, p.grad is None) for p in module.parameters()), module.training]


def test_the_module_is_left_as_it_was(small_model: Callable[[str], Any]) -> None:
    workload = with_rows(small_model("bert"))
    workload.module.bert.embeddings.requires_grad_(False)
    before = traces(workload.module)
    found = statistics(workload)
    assert traces(workload.module) == before
    assert all(entry["gradient_norm"] > 0 for entry in found["gradient_flow"]["layers"] if entry["kind"] == "embedding")
    poison(workload)
    with pytest.raises(InputError):
        statistics(workload)
    assert traces(workload.module) == before
    assert workload.module.config._attn_implementation == "sdpa"


def poison(workload: Any) -> int:
    """Make the first layer overflow for a token that one row alone has; returns that row."""
    rows = workload.data.calibration.inputs["input_ids"]
    row, token = next(
        (row, token)
        for row, tokens in enumerate(rows)
        for token in tokens
        if row and not any(token in other for place, other in enumerate(rows) if place != row)
    )
    with torch.no_grad():
        workload.module.bert.embeddings.word_embeddings.weight[token] = 1e308
        workload.module.bert.embeddings.position_embeddings.weight[:] = 1e308
    return int(row)


def test_an_activation_that_overflows_is_named(small_model: Callable[[str], Any]) -> None:
    workload = with_rows(small_model("bert"))
    row = poison(workload)
    message = rf"the activation that 'bert.embeddings.LayerNorm' reads is NaN or infinite for calibration row {row}"
    with pytest.raises(InputError, match=message):
        statistics(workload)


class Root(nn.Module):
    """Its gradient is infinite where its input is zero, and its output finite everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 3, bias=False), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.outer(self.inner(x).abs().sqrt())
        return logits


def test_a_gradient_that_is_infinite_is_named() -> None:
    workload = of_module(Root(), torch.ones(1, 2), "x")
    workload.data.calibration.inputs["x"][3][:] = 0
    with pytest.raises(
        InputError, match=r"the gradient of the activation of 'inner' is NaN or infinite for calibration row 3"
    ):
        statistics(workload)


def test_a_weight_that_is_not_finite_is_named(small_model: Callable[[str], Any]) -> None:
    workload = with_rows(small_model("vit"))
    with torch.no_grad():
        workload.module.classifier.bias[1] = float("nan")
    with pytest.raises(InputError, match=r"1 of 2 values of 'classifier.bias' are NaN or infinite"):
        statistics(workload)


def test_rows_are_needed(small_model: Callable[[str], Any]) -> None:
    with pytest.raises(InputError, match="bert has no calibration rows"):
        statistics(small_model("bert"))
