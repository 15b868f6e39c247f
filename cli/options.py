"""The arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError

Model = Annotated[
    str, typer.Argument(help="zoo:NAME, a Hugging Face folder or hub id, a checkpoint, package.module:function.")
]
Data = Annotated[
    str | None,
    typer.Option("--data", help="Rows: a CSV, TSV, JSONL, Parquet or .npz file, a folder, package.module:function."),
]
Columns = Annotated[
    str | None,
    typer.Option("--columns", help="Column names: text=review,label=stars; label=- for rows without labels."),
]
MetricOption = Annotated[
    str | None, typer.Option("--metric", help="What quality is: accuracy, f1, …, or package.module:function.")
]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Folder to write.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout and nothing else there.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show the traceback of an error.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.", min=0)]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that the model's folder brings; refused otherwise.")
]
WHERE = "cpu, cpu:N for N threads, cpu:openvino:N, or ssh://user@host/cpu:N for a device."
ALSO = "Also cuda, tensorrt, torch, torch:compile: 'edgepress targets' lists all. More than once for several."
TargetsOption = Annotated[list[str] | None, typer.Option("--target", help=f"{WHERE} {ALSO}")]


def check_of(other: str, **given: object) -> None:
    """Refuse the first of the options ``given`` that has a value: it would be passed over, for it is of ``other``."""
    for name, value in given.items():
        if value not in (None, False):
            raise UsageError(f"--{name.replace('_', '-')} is of {other}; give both.")
