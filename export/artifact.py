"""Artifact: a folder with a deployable file and the manifest that says what it is and proves that it is whole."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from ..errors import InputError
from ..files import sha256
from ..plan import QuantizationPlan, read_json

if TYPE_CHECKING:
    from onnx import ModelProto

    from ..models.workload import Workload

MANIFEST = "manifest.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


MOST_NUMBERS = 1 << 32
"""What an input of one row can hold at most."""


class Axis(_Strict):
    """A dynamic axis with the range in which parity was proven."""

    name: str
    min: int = Field(ge=0)
    max: int = Field(ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> Axis:
        if self.min > self.max:
            raise ValueError(f"the range of {self.name} ends at {self.max} and begins at {self.min}")
        return self


class Input(_Strict):
    dtype: Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    shape: tuple[NonNegativeInt, ...]
    """Of one row; the size of a dynamic axis is an example."""
    axes: dict[str, Axis]
    """The dynamic axes, by their position."""
    below: int = 0
    """Whole numbers from 0 up to here, and not further, are what the model knows."""

    @model_validator(mode="after")
    def _possible(self) -> Input:
        if math.prod(self.shape) > MOST_NUMBERS:
            raise ValueError(f"a row of shape {list(self.shape)} is no input")
        for place in self.axes:
            if place not in {str(axis) for axis in range(len(self.shape))}:
                raise ValueError(f"there is no axis '{place}' in the shape {list(self.shape)}")
        return self


class Session(_Strict):
    """What a runtime must be told to run the file as it was measured."""

    disabled_optimizers: tuple[str, ...] = ()
    inference_precision: str | None = None
    """What OpenVINO computes floats in, "f32" or "bf16"; its own choice where nothing is said."""
    dynamic_quantization: int | None = None
    """How many inputs of a product with weights of few bits OpenVINO rounds to 8 bits together; 0 for none."""


class Engine(_Strict):
    """What a TensorRT engine was built by and for, and what its layers turned out to be."""

    library: str
    version: str
    capability: str
    """Such as "sm89"; "sm80+" for any GPU from there up."""
    stripped: bool = False
    """Whether its weights are in the source graph alone."""
    layers: int
    attention: int
    """Layers that hold an attention's products and softmax in one kernel."""
    products: dict[str, int]
    """How many products with a weight are computed in each precision, as the list of layers says."""
    sparse: int = 0
    """How many of them have 2:4 weights that the builder was told to look for."""


class Parity(_Strict):
    """Artifact against reference, over the shapes that were tried: the worst figure of each.

    A shape is that of the first input, and after it the length of the past where there is one.
    """

    reference: str
    max_abs: float
    max_rel: float
    cosine: float
    shapes: tuple[tuple[int, ...], ...]


class Manifest(_Strict):
    format: int = Field(default=1, ge=1, le=1)
    name: str
    runtime: str
    model_file: str
    precision: str
    files: dict[str, str]
    inputs: dict[str, Input]
    outputs: tuple[str, ...]
    labels: tuple[str, ...] = ()
    architecture: str = ""
    """The model class of transformers, or the function, that the module is of: with ``config.json``, which lies beside,
    it tells what the answers are. Empty in artifacts written before it was kept."""
    session: Session = Session()
    engine: Engine | None = None
    opset: int | None = None
    """Of an ONNX file: the version of the standard operators."""
    operators: dict[str, int]
    quantized: dict[str, str] = {}
    """Node name to weight type, for what does not stay in float."""
    params: int
    macs: int
    parity: Parity | None
    parent: str | None = None
    """sha256 of the model file that this one was made from."""
    tools: dict[str, str]


@dataclass(frozen=True)
class Artifact:
    folder: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def precision(self) -> str:
        return self.manifest.precision

    @property
    def model_file(self) -> Path:
        return self.folder / self.manifest.model_file

    @property
    def needed(self) -> tuple[str, ...]:
        """The files a device must hold to run the model: the graph and its data, not the tokenizer."""
        stem = Path(self.manifest.model_file).stem
        return tuple(name for name in self.manifest.files if Path(name).stem == stem)

    @property
    def size_bytes(self) -> int:
        """Bytes of the files that are needed."""
        return sum((self.folder / name).stat().st_size for name in self.needed)


