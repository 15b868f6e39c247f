"""The README is true: its commands and its code run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.chain

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(model_folder: Path, reviews_csv: Path, tmp_path: Path) -> Path:
    """A folder that has the reader's model, rows and grid."""
    (grid,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "grid.yaml").write_text(grid, encoding="utf-8")
    (tmp_path / "my-model").symlink_to(model_folder)
    (tmp_path / "reviews.csv").symlink_to(reviews_csv)
    return tmp_path


def test_the_python_of_the_readme_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - our own README
    assert names["rows"][1]["speedup"]["value"] > 0


def commands() -> list[str]:
    """Every edgepress command of the README's shell blocks, in order."""
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("edgepress ")]


@pytest.mark.timeout(1800)  # every command of the README, one after the other
@pytest.mark.parametrize("short", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_commands_of_the_readme_run(here: Any, small_recipe: Path, folder: Path, short: bool) -> None:
    """In order, in a folder that has the reader's model and rows.

    Only what takes minutes is made ``short``: the reader's model stands for the zoo's, and ``compress`` is given a
    small recipe.
    """
    found = commands()
    assert len(found) >= 11
    from edgepress.cli import app

    assert {shlex.split(line)[1] for line in found} == {
        command.callback.__name__ for command in app.registered_commands
    }
    for line in found:
        words = shlex.split(line)[1:]
        if short and "zoo:minilm-reviews" in words:
            words = [word.replace("zoo:minilm-reviews", "my-model") for word in words]
            words += ["--data", "reviews.csv", "--columns", "text=review,label=stars"]
        if short and words[0] == "compress" and "--resume" not in words:
            words += ["--recipe", str(small_recipe)]
        done = here(*words, cwd=folder)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_the_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE))
    assert {"demo", "test"} <= named
    assert all(f"\n{name}:" in makefile for name in named)
