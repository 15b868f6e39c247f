"""ExecuTorch.

What    Writes an ExecuTorch program (``model.pte``) with dynamic batch and sequence, its products in XNNPACK's kernels.
When    Phones and small ARM devices, whose apps carry ExecuTorch's C++ runtime; runs here by its Python one.
Cost    A trace and a lowering of a minute or so, and three times the model's memory.
Source  docs.pytorch.org/executorch, "Model Export and Lowering", "XNNPACK Backend"
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import InputError, UnavailableError, UsageError
from ...files import new_folder
from ...models.dequantize import dequantized
from ...models.workload import Workload
from ...plan import QuantizationPlan
from .. import artifact as artifacts
from .. import parity, reference, traced
from ..artifact import Artifact

MODEL_FILE = "model.pte"
SCHEMES = ("fp32",)


def write(workload: Workload, plan: QuantizationPlan, folder: Path, *, name: str | None = None) -> Artifact:
    """Write ``workload`` as an ExecuTorch program, prove parity with its module, and seal the folder.

    What XNNPACK has no kernel for stays with ExecuTorch's portable ones; the manifest counts both. Raises
    UnavailableError where ExecuTorch is missing or cannot take the module, and ParityError; nothing is left behind
    then.
    """
    exir, xnnpack = _library("exir"), _library("backends.xnnpack.partition.xnnpack_partitioner")
    if plan.scheme not in SCHEMES:
        raise UsageError(f"The executorch runtime cannot write the scheme '{plan.scheme}' (it can: fp32).")
    with new_folder(folder) as place:
        program = traced.program(dequantized(workload, plan), "ExecuTorch")
        try:
            with _quiet():
                edge = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
                lowered = edge.to_executorch()
        except Exception as error:  # its passes raise whatever they meet
            raise traced.refusal(workload, error, "ExecuTorch") from error
        with (place / MODEL_FILE).open("wb") as stream:
            lowered.write_to_file(stream)
        operators = Counter(
            node.target.__name__ for node in edge.exported_program().graph.nodes if node.op == "call_function"
        )
        described = artifacts.describe(
            workload, plan, None, runtime="executorch", file=MODEL_FILE, name=name, base=None
        )
        tools = {tool: version(tool) for tool in ("torch", "executorch", "transformers")}
        manifest = described.model_copy(update={"operators": dict(sorted(operators.items())), "tools": tools})
        with open_session(Artifact(place, manifest), threads=torch.get_num_threads()) as opened:
            kept = reference.Recorder(opened.run)
            proof = parity.prove(workload, lambda feed: kept.run(feed)[0], precision=plan.scheme)
        kept.save(place)
        manifest = artifacts.seal_proven(place, manifest, proof, workload)
    return Artifact(folder, manifest)


def _library(name: str) -> Any:
    try:
        with _quiet():
            return import_module(f"executorch.{name}")
    except (ImportError, OSError) as error:
        raise UnavailableError("ExecuTorch is missing: pip install 'edgepress[executorch]' brings it.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Its import and its passes warn of what concerns its authors alone."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def open_session(artifact: Artifact, *, device: str = "cpu", threads: int = 1) -> Iterator[ExecuTorchSession]:
    """Open an artifact for running; ``threads`` is the size of XNNPACK's pool, which is the process's one."""
    if device != "cpu":
        raise UsageError(f"The executorch runtime runs on 'cpu', not on '{device}'.")
    runtime, library = _library("runtime"), _library("extension.pybindings.portable_lib")
    library._unsafe_reset_threadpool(threads)
    try:
        program = runtime.Runtime.get().load_program(artifact.model_file)
        method = program.load_method("forward")
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise InputError(f"ExecuTorch cannot load {artifact.model_file}: {why}") from error
    yield ExecuTorchSession(program, method, tuple(artifact.manifest.inputs))


class ExecuTorchSession:
    """A loaded program: ``run`` maps input arrays by name to the list of outputs."""

    def __init__(self, program: Any, method: Any, names: Sequence[str]) -> None:
        self._program, self._method, self._names = program, method, names  # a method needs its program alive

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        made = self._method.execute([torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in self._names])
        return [one.numpy().copy() for one in made]  # its memory is the next run's
