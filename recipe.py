"""Recipe: everything that a compression run is asked to do, typed; YAML on disk.

Method options are checked against the keyword-only arguments of the method itself, so that there is one place where an
option is declared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .compress.recover import Precision
from .compress.recover.losses import DEFAULT, Term
from .errors import InputError, UsageError
from .gate import Constraint
from .models.sources import FIELDS


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(_Strict):
    """The constraint as it stands in a recipe."""

    max_drop: float = Field(default=1.0, ge=0)
    max_latency_ms: float | None = Field(default=None, gt=0)
    min_speedup: float | None = Field(default=None, gt=0)
    max_size_bytes: int | None = Field(default=None, gt=0)

    def constraint(self) -> Constraint:
        return Constraint(**self.model_dump())


class Score(_Strict):
    method: str = "masked_taylor"
    rows: int = Field(default=256, ge=1)

    @field_validator("method")
    @classmethod
    def _with_underscores(cls, name: str) -> str:
        return name.replace("-", "_")


class Level(_Strict):
    """How much of each kind of unit goes, or how much faster what is left is to be."""

    speedup: float | None = Field(default=None, gt=1)
    """Against the original in the precision that is deployed, as measured; which units go is found by latency."""

    head: float = Field(default=0.0, ge=0, lt=1)
    kv: float = Field(default=0.0, ge=0, lt=1)
    cross_head: float = Field(default=0.0, ge=0, lt=1)
    ffn: float = Field(default=0.0, ge=0, lt=1)
    block: float = Field(default=0.0, ge=0, lt=1)
    channel: float = Field(default=0.0, ge=0, lt=1)
    hidden: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _of_one_sort(self) -> Level:
        if self.speedup and len(self.model_dump(exclude_defaults=True)) > 1:
            raise ValueError("a level is a speedup or shares of units, not both")
        return self

    def shares(self, kinds: Sequence[str]) -> dict[str, float]:
        """What goes of the kinds that a model has; where heads are grouped, groups take the place of heads."""
        shares = {kind: share for kind, share in self.model_dump(exclude={"speedup"}).items() if share > 0}
        if "kv" in kinds and "head" in shares and "kv" not in shares:
            shares["kv"] = shares.pop("head")
        return {kind: share for kind, share in shares.items() if kind in kinds}


class Recover(_Strict):
    reconstruct: bool = True
    """Re-solve what is left by least squares, before any training."""
    steps: int = Field(default=160, ge=0)
    """Steps of distillation from the original; 0 for none."""
    batch: int = Field(default=32, ge=1)
    lr: float = Field(default=5e-4, gt=0)
    losses: tuple[Term, ...] = Field(default=DEFAULT, min_length=1)
    """What is distilled."""
    temperature: float = Field(default=2.0, gt=0)
    rank: int = Field(default=0, ge=0)
    """Of low-rank adapters, which alone are trained; 0 trains all weights."""
    precision: Precision = "auto"
    evaluate_every: int = Field(default=0, ge=0)
    """Steps after which training rows that were held out are judged, to keep the best weights; 0 for never."""
    patience: int = Field(default=0, ge=0)
    """Judgements without better weights after which training ends; 0 for never."""


SCHEMES = {"onnx": ("int8", "int8-dynamic"), "openvino": ("int8", "bf16")}


class Quantize(_Strict):
    scheme: str = "auto"
    """Of the weights and activations; ``auto`` takes the fastest of the runtime's ``SCHEMES`` within the drop."""
    mixed: bool = True
    """Leave in float the fewest operators that keep within the drop, where all of them quantized lose too much."""

    steps: int = Field(default=0, ge=0)
    """Steps of distillation with rounding in the loop, before that, of INT8 that loses too much; 0 for none."""
    rotate: bool = False
    """Mix channels first, by Hadamard matrices that the weights hold."""

    def tried(self, runtime: str) -> tuple[str, ...]:
        return SCHEMES[runtime] if self.scheme == "auto" else (self.scheme,)


class Measure(_Strict):
    """How the final comparison is measured; p99 is given from 1,000 queries on."""

    batch: int = Field(default=1, ge=1)
    sequence: int = Field(default=128, ge=1)
    min_queries: int = Field(default=1000, ge=30)
    min_seconds: float = Field(default=10.0, ge=0, lt=1e9)


class Recipe(_Strict):
    """One compression run."""

    model: str
    data: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    metric: str | None = None
    """What quality is, where it is not the data's own metric."""
    target: str = "cpu"
    seed: int = 0
    max_length: int = Field(default=128, ge=1)
    trust_remote_code: bool = False
    limits: Limits = Limits()
    score: Score = Score()
    levels: tuple[Level, ...] | None = None
    """Tried until one meets the constraint: the strongest first, or, where a speed is asked for, the gentlest first.
    None leaves them to the constraint."""
    recover: Recover = Recover()
    quantize: Quantize | None = Quantize()
    measure: Measure = Measure()

    def to_yaml(self) -> str:
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
        return text


def from_mapping(values: Mapping[str, Any], origin: str) -> Recipe:
    """A validated recipe; all of its errors are gathered into one UsageError."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        faults = [f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()]
        raise UsageError(f"{origin} is not a valid recipe: {'; '.join(faults)}.") from error


def read(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file, not yet validated; the command line lays its own options over it."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, IndexError, RecursionError, yaml.YAMLError) as error:  # PyYAML's own scalars raise any
        raise InputError(f"The recipe {path} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise InputError(f"The recipe {path} does not hold a mapping of options.")
    return values


Quantity = Literal["drop", "latency", "speedup", "size"]

_UNITS: dict[Quantity, tuple[dict[str, float], str]] = {
    "drop": ({"%": 1.0, "": 1.0, "pt": 1.0, "points": 1.0}, "1% or 0.5"),
    "latency": ({"ms": 1.0, "us": 1e-3, "s": 1e3}, "5ms"),
    "speedup": ({"x": 1.0, "": 1.0}, "2x"),
    "size": ({"mb": 1e6, "kb": 1e3, "gb": 1e9, "mib": 2.0**20, "b": 1.0}, "10MB"),
}


def quantity(kind: Quantity, text: str) -> float:
    """A number with its unit, as on the command line: ``1%`` is one point of 100, ``5ms``, ``2x``, ``10MB``.

    Raises UsageError that shows the expected form.
    """
    units, example = _UNITS[kind]
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z%]*)\s*", text)
    if match is None or match[2].lower() not in units:
        raise UsageError(f"'{text}' is not a {kind}; write it like {example}.")
    return float(match[1]) * units[match[2].lower()]


def columns(text: str) -> dict[str, str]:
    """``text=sentence,label=y`` as a mapping."""
    pairs = [part.split("=", 1) for part in text.split(",") if part]
    if not pairs or any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise UsageError(f"'{text}' is not a column mapping; write it like text=sentence,label=y.")
    mapping = {name.strip(): column.strip() for name, column in pairs}
    unknown = sorted(set(mapping) - set(FIELDS))
    if unknown:
        raise UsageError(f"There is no field '{unknown[0]}' to map a column to (there are: {', '.join(FIELDS)}).")
    return mapping
