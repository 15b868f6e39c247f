"""The package as others get it: what the wheel holds, and that it works from there."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import edgepress as ep
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as a release is: the source distribution first, the wheel from it."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--outdir", out, ROOT], check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"edgepress", f"edgepress-{ep.__version__}.dist-info"}
    inside = {name.removeprefix("edgepress/") for name in names if name.startswith("edgepress/")}
    wanted = {"py.typed", "cli/prune.py", "benchmarks/report.html", "benchmarks/runner.py", "models/zoo/fetch.py"}
    wanted |= {"benchmarks/runtimes/onnx.py", "benchmarks/runtimes/torch.py"}
    assert wanted <= inside
    assert not [name for name in inside if name.startswith(("tests", "benchmarks/peers", "benchmarks/results", "docs"))]


@pytest.mark.chain
def test_it_compresses_from_the_wheel(
    wheel: Path, model_folder: Path, reviews_csv: Path, small_recipe: Path, tmp_path: Path
) -> None:
    """A new environment, empty but for what the wheel asks for."""
    folder = tmp_path / "env"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run(install, check=True, capture_output=True)

    def run(*args: Any) -> str:
        command = [python, *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert Path(run("-c", "import edgepress; print(edgepress.__file__)").strip()).is_relative_to(folder)
    assert "compress" in run("-m", "edgepress", "--help")
    data = ("--data", reviews_csv, "--columns", "text=review,label=stars")
    shown = run("-m", "edgepress", "compress", model_folder, *data, "--recipe", small_recipe, "-o", "run", "--json")
    assert json.loads(shown)["original"]["name"] == "original fp32"
    assert (tmp_path / "run/report.html").is_file()


def test_imports_go_one_way() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--config", ROOT / "pyproject.toml"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_verbs_are_functions_and_the_packages_still_packages() -> None:
    import edgepress.compress.score as module
    import edgepress.export.artifact

    assert all(callable(getattr(ep, verb)) for verb in ep.__all__)
    assert module.METHODS
    assert edgepress.export.artifact.Artifact
    with pytest.raises(AttributeError, match="nothing"):
        _ = ep.nothing
