"""In which precision each operator of a written file is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import edgepress as ep
import pytest
from edgepress.errors import InputError
from edgepress.export import precision
from edgepress.export.artifact import Artifact
from edgepress.export.backends import onnx


@pytest.fixture(scope="module")
def original(workload: Any, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return ep.export(workload, tmp_path_factory.mktemp("original") / "fp32")


@pytest.mark.parametrize(
    ("scheme", "product", "table"),
    [("fp32", "fp32", "fp32"), ("int8-dynamic", "int8", "int8 weights"), ("int4", "int4 weights", "int8 weights"),
     ("fp16", "fp16 weights", "fp16")],
)  # fmt: skip
def test_every_operator_with_a_weight(
    workload: Any, original: Artifact, tmp_path: Path, scheme: str, product: str, table: str
) -> None:
    artifact = original
    if scheme != "fp32":
        artifact = onnx.write(workload, ep.quantize(workload, scheme), tmp_path / "a", base=original)
    found = precision.of(artifact)
    inside = [name for name in found if name.startswith("bert.encoder.layer.")]
    assert len(inside) == 3 * 6
    assert {found[name] for name in inside} == {product}
    assert found["bert.embeddings.word_embeddings"] == table
    assert {name for name in artifact.manifest.quantized if "LayerNorm" not in name} <= set(found)


def test_a_file_that_is_no_graph(original: Artifact, tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, original.manifest)
    artifact.model_file.write_bytes(b"\xff\xff\xff no graph")
    with pytest.raises(InputError, match="cannot be read as ONNX"):
        precision.of(artifact)
    other = replace(artifact, manifest=artifact.manifest.model_copy(update={"runtime": "openvino"}))
    assert precision.of(other) == {}