def seal(folder: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Manifest:
    """Write ``files`` and the manifest, with the checksum of everything in ``folder``; the last step of a write."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sums = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    sealed = manifest.model_copy(update={"files": sums})
    (folder / MANIFEST).write_text(json.dumps(sealed.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")
    return sealed


def describe(
    workload: Workload,
    plan: QuantizationPlan,
    graph: ModelProto | None,
    *,
    runtime: str,
    file: str,
    name: str | None,
    base: Artifact | None,
) -> Manifest:
    """The manifest of ``workload`` in the precision of ``plan``, computed as ``graph`` says, before it is proven.

    Without a graph its operators are for the caller to fill in, and the one output is the answer.
    """
    nodes, outputs = (graph.graph.node, graph.graph.output) if graph else ((), ())
    return Manifest(
        name=name or workload.name,
        runtime=runtime,
        model_file=file,
        precision=plan.scheme,
        files={},
        inputs=inputs_of(workload),
        outputs=tuple(output.name for output in outputs) or ("logits",),
        labels=workload.skeleton.labels,
        architecture=workload.skeleton.architecture,
        operators=dict(sorted(Counter(node.op_type for node in nodes).items())),
        quantized=dict(plan.weights),
        params=workload.params,
        macs=workload.macs,
        parity=None,
        parent=sha256(base.model_file) if base is not None else None,
        tools={},
    )


def inputs_of(workload: Workload) -> dict[str, Input]:
    """What a manifest says of the inputs of ``workload``."""
    made = {}
    for name, axes in workload.input_axes.items():
        tensor = workload.example[name]
        below = 0
        if not tensor.is_floating_point():
            known = workload.skeleton.config.get("vocab_size") if name.endswith("input_ids") else None
            below = known if isinstance(known, int) else int(tensor.max()) + 1
        made[name] = Input(
            dtype=str(tensor.dtype).removeprefix("torch."),  # type: ignore[arg-type]  # pydantic checks it
            shape=tuple(tensor.shape),
            axes={str(place): Axis(name=a.name, min=a.min, max=a.max) for place, a in axes.items()},
            below=below,
        )
    return made


def seal_proven(folder: Path, manifest: Manifest, proof: Parity, workload: Workload) -> Manifest:
    """Seal with the proof, the configuration, and the files that came with the workload, but for code."""
    files = {name: content for name, content in workload.files.items() if not name.endswith(".py")}
    if not workload.skeleton.is_function:
        files["config.json"] = (json.dumps(dict(workload.skeleton.config), indent=2) + "\n").encode()
    return seal(folder, manifest.model_copy(update={"parity": proof}), files)


def open_artifact(folder: Path) -> Artifact:
    """The artifact in ``folder``, every file checked against its sha256. Raises InputError where one differs."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no artifact folder '{folder}'.")
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} is not an artifact: it has no {MANIFEST}.")
    try:
        manifest = Manifest.model_validate(read_json(folder / MANIFEST))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{folder / MANIFEST} is not valid at '{where}': {first['msg']}.") from error
    stem = Path(manifest.model_file).stem  # runtimes look for a model's data beside it, under its name
    beside = {path.name for path in folder.iterdir() if path.stem == stem}
    for name in sorted({manifest.model_file, *beside} - manifest.files.keys()):
        raise InputError(f"{folder / MANIFEST} gives no checksum for '{name}'.")
    for name, expected in manifest.files.items():
        if PurePosixPath(name).name != name or name in {"", ".", ".."}:
            raise InputError(f"{folder / MANIFEST} names the file '{name}', which is not a plain file name.")
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise InputError(f"{folder} lacks the file '{name}' that its manifest names.")
        found = sha256(path)
        if found != expected:
            raise InputError(f"{path} is damaged: its sha256 is {found[:12]}…, the manifest says {expected[:12]}….")
    return Artifact(folder, manifest)
