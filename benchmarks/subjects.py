"""Subjects: what is measured side by side: artifacts, and models that are not exported, which PyTorch runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..export.artifact import MANIFEST, Artifact, describe
from ..files import sha256
from ..models import checkpoint, functions
from ..models.workload import Workload
from ..plan import QuantizationPlan

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Original(Artifact):
    """A loaded model as a checkpoint in a folder for the time being, which :mod:`.runtimes.torch` runs.

    No file says that something is one: what is opened here may be a function's module, and only a user names those.
    """

    workload: Workload
    word: str
    """What the user calls it."""

    @property
    def function(self) -> str:
        skeleton = self.workload.skeleton
        return skeleton.architecture if skeleton.is_function else ""


def original(workload: Workload, folder: Path, word: str = "") -> Original:
    """``workload`` written to ``folder``, to be measured as it is; ``word`` is what tables call it."""
    checkpoint.save(workload, folder)
    told = describe(workload, QuantizationPlan("fp32"), None, runtime="torch", file=WEIGHTS, name=None, base=None)
    manifest = told.model_copy(update={"files": {WEIGHTS: sha256(folder / WEIGHTS)}})
    return Original(folder, manifest, workload, word or workload.name)


def is_model(word: str) -> bool:
    """Whether ``word`` names a model: of the zoo, a function, or a folder with a configuration, not an artifact."""
    folder = Path(word)
    if word.startswith("zoo:") or functions.named(word):
        return True
    return (folder / "config.json").is_file() and not (folder / MANIFEST).is_file()


def shown_as(subject: Artifact) -> str:
    """Where it is, for tables: the folder of an artifact, and the word that a model was named by."""
    return subject.word if isinstance(subject, Original) else str(subject.folder)
