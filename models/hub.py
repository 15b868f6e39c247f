"""Hub: the files of a model that is named like ``owner/name`` and is not a folder here."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError

FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.py")
"""What is asked for; code is fetched so that it can be seen and refused, and is never run."""
OLD_WEIGHTS = "*.bin"
"""Asked for only where there are no others."""


def is_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def download(name: str) -> Path:
    """The folder with the model's files, in the hub library's own cache.

    Raises InputError where they cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(FILES)))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*FILES, OLD_WEIGHTS]))
        return folder
    except (HfHubHTTPError, OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise InputError(
            f"There is no model folder '{name}', and as a hub id it cannot be downloaded: {why}"
        ) from error
