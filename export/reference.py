"""References: what an artifact answered where it was proven, kept beside it so that another machine can be held to it.

``reference.npz`` has some of the inputs that parity was proven on, which are calibration rows where there are any, and
of each answer to them its shape and evenly spaced values, so that the file stays small beside a vocabulary of logits.
Nothing here needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile
from zlib import error as error_of_zlib

import numpy as np
from numpy.typing import NDArray

from ..errors import EdgepressError, InputError, ParityError
from . import session
from .artifact import MANIFEST, Artifact

FILE = "reference.npz"
CASES, MOST_BYTES, VALUES = 3, 2 << 20, 2048
"""How many inputs are kept, of how many bytes together, and how many values of an answer."""
MOST_UNPACKED = 64 << 20
MASKED = 1e30
"""A number that is at least so far from 0 says "never", as the least number of a float type and infinity do: it is no
measure of a difference."""
TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2}
"""Largest difference of a float precision's outputs, in units of the reference's largest one: also that of parity."""
INTEGER_TOLERANCE = 0.02
"""Root mean square difference in units of the reference's, for integer precisions. The same codes come out of kernels
that are right, but for rounding between them; kernels that saturate, as those of old CPUs do, are farther off."""

Feeds = dict[str, NDArray[Any]]
Run = Callable[[Feeds], list[NDArray[Any]]]


class Recorder:
    """A session whose first runs are kept."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._arrays: Feeds = {}
        self._cases, self._bytes = 0, 0

    def run(self, feeds: Feeds) -> list[NDArray[Any]]:
        found = self._run(feeds)
        size = sum(array.nbytes for array in feeds.values())
        if self._cases < CASES and self._bytes + size <= MOST_BYTES:
            self._arrays |= {f"{self._cases}.input.{name}": array for name, array in feeds.items()}
            for place, array in enumerate(found):
                self._arrays[f"{self._cases}.shape.{place}"] = np.array(array.shape)
                self._arrays[f"{self._cases}.values.{place}"] = _spaced(array)
            self._cases, self._bytes = self._cases + 1, self._bytes + size
        return found

    def save(self, folder: Path) -> None:
        if self._cases:
            np.savez_compressed(folder / FILE, **self._arrays)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Verified:
    """What :func:`verify` found: the worst figures over ``cases`` inputs, or nothing where the artifact has none."""

    cases: int
    max_abs: float | None = None
    max_rel: float | None = None
    """Of the largest value of the reference."""
    cosine: float | None = None


@dataclass(frozen=True)
class Answer:
    """One output: its shape, and evenly spaced values of it."""

    shape: tuple[int, ...]
    values: NDArray[Any]


@dataclass(frozen=True)
class Case:
    feeds: Feeds
    answers: tuple[Answer, ...]


def verify(artifact: Artifact, *, threads: int = 1) -> Verified:
    """Run the references of an opened artifact, whose checksums are thus right, on this machine.

    Raises ParityError where it answers otherwise than where it was proven, beyond the tolerance of its precision;
    InputError where the references are damaged, UnavailableError where its runtime is missing.
    """
    cases = read(artifact)
    if not cases:
        return Verified(0)
    with _opened(artifact, threads) as run:
        found = [_answers(artifact, run, case) for case in cases]
    return judge(artifact, cases, found)


def _answers(artifact: Artifact, run: Run, case: Case) -> list[Answer]:
    try:
        return [Answer(array.shape, _spaced(array)) for array in run(case.feeds)]
    except EdgepressError:
        raise
    except Exception as error:  # each runtime has errors of its own
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ParityError(f"{artifact.folder} does not run here on its references: {why.rstrip('.')}.") from error


def read(artifact: Artifact) -> tuple[Case, ...]:
    """The references that came with ``artifact``, which may be none; InputError where they are damaged."""
    path, inputs = artifact.folder / FILE, artifact.manifest.inputs
    if FILE not in artifact.manifest.files:
        return ()
    try:
        with ZipFile(path) as packed:
            size = sum(entry.file_size for entry in packed.infolist())
        if size > MOST_UNPACKED:
            raise InputError(f"{path} would take {size / 1e6:.0f} MB, far more than references do.")
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
        numbers = sorted({int(name.split(".", 1)[0]) for name in arrays})
    except (BadZipFile, OSError, ValueError, EOFError, MemoryError, error_of_zlib) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    cases = []
    for number in numbers:
        marked = f"{number}.input."
        feeds = {name.removeprefix(marked): array for name, array in arrays.items() if name.startswith(marked)}
        if not feeds or any(name not in inputs or array.dtype != inputs[name].dtype for name, array in feeds.items()):
            raise InputError(f"{path} holds inputs that are not those of {artifact.folder / MANIFEST}.")
        answers: list[Answer] = []
        while (shape := arrays.get(f"{number}.shape.{len(answers)}")) is not None:
            values = arrays.get(f"{number}.values.{len(answers)}")
            if values is None:
                break
            answers.append(Answer(tuple(map(int, shape)), values))
        cases.append(Case(feeds, tuple(answers)))
    return tuple(cases)


