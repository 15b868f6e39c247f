"""An environment of its own for each peer: a folder of Python with the tool, and the runtimes that edgepress is run on.

What is installed is asked of pip with ``constraints.txt`` for the runtimes, so that all files are made by the versions
that later run them. A tool that does not install is a line of the result with pip's reason, and is tried again the next
time. Only the standard library is used here: this runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNTIMES = ("torch==", "onnxruntime==", "openvino==")
"""The constraints that hold for everyone; the other versions of a peer are its own."""


@dataclass(frozen=True)
class Needs:
    packages: tuple[str, ...]
    told: tuple[str, ...]
    """Whose versions go into the result."""
    constrained: bool = False
    """By all of ``constraints.txt``, as edgepress itself is."""
    without: tuple[str, ...] = ()
    """What comes along unused, and where it does not fit the build of torch keeps the tool from being imported."""


OURS = "edgepress"
PEERS = {
    OURS: Needs(
        (f"{ROOT}[openvino]", "torchao"), ("torch", "onnxruntime", "openvino", "torchao", "torch-pruning"), True
    ),
    "onnxruntime": Needs(("onnxruntime", "onnx", "sympy"), ("onnxruntime", "onnx")),
    "nncf": Needs(("nncf", "openvino"), ("nncf", "openvino")),
    "olive": Needs(("olive-ai", "onnxruntime", "torch", "requests"), ("olive-ai", "onnxruntime")),
    "optimum_onnx": Needs(("optimum-onnx[onnxruntime]", "datasets"), ("optimum", "optimum-onnx", "onnxruntime")),
    "optimum_intel": Needs(
        ("optimum-intel[openvino,nncf]",),
        ("optimum", "optimum-intel", "nncf", "openvino"),
        without=("torchvision",),
    ),
}
"""By the name of the file in ``tools/`` that runs there. torchao's module is timed beside the files of all others, and
so lives where edgepress does."""


@dataclass(frozen=True)
class Environment:
    name: str
    python: Path | None
    versions: dict[str, str] = field(default_factory=dict)
    why: str = ""
    """Why it is missing."""

    def to_json(self) -> dict[str, str]:
        return self.versions if self.python else {"missing": self.why}

    def digest(self) -> str:
        return digest(self.versions)


def digest(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]


def prepare(name: str, folder: Path) -> Environment:
    """The environment ``name`` below ``folder``: the one that is there, if it was made of the same needs."""
    needs, place = PEERS[name], folder / name
    python, done = place / "bin" / "python", place / "installed.json"
    pins = folder / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted = digest(needs.packages, needs.without, lines, sys.version)
    if done.exists() and (known := json.loads(done.read_text(encoding="utf-8")))["wanted"] == wanted:
        return Environment(name, python, known["versions"])
    print(f"{name}: installing {' '.join(needs.packages)}", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    pins.write_text("".join(f"{line}\n" for line in lines if line.startswith(RUNTIMES)), encoding="utf-8")
    constraints = ROOT / "constraints.txt" if needs.constrained else pins
    _run(sys.executable, "-m", "venv", "--clear", str(place))
    came = _run(str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), *needs.packages)
    if came.returncode:
        errors = [line for line in came.stderr.splitlines() if line.startswith("ERROR")]
        why = errors[0].removeprefix("ERROR: ") if errors else f"pip ended with {came.returncode}"
        print(f"{name}: not installed, {why}", file=sys.stderr, flush=True)
        return Environment(name, None, why=why)
    if needs.without:
        _run(str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *needs.without)
    listed = json.loads(_run(str(python), "-m", "pip", "list", "--format", "json").stdout)
    versions = {one["name"].lower(): one["version"] for one in listed}
    told = {package: versions[package] for package in needs.told}
    done.write_text(json.dumps({"wanted": wanted, "versions": told}), encoding="utf-8")
    return Environment(name, python, told)


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
