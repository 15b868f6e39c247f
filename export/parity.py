"""Parity: the artifact against what it was made from, on real rows, over the corners of the declared shapes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import EdgepressError, ParityError
from ..models.examples import example
from ..models.workload import Workload
from . import axes, cache
from .artifact import Parity
from .reference import TOLERANCE, unmasked

ODD = {"batch": 3, "sequence": 37, "decoder_sequence": 5, "past_sequence": 5}
"""The axes that can be dynamic, and a size of each that is no power of two."""

MODULE = "the PyTorch module"

MOST_TOKENS = 1024
"""What a proof of steps reads at once: logits over a whole vocabulary are a hundred thousand numbers a token."""

PAST_IDS = "past_ids"
"""Beside the inputs of a step, the tokens before it, whose keys and values it reads."""

AS_MASKED = 6e4
"""What answers where the reference is ``reference.MASKED`` must be at least so far from 0, as half precision can be."""

Feeds = dict[str, NDArray[Any]]
Run = Callable[[Feeds], NDArray[Any]]
Steps = Callable[[Feeds], list[NDArray[Any]]]

INTEGER_TOLERANCE = 0.45
"""An integer precision rounds by design, and quality is judged on data; but where the root mean square difference is a
larger share of the reference's root mean square (0.45 is a cosine of 0.9 between vectors of one length), the file is
broken."""


def corners(workload: Workload) -> list[dict[str, int]]:
    """Sizes of the dynamic axes by name: the corners of their ranges, and odd ones inside.

    Of steps after a past those that are possible, and of several rows at once no more than ``MOST_TOKENS``.
    """
    known = {axis.name: axis for of_input in workload.input_axes.values() for axis in of_input.values()}
    sizes = {
        name: sorted({known[name].min, min(odd, known[name].max), known[name].max})
        for name, odd in ODD.items()
        if name in known
    }
    found = [dict(zip(sizes, chosen, strict=True)) for chosen in itertools.product(*sizes.values())]
    if "past_sequence" in known:
        new = "decoder_sequence" if "decoder_sequence" in known else "sequence"
        totals, most = [one["past_sequence"] + one[new] for one in found], known[new].max
        found = [
            one
            for one, total in zip(found, totals, strict=True)
            if total <= most and (one["batch"] == 1 or one["batch"] * total <= MOST_TOKENS)
        ]
    return found


def feeds(workload: Workload, sizes: Mapping[str, int]) -> Feeds:
    """Inputs of exactly these sizes: calibration rows, cut or padded; random ones where the workload has no rows.

    Rows repeat where there are too few.
    """
    made, arrays = inputs(workload, sizes["batch"]), {}
    for name, of_input in workload.input_axes.items():
        array = made[name].to(workload.example[name].dtype).numpy()
        if 1 in of_input:
            array = fitted(array, sizes[of_input[1].name], workload.data.calibration.pads.get(name, 0))
        arrays[name] = np.ascontiguousarray(array)
    return arrays


def fitted(array: NDArray[Any], length: int, pad: float) -> NDArray[Any]:
    """Rows cut or padded to ``length`` tokens."""
    missing = max(0, length - array.shape[1])
    return np.pad(array[:, :length], ((0, 0), (0, missing)), constant_values=pad)


def inputs(workload: Workload, count: int) -> dict[str, Tensor]:
    """All inputs of ``count`` rows as they are, of the lengths that they have."""
    rows = workload.data.calibration
    return rows.padded(np.arange(count) % len(rows)) if len(rows) else _random(workload, count)


def _random(workload: Workload, count: int) -> dict[str, Tensor]:
    if not workload.skeleton.is_function:
        inputs = workload.skeleton.family.inputs
        return {**_repeated(workload, count), **example(workload.module, inputs, workload.max_length, rows=count)}
    return _repeated(workload, count)


def _repeated(workload: Workload, count: int) -> dict[str, Tensor]:
    """The example ``count`` times, its floats each with a little noise."""
    random = torch.Generator().manual_seed(0)
    found = {}
    for name, tensor in workload.example.items():
        many = tensor.expand(count, *tensor.shape[1:]).clone()
        if many.is_floating_point():
            many += 0.1 * torch.randn(many.shape, generator=random, dtype=many.dtype)
        found[name] = many
    return found


def prove(workload: Workload, run: Run, *, precision: str, reference: str = MODULE) -> Parity:
    """Parity of a freshly written file with the module, at the corners of the declared range, on calibration rows."""

    def module(feed: Feeds) -> NDArray[Any]:
        result: NDArray[Any] = answers(workload, feed).numpy()
        return result

    return prove_all(workload, run, module, partial(feeds, workload), precision=precision, reference=reference)


def answers(workload: Workload, feed: Feeds) -> Tensor:
    """The module's."""
    with torch.no_grad():
        return workload.forward({name: torch.from_numpy(array) for name, array in feed.items()})