def judge(
    artifact: Artifact, cases: Sequence[Case], found: Sequence[Sequence[Answer]], *, where: str = "here"
) -> Verified:
    """What was ``found`` on a machine beside what each of ``cases`` says; the errors of :func:`verify`."""
    pairs = []
    for case, answers in zip(cases, found, strict=True):
        for place, ours in enumerate(answers):
            if place >= len(case.answers):
                raise InputError(f"{artifact.folder / FILE} has no answer {place} to compare with.")
            theirs = case.answers[place]
            if ours.shape != theirs.shape or ours.values.shape != theirs.values.shape:
                raise ParityError(f"{artifact.folder} gives {ours.shape} {where}, not {theirs.shape}.")
            pairs.append((ours.values.astype(np.float64), theirs.values.astype(np.float64)))
    return _judged(artifact, pairs, len(cases), where)


def _judged(
    artifact: Artifact, pairs: list[tuple[NDArray[np.float64], NDArray[np.float64]]], cases: int, where: str
) -> Verified:
    ours, theirs = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    if np.isnan(theirs).any():
        raise InputError(f"{artifact.folder / FILE} holds values that are not numbers.")
    ours, theirs = unmasked(ours, theirs, least=MASKED, subject=f"{artifact.folder}, run {where},")
    if not ours.size:
        raise InputError(f"{artifact.folder / FILE} has no value to compare with.")
    largest, spread = max(np.abs(theirs).max(), 1e-12), max(np.sqrt(np.square(theirs).mean()), 1e-12)
    max_abs = float(np.abs(ours - theirs).max())
    if artifact.precision in TOLERANCE:
        error, limit, unit = max_abs / largest, TOLERANCE[artifact.precision], "largest value"
    else:
        error = float(np.sqrt(np.square(ours - theirs).mean()) / spread)
        limit, unit = INTEGER_TOLERANCE, "root mean square"
    if not error <= limit:
        raise ParityError(
            f"{artifact.folder} does not compute {where} what it computed where it was proven: {error:.2e} of the "
            f"{unit} away, where {limit:.2g} is allowed in {artifact.precision}."
        )
    norms = max(float(np.linalg.norm(ours) * np.linalg.norm(theirs)), 1e-12)
    return Verified(cases, max_abs, float(max_abs / largest), float(ours @ theirs) / norms)


def unmasked(
    ours: NDArray[np.float64], theirs: NDArray[np.float64], *, least: float, subject: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both without the places at which ``theirs``, the reference, is ``MASKED``.

    Raises ParityError, which begins with ``subject``, where ours is nearer to 0 than ``least`` at one of those or has
    the other sign, and where it is not finite at another.
    """
    masked = np.abs(theirs) >= MASKED
    if not (ours[masked] * np.sign(theirs[masked]) >= least).all():
        raise ParityError(f"{subject} does not rule out what the reference does.")
    ours, theirs = ours[~masked], theirs[~masked]
    if not np.isfinite(ours).all():
        raise ParityError(f"{subject} gives values that are not finite.")
    return ours, theirs


@contextmanager
def _opened(artifact: Artifact, threads: int) -> Iterator[Run]:
    """What runs the artifact; of engines the library that builds them too, which needs PyTorch, as does
    ExecuTorch's own Python."""
    runtime = artifact.manifest.runtime
    if runtime == "onnx":
        with session.open_onnx(artifact, threads=threads) as opened:
            yield opened.run
    elif runtime == "openvino":
        with session.open_openvino(artifact, threads=threads) as compiled:
            yield compiled.run
    elif runtime == "executorch":
        from .backends import executorch

        with executorch.open_session(artifact, threads=threads) as method:
            yield method.run
    else:
        from .backends.tensorrt import open_session

        with open_session(artifact) as engine:
            yield engine.run


def _spaced(array: NDArray[Any]) -> NDArray[Any]:
    """At most ``VALUES`` values, evenly spaced over the whole."""
    return array.reshape(-1)[:: max(1, -(-array.size // VALUES))]
