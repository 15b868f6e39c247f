"""OpenVINO IR is really compiled and run, and its runtime graph says which kernels do the work."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import onnx
import pytest
import torch
from edgepress.benchmarks import environment
from edgepress.compress.quantize.choice import tables
from edgepress.errors import InputError, UnavailableError, UsageError
from edgepress.export import pairs, parity
from edgepress.export.artifact import Artifact, open_artifact
from edgepress.export.backends import openvino as backend
from edgepress.models import surgery
from edgepress.models.dequantize import dequantized
from edgepress.plan import PruningPlan, QuantizationPlan, Unit

openvino = pytest.importorskip("openvino")

FLAGS = environment.fingerprint(1)["flags"]
EIGHT_BITS = {"i8", "u8", "I8", "U8"}


@pytest.fixture(scope="module")
def pruned(workload: Any) -> Any:
    units = [Unit("head", 0, 0), Unit("ffn", 1, 7), Unit("block", 2, 0), *(Unit("ffn", 0, i) for i in range(100))]
    return surgery.prune(workload, PruningPlan.of(units))


@pytest.fixture(scope="module")
def base(pruned: Any, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return ep.export(pruned, tmp_path_factory.mktemp("onnx") / "fp32")


@pytest.fixture(scope="module")
def plans(pruned: Any) -> dict[str, QuantizationPlan]:
    """Plans that leave the module's weights as they are, so that one export serves all; int8 is smoothed."""
    plain = ep.quantize(pruned, "int8", rows=16, smooth="none", correct_bias=False)
    halved = {name: (low / 2, high / 2) for name, (low, high) in plain.activations.items()}
    smooth = {name: torch.full((pruned.module.get_submodule(name).in_features,), 2.0) for name in halved}
    return {
        "fp32": QuantizationPlan("fp32"),
        "fp16": ep.quantize(pruned, "fp16"),
        "bf16": ep.quantize(pruned, "bf16"),
        "int8": replace(plain, activations=halved, smooth=smooth),
        "int8-weight": ep.quantize(pruned, "int8-weight"),
        "int4": ep.quantize(pruned, "int4", method="rtn", block=16),
    }


