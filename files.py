"""Writing files so that a reader never sees half of one: a temporary name beside the target, then a rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InputError, UsageError


@contextmanager
def new_folder(target: Path, *, ours: bool = False) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` if the block ends well and is deleted if not.

    A ``target`` that exists is replaced: set aside until the new one is in its place, so that whoever kills this finds
    the one or the other. Raises UsageError where it is not edgepress's to replace, as :func:`check_new_folder` says,
    unless it is ``ours`` whatever lies there, in a cache or a run; InputError where the place cannot be written or the
    disk is full.
    """
    temporary = None
    try:
        place = target.resolve()
        if not ours:
            _check_replaced(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        temporary.chmod(0o755)
        yield temporary
        if not ours:
            _check_replaced(target)  # much can have been put there meanwhile
        _put(temporary, place)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _put(made: Path, place: Path) -> None:
    """Rename ``made`` to ``place``, and remove what was there."""
    if not place.exists():
        made.rename(place)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    place.rename(old)
    try:
        made.rename(place)
    except BaseException:
        old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_new_folder(target: Path, *sources: str | None) -> None:
    """Refuse, before any work, a ``target`` that :func:`new_folder` would not replace.

    Raises UsageError where it is a file, a mount point, the current folder or one around it, a folder with something
    else than a model or an artifact that edgepress wrote, or one that holds a file or folder of ``sources``;
    InputError where no folder can be made there.
    """
    try:
        place = target.resolve()
        for source in map(Path, filter(None, sources)):
            read = source.resolve()
            if source.exists() and (read == place or place in read.parents):
                raise UsageError(f"{target} would be replaced, and {source} is read from there; name another folder.")
        _check_replaced(target)
    except (OSError, RuntimeError) as error:  # a loop of links is the second
        raise InputError(f"{target} cannot be written: {error}.") from error
    check_writable(place.parent, target)


def _check_replaced(target: Path) -> None:
    place = target.resolve()
    if not place.exists():
        return
    here = Path.cwd().resolve()
    if not place.is_dir():
        why = "is a file"
    elif place == here or place in here.parents:
        why = "would be replaced, and is the current folder or one around it"
    elif place.is_mount():
        why = "would be replaced, and is a mount point"
    elif not _written(place):
        why = "would be replaced, and holds something else than a model or an artifact of edgepress"
    else:
        return
    raise UsageError(f"{target} {why}; name another folder.")


def _written(folder: Path) -> bool:
    """Whether ``folder`` is empty, or is a checkpoint or an artifact, or artifacts that are parts of one model."""
    inside = list(folder.iterdir())
    if _is_ours(folder):
        return not any(path.is_dir() for path in inside)
    return all(path.is_dir() and _is_ours(path) for path in inside)


def _is_ours(folder: Path) -> bool:
    """Whether the folder has what edgepress alone writes: ``edgepress.json``, or its kind of ``manifest.json``."""
    if (folder / "edgepress.json").is_file():
        return True
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and {"model_file", "precision"} <= manifest.keys()


def check_writable(folder: Path, target: Path | None = None) -> None:
    """Raise InputError where nothing can be written in ``folder``, for the sake of ``target``, once it is made."""
    found = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    try:
        Path(tempfile.mkdtemp(prefix=".edgepress-", dir=found)).rmdir()
    except OSError as error:
        raise InputError(f"{target or folder} cannot be written: {error.strerror or error}.") from error


def write_text(target: Path, text: str) -> None:
    """Write ``text`` to ``target`` in one step."""
    write_bytes(target, text.encode("utf-8"))


def write_bytes(target: Path, content: bytes) -> None:
    """Write ``content`` to ``target`` in one step."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
            Path(name).chmod(0o644)
            Path(name).replace(target)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror or error}.") from error


def sha256(path: Path) -> str:
    """The hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
