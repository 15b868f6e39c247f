"""The main job as a function."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import recipe as recipes
from .pipeline import Outcome
from .pipeline import compress as run
from .stages import Display


def compress(
    model: str,
    data: str | None = None,
    *,
    out: str | Path = "runs/compress",
    resume: bool = False,
    display: Display | None = None,
    **options: Any,
) -> Outcome:
    """Compress ``model`` into the run folder ``out``; ``options`` are the fields of a recipe.

    ``edgepress.compress("zoo:minilm-reviews", target="cpu:2", limits={"max_drop": 1.0}, out="runs/demo")``. Raises
    UsageError for an option that does not exist. A result that misses the constraint is returned with ``unmet`` filled.
    """
    values: Mapping[str, Any] = {"model": model, "data": data, **options}
    return run(recipes.from_mapping(values, "The call"), Path(out), resume=resume, display=display)
