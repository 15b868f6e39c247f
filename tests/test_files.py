"""A folder is replaced in one step, and only where edgepress wrote it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from edgepress.errors import InputError, UsageError
from edgepress.files import check_new_folder, check_writable, new_folder

MANIFEST = json.dumps({"model_file": "model.onnx", "precision": "fp32"})


def fill(target: Path, text: str = "new") -> None:
    with new_folder(target) as place:
        (place / "edgepress.json").write_text(text)


def holds(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "before",
    [
        {},
        {"edgepress.json": "old", "model.safetensors": "old"},
        {"manifest.json": MANIFEST, "model.onnx": "old"},
        {"encoder/manifest.json": MANIFEST, "decoder/manifest.json": MANIFEST},
    ],
)
def test_what_edgepress_wrote_is_replaced(tmp_path: Path, before: dict[str, str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    _write(out, before)
    check_new_folder(out)
    fill(out)
    assert holds(tmp_path) == {"out/edgepress.json": "new"}


@pytest.mark.parametrize(
    "before",
    [
        {"thesis.tex": "years of work"},
        {"manifest.json": '{"name": "an app"}'},
        {"manifest.json": "["},
        {"config.json": "{}", "model.safetensors": "trained for a week"},
        {"recipe.yaml": "model: x", "stages/01/model.safetensors": "a run"},
        {"edgepress.json": "old", ".git/HEAD": "history"},
        {"encoder/manifest.json": MANIFEST, "notes/today.md": "mine"},
        {"encoder/manifest.json": MANIFEST, "today.md": "mine"},
    ],
)
def test_all_else_is_left_as_it_is(tmp_path: Path, before: dict[str, str]) -> None:
    out = tmp_path / "out"
    _write(out, before)
    with pytest.raises(UsageError, match=r"holds something else .* name another folder"):
        check_new_folder(out)
    with pytest.raises(UsageError, match="holds something else"):
        fill(out)
    assert holds(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_comes_meanwhile_is_left_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="holds something else"), new_folder(out) as place:
        (place / "edgepress.json").write_text("new")
        _write(out, {"thesis.tex": "years of work"})
    assert holds(tmp_path) == {"out/thesis.tex": "years of work"}


@pytest.mark.parametrize("word", [".", "..", "../here", "../../{parent}"])
def test_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    target = Path(word.format(parent=tmp_path.name))
    for attempt in (check_new_folder, fill):
        with pytest.raises(UsageError, match="current folder"):
            attempt(target)
    assert list(tmp_path.iterdir()) == [here]
    assert not list(here.iterdir())


def test_the_old_one_comes_back_where_the_new_one_cannot_be_put(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    with pytest.raises(InputError, match="cannot be written"), new_folder(out) as place:
        shutil.rmtree(place)
    assert holds(tmp_path) == {"out/edgepress.json": "old"}
    with pytest.raises(KeyboardInterrupt), new_folder(out) as place:
        (place / "edgepress.json").write_text("new")
        raise KeyboardInterrupt
    assert holds(tmp_path) == {"out/edgepress.json": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    fill(tmp_path / "first", "old")
    (tmp_path / "latest").symlink_to("first")
    fill(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert holds(tmp_path / "first") == {"edgepress.json": "new"}


def test_sources_that_would_go_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "model")
    (tmp_path / "model/rows.csv").write_text("text,label\n")
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    for sources in (("model",), ("./link",), ("zoo:any", "model/rows.csv")):
        with pytest.raises(UsageError, match="is read from there"):
            check_new_folder(Path("model"), *sources)
    check_new_folder(Path("model"), "zoo:any", None, "elsewhere")
    check_new_folder(Path("model/smaller"), "model")


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="is a file"):
        check_new_folder(tmp_path / "file")
    for word in ("file/out", "file/deep/out", "loop/out"):
        with pytest.raises(InputError, match=f"{word} cannot be written"):
            check_new_folder(tmp_path / word)
    with pytest.raises(InputError, match="file cannot be written"):
        check_writable(tmp_path / "file")
    with pytest.raises(UsageError, match="mount point"):
        check_new_folder(Path("/dev/shm"))  # noqa: S108 - looked at alone
    check_new_folder(tmp_path / "deep/er/out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
