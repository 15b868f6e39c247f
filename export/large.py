"""ONNX files of any size: a protobuf holds less than 2 GiB, so that large weights lie beside the graph.

They are in one file, ``NAME.data`` beside ``NAME.onnx``, which every runtime finds by itself and maps into memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

LARGEST = 1 << 30
"""Bytes of weights that stay in the graph's own file; half of what a protobuf holds, as passes add to a graph."""


def is_large(graph: onnx.ModelProto) -> bool:
    """Whether the weights are too large for the graph's own file. The graph itself is not measured: that would
    serialise it, which fails where it is large."""
    return sum(len(one.raw_data) for one in graph.graph.initializer) > LARGEST


def save(graph: onnx.ModelProto, path: Path) -> None:
    """Write ``graph``, with its weights beside it where they are large; then they are no longer in ``graph``."""
    if is_large(graph):
        beside = path.with_suffix(".data").name
        onnx.save(graph, path, save_as_external_data=True, location=beside, size_threshold=1024)
        shutil.copymode(path, path.with_name(beside))  # onnx keeps it to its owner
    else:
        onnx.save(graph, path)


def inferred(graph: onnx.ModelProto) -> ir.Model:
    """``graph`` with the types and shapes of what is in between; for that its weights are left out."""
    model = ir.from_proto(graph)
    passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    return model


@contextmanager
def readable(graph: onnx.ModelProto) -> Iterator[bytes | Path]:
    """What a library reads ``graph`` from: its bytes, or a file that is there as long as it is read."""
    if not is_large(graph):
        yield graph.SerializeToString()
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save(graph, path)
        yield path