@pytest.fixture(scope="module")
def written(
    pruned: Any, base: Artifact, plans: dict[str, QuantizationPlan], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("openvino")
    return {scheme: backend.write(pruned, plan, folder / scheme, base=base) for scheme, plan in plans.items()}


def kernels(artifact: Artifact) -> dict[str, Any]:
    """What is known at run time of each layer, by its name."""
    with backend.open_session(artifact) as session:
        ids = np.ones((2, 16), np.int64)
        session.run({"input_ids": ids, "attention_mask": ids})
        return {
            node.get_friendly_name(): {key: node.get_rt_info()[key].value for key in ("layerType", "runtimePrecision")}
            for node in session.compiled.get_runtime_model().get_ordered_ops()
        }


@pytest.mark.parametrize("scheme", backend.SCHEMES)
def test_an_artifact_is_whole_and_proven(
    scheme: str, pruned: Any, base: Artifact, written: dict[str, Artifact]
) -> None:
    artifact = open_artifact(written[scheme].folder)
    manifest = artifact.manifest
    assert (manifest.runtime, manifest.model_file, manifest.precision) == ("openvino", "model.xml", scheme)
    assert {"model.xml", "model.bin", "tokenizer.json"} <= set(manifest.files)
    assert manifest.parity is not None
    assert manifest.parity.cosine > (0.98 if scheme == "int8" else 0.999)
    assert {(1, 1), (32, 64)} <= set(manifest.parity.shapes)
    assert manifest.tools["openvino"].startswith(openvino.__version__.split("-")[0])
    share = {"fp32": 1.1, "fp16": 0.75, "bf16": 0.75}.get(scheme, 0.6)
    assert artifact.size_bytes < share * base.size_bytes
    assert artifact.size_bytes == sum((artifact.folder / f"model.{end}").stat().st_size for end in ("xml", "bin"))


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (1, 64), (5, 13), (32, 64)])
def test_any_declared_shape_and_mask(pruned: Any, written: dict[str, Artifact], batch: int, sequence: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    mask = (torch.rand(batch, sequence, generator=generator) < 0.7).long()
    mask[:, 0] = 1
    inputs = {
        "input_ids": torch.randint(5, 2000, (batch, sequence), generator=generator),
        "attention_mask": mask,
    }
    with torch.inference_mode():
        wanted = pruned.forward(inputs).numpy()
    with backend.open_session(written["fp32"]) as session:
        (got,) = session.run({name: tensor.numpy() for name, tensor in inputs.items()})
    np.testing.assert_allclose(got, wanted, atol=1e-4)


def test_every_planned_product_runs_in_eight_bits(
    written: dict[str, Artifact], plans: dict[str, QuantizationPlan]
) -> None:
    found = kernels(written["int8"])
    products = list(plans["int8"].activations)
    assert len(products) == 12  # two blocks of six
    for name in products:
        layers = [facts for layer, facts in found.items() if layer.startswith(f"{name}/MatMul")]
        full = [facts for facts in layers if facts["layerType"] == "FullyConnected"]
        assert [facts["runtimePrecision"] in EIGHT_BITS for facts in full] == [True], (name, layers)


@pytest.mark.parametrize(("scheme", "kind"), [("int8-weight", "u8"), ("int4", "u4")])
def test_weights_in_blocks_stay_compressed_and_inputs_are_floats(
    scheme: str, kind: str, pruned: Any, written: dict[str, Artifact], plans: dict[str, QuantizationPlan]
) -> None:
    """The kernels read the codes, and compute what they stand for to float32's last digits: nothing else is rounded."""
    found, large = kernels(written[scheme]), tables(pruned)
    products = [name for name in plans[scheme].codes if name not in large]
    assert len(products) == 12  # two blocks of six
    assert sum(pruned.module.get_submodule(name).in_features % 16 > 0 for name in products) == 2
    for name in products:
        layers = [facts for layer, facts in found.items() if layer.startswith(f"{name}/")]  # named after the bias
        assert [facts["runtimePrecision"] for facts in layers if facts["layerType"] == "FullyConnected"] == [kind], name
    assert large
    looked_up = [facts["runtimePrecision"] for facts in found.values() if facts["layerType"] == "Gather"]
    assert len([one for one in looked_up if one in EIGHT_BITS]) == len(large)
    ids = np.random.default_rng(0).integers(5, 2000, (3, 17))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with torch.inference_mode():
        stands_for = dequantized(pruned, plans[scheme]).forward({n: torch.from_numpy(a) for n, a in feeds.items()})
    with backend.open_session(written[scheme]) as session:
        np.testing.assert_allclose(session.run(feeds)[0], stands_for.numpy(), atol=1e-4)


def test_scores_of_attention_are_computed_in_eight_bits(
    written: dict[str, Artifact], plans: dict[str, QuantizationPlan]
) -> None:
    assert len(plans["int8"].outputs) == 6  # queries, keys and values of two blocks
    found = kernels(written["int8"])
    attention = {
        name: facts["runtimePrecision"]
        for name, facts in found.items()
        if facts["layerType"] in {"Subgraph", "MatMul"} and ".attention.self/" in name
    }
    assert len(attention) >= 2
    assert set(attention.values()) <= EIGHT_BITS, attention


def test_what_attention_puts_out_is_rounded_by_no_kernel_of_its_own(
    pruned: Any, base: Artifact, plans: dict[str, QuantizationPlan], tmp_path: Path
) -> None:
    """Whether its channels are smoothed or not; and the transpose before it moves floats, of which it is quicker."""
    plain = backend.write(pruned, replace(plans["int8"], smooth={}), tmp_path / "plain", base=base)
    found = {name: facts["layerType"] for name, facts in kernels(plain).items()}
    assert "FakeQuantize" not in {kind for name, kind in found.items() if ".attention.output." in name}, found
    moved = [facts for name, facts in kernels(plain).items() if facts["layerType"] == "Transpose" and ".self/" in name]
    narrow = [facts for facts in moved if facts["runtimePrecision"] in EIGHT_BITS]
    assert len(moved) == 4 and len(narrow) == 2, moved  # of the keys in 8 bits, of what comes out in floats


def test_floats_are_computed_in_what_the_scheme_says(written: dict[str, Artifact]) -> None:
    for scheme in ("fp32", "fp16"):
        assert "bf16" not in {facts["runtimePrecision"] for facts in kernels(written[scheme]).values()}
    narrow = {f["runtimePrecision"] for f in kernels(written["bf16"]).values() if f["layerType"] == "FullyConnected"}
    assert ("bf16" in narrow) == ("avx512_bf16" in FLAGS or "amx_bf16" in FLAGS)


def names(graph: onnx.ModelProto) -> set[str]:
    return {node.name for node in graph.graph.node if node.op_type == "QuantizeLinear"}


def test_attention_stays_in_float_where_a_range_is_not_known(
    base: Artifact, plans: dict[str, QuantizationPlan]
) -> None:
    graph, plan = onnx.load(base.model_file), replace(plans["int8"], state={})
    without = {name: span for name, span in plan.outputs.items() if not name.endswith("key")}
    every, some, none = (
        names(pairs.place(graph, replace(plan, outputs=outputs))) for outputs in (plan.outputs, without, {})
    )
    assert len(every) == len(none) + 4  # queries and keys of two blocks
    assert some == none


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"bert.encoder.layer.7.output": "int8"}}, r"layer\.7.*not a product or a table"),
        ({"activations": {}}, "cannot be quantized over the range"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(
    change: dict[str, Any],
    message: str,
    pruned: Any,
    base: Artifact,
    plans: dict[str, QuantizationPlan],
    tmp_path: Path,
) -> None:
    plan = replace(plans["int8"], state={}, **change)
    with pytest.raises(InputError, match=message):
        backend.write(pruned, plan, tmp_path / "x", base=base)
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_refused_and_leaves_nothing(
    workload: Any, base: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(parity.ParityError, match="at most"):
        backend.write(workload, QuantizationPlan("fp32"), tmp_path / "wrong", base=base)
    assert not list(tmp_path.iterdir())


def test_wrong_use_is_one_sentence(
    pruned: Any, base: Artifact, written: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp32 = QuantizationPlan("fp32")
    with pytest.raises(UsageError, match="cannot write the scheme 'fp8'"):
        backend.write(pruned, QuantizationPlan("fp8"), tmp_path / "x")
    with pytest.raises(UsageError, match="is int8 for openvino"):
        backend.write(pruned, fp32, tmp_path / "x", base=written["int8"])
    with pytest.raises(UsageError, match="runs on 'cpu'"), backend.open_session(written["fp32"], device="cuda"):
        pass
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "model.xml").write_text("<net/>", encoding="utf-8")
    with (
        pytest.raises(InputError, match="OpenVINO cannot load"),
        backend.open_session(Artifact(damaged, written["fp32"].manifest)),
    ):
        pass
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UnavailableError, match=r"OpenVINO is missing: pip install 'edgepress\[openvino\]'"):
        backend.write(pruned, fp32, tmp_path / "x", base=base)
    assert list(tmp_path.iterdir()) == [damaged]