def prove_all(
    workload: Workload,
    run: Run,
    module: Run,
    made: Callable[[Mapping[str, int]], Feeds],
    *,
    precision: str,
    reference: str = MODULE,
) -> Parity:
    """Parity of ``run`` with ``module`` on what ``made`` gives for each corner; where one axis alone is to blame, the
    error names it."""

    def fails(sizes: Mapping[str, int]) -> bool:
        try:
            check(run, module, [made(sizes)], precision=precision, reference_name=reference)
        except ParityError:
            return True
        return False

    found = corners(workload)
    try:
        return check(run, module, map(made, found), precision=precision, reference_name=reference)
    except ParityError as error:
        raise ParityError(f"{error}{axes.blame(workload, found, fails)}") from error


def prove_steps(workload: Workload, run: Steps, *, precision: str) -> Parity:
    """Parity of a step after a past, whose keys and values it gave before, with the module that reads all at once.

    Rows are padded on the left, each by another length; what is answered to padding says nothing.
    """

    def real(logits: NDArray[Any], feed: Feeds) -> NDArray[Any]:
        answered: NDArray[Any] = logits * feed["attention_mask"][:, feed[PAST_IDS].shape[1] :, None]
        return answered

    def steps(feed: Feeds) -> NDArray[Any]:
        return real(run(step(workload, run, feed))[0], feed)

    def module(feed: Feeds) -> NDArray[Any]:
        return real(at_once(workload, feed)[:, feed[PAST_IDS].shape[1] :].numpy(), feed)

    return prove_all(workload, steps, module, partial(split, workload), precision=precision)


def step(workload: Workload, run: Steps, feed: Feeds) -> Feeds:
    """The inputs of a step: the tokens of ``feed`` after its past, and the keys and values that ``run`` gives of it."""
    before, mask = feed[PAST_IDS], feed["attention_mask"]
    kept: Feeds = {}
    for start, end in halves(before.shape[1]):
        given = {"input_ids": before[:, start:end], "attention_mask": mask[:, :end]}
        kept = cache.kept(workload, run({**given, **kept}))
    return {"input_ids": feed["input_ids"], "attention_mask": mask, **kept}


