"""Weights in half precision: a file of half the size, computed in float32; what does not fit is refused by name."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgepress as ep
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from edgepress.compress.quantize import bf16, fp16
from edgepress.errors import InputError, UsageError
from edgepress.export import parity
from edgepress.export.backends.onnx import open_session
from edgepress.models.data import Data


@pytest.mark.parametrize(("scheme", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_the_file_is_half_and_computes_with_rounded_weights(
    workload: Any, tmp_path: Path, scheme: str, dtype: torch.dtype
) -> None:
    whole = ep.export(workload, tmp_path / "fp32")
    half = ep.export(workload, tmp_path / scheme, ep.quantize(workload, scheme))
    assert half.size_bytes - 0.5 * whole.size_bytes < 0.06 * whole.size_bytes  # the graph itself stays as it is
    rounded = copy.deepcopy(workload.module)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(dtype).float())
    feeds = parity.feeds(workload, {"batch": 3, "sequence": 20})
    inputs = {name: torch.from_numpy(array) for name, array in feeds.items()}
    with open_session(half) as session, torch.inference_mode():
        np.testing.assert_allclose(session.run(feeds)[0], rounded(**inputs).logits.numpy(), atol=1e-4)
    graph = onnx.load(half.model_file).graph
    kinds = {one.type.tensor_type.elem_type for one in (*graph.input, *graph.output)}
    assert kinds <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


def test_a_runtime_folds_the_casts(workload: Any, tmp_path: Path) -> None:
    half = ep.export(workload, tmp_path / "fp16", ep.quantize(workload, "fp16"))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(half.model_file, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    constants = {one.name: one.data_type for one in graph.initializer}
    assert not [node.name for node in graph.node if node.op_type == "Cast" and node.input[0] in constants]
    read = [constants[node.input[0]] for node in graph.node if node.op_type == "Gather" and node.input[0] in constants]
    assert onnx.TensorProto.FLOAT16 in read  # tables stay as they are, and what is looked up is cast


def test_what_is_beyond_the_range_is_refused_by_name(with_range: Any) -> None:
    large = with_range(1e5)
    with pytest.raises(InputError, match=r"'classifier\.bias' is 1e\+05, which fp16 cannot hold"):
        fp16.quantize(large)
    assert bf16.quantize(large).weights["classifier"] == "bf16"
    fits = with_range(60000.0)
    fp16.quantize(fits)  # each weight does, and so does the file: it is computed in float32
    with torch.no_grad():
        fits.module.classifier.weight.fill_(3e4)
    with pytest.raises(InputError, match="largest output of 'classifier'"):
        fp16.quantize(fits, compute=True)


@pytest.fixture
def with_range(workload: Any) -> Any:
    """Makes a copy of the workload with a bias of that size in its classifier."""

    def make(largest: float) -> Any:
        module = copy.deepcopy(workload.module)
        with torch.no_grad():
            module.classifier.bias[0] = largest
        return replace(workload, module=module)

    return make


def test_activations_are_not_known_without_rows(workload: Any) -> None:
    with pytest.raises(UsageError, match="give --data"):
        fp16.quantize(replace(workload, data=Data.empty()), compute=True)