def halves(past: int) -> Iterable[tuple[int, int]]:
    """Where the steps begin and end that read a past, two if that is possible: what a step gives back that has a past
    itself is then among what is proven."""
    return itertools.pairwise(sorted({0, past // 2, past}))


def at_once(workload: Workload, feed: Feeds) -> Tensor:
    """The module's logits of the tokens before and after the past, read together: [batch, past + new, vocabulary]."""
    ids = torch.from_numpy(np.concatenate([feed[PAST_IDS], feed["input_ids"]], axis=1))
    mask = torch.from_numpy(feed["attention_mask"])
    with torch.no_grad():
        logits: Tensor = workload.module(
            input_ids=ids, attention_mask=mask, position_ids=cache.positions(mask, 0)
        ).logits
    return logits


def split(workload: Workload, sizes: Mapping[str, int]) -> Feeds:
    """Rows of exactly these sizes: real tokens, over and over, behind padding of 0 to 3 places."""
    count, past = sizes["batch"], sizes["past_sequence"]
    total, made = past + sizes["sequence"], inputs(workload, count)
    ids, mask = np.zeros((count, total), np.int64), np.ones((count, total), np.int64)
    for row in range(count):
        padding = row % min(4, total)
        real = made["input_ids"][row][made["attention_mask"][row] == 1].numpy()
        ids[row, padding:], mask[row, :padding] = np.resize(real, total - padding), 0
    return {"input_ids": ids[:, past:], PAST_IDS: ids[:, :past], "attention_mask": mask}


@dataclass(frozen=True)
class _Difference:
    """What is kept of one comparison of outputs with the reference's."""

    largest_error: float
    square_error: float
    largest: float
    squares: tuple[float, float]
    product: float
    size: int


def check(run: Run, reference: Run, inputs: Iterable[Feeds], *, precision: str, reference_name: str) -> Parity:
    """Compare ``run`` with ``reference`` on all ``inputs``, whose outputs are held one at a time.

    The scale of a difference is that of the reference's outputs over all inputs: those of one row alone may all be near
    zero. Raises ParityError, naming the shape and both numbers, where one of the two does not run, shapes differ, an
    output is not finite, or the difference is beyond the tolerance of ``precision``.
    """
    found: dict[tuple[int, ...], _Difference] = {}
    for feed in inputs:
        shape = tuple(next(iter(feed.values())).shape)
        if PAST_IDS in feed:
            shape = (*shape, feed[PAST_IDS].shape[1])
        got = _ran(run, feed, f"the {precision} artifact", shape)
        found[shape] = _difference(got, _ran(reference, feed, reference_name, shape), shape)
    largest = max(1e-12, *(one.largest for one in found.values()))
    total = sum(one.size for one in found.values())
    spread = max(1e-12, float(np.sqrt(sum(one.squares[1] for one in found.values()) / max(total, 1))))
    for shape, one in found.items():
        if precision in TOLERANCE:
            error, limit, unit = one.largest_error / largest, TOLERANCE[precision], "its largest output"
        else:
            error, limit = float(np.sqrt(one.square_error / max(one.size, 1))) / spread, INTEGER_TOLERANCE
            unit = "its root mean square output"
        if not error <= limit:
            raise ParityError(
                f"At input shape {list(shape)} the {precision} artifact is {error:.2e} away from {reference_name} "
                f"(relative to {unit}); at most {limit:.2g} is allowed."
            )
    max_abs = max(one.largest_error for one in found.values())
    ours, theirs = (sum(one.squares[i] for one in found.values()) for i in (0, 1))
    return Parity(
        reference=reference_name,
        max_abs=max_abs,
        max_rel=max_abs / largest,
        cosine=sum(one.product for one in found.values()) / max(float(np.sqrt(ours * theirs)), 1e-12),
        shapes=tuple(found),
    )


def _ran(run: Run, feed: Feeds, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        return run(feed)
    except EdgepressError:
        raise
    except Exception as error:  # each runtime has errors of its own, and a module whatever its author raises
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ParityError(f"At input shape {list(shape)} {name} does not run: {why.rstrip('.')}.") from error


def _difference(ours: NDArray[Any], theirs: NDArray[Any], shape: tuple[int, ...]) -> _Difference:
    if ours.shape != theirs.shape:
        raise ParityError(f"At input shape {list(shape)} the artifact gives {ours.shape}, not {theirs.shape}.")
    got, want = ours.ravel().astype(np.float64), theirs.ravel().astype(np.float64)
    if np.isnan(want).any():
        raise ParityError(f"At input shape {list(shape)} the reference gives values that are not numbers.")
    got, want = unmasked(got, want, least=AS_MASKED, subject=f"At input shape {list(shape)} the artifact")
    return _Difference(
        largest_error=float(np.abs(got - want).max(initial=0)),
        square_error=float(np.square(got - want).sum()),
        largest=float(np.abs(want).max(initial=0)),
        squares=(float(got @ got), float(want @ want)),
        product=float(got @ want),
        size=got.size,
    )
