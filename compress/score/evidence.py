"""Evidence: what calibration rows say about every unit, gathered for all methods in one pass of bounded memory.

Each row has gates of its own, all at one, so that one backward pass gives the gradient of every row's loss in every
unit's gate; no gradient of a weight is computed. Hooks on the layers that read units see what these are given. What is
kept are running means, whose size depends on the model and not on the number of rows.

Gram matrices are the one large part. They may take a quarter of the room of the parameters; where they need more, they
are gathered a group at a time in forward passes of their own (:meth:`Evidence.grams`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...errors import InputError
from ...models.data import Batch, Rows
from ...models.gates import open_gates
from ...models.layers import matrix
from ...models.memory import give_back, giving_back
from ...models.statistics import finite
from ...models.surgery import gated
from ...models.workload import Progress, Workload, check_finite
from .readers import Moments, Seen, readers, watched

BATCH, TOKENS = 16, 256
"""Rows at a time, and tokens with their padding: activations take no more room for long rows than for short ones."""
KEPT_ROWS = 1024
STATISTICS = {
    "gates": "means over rows of the gate gradients, of their sizes and of their squares",
    "gates_by_row": f"the gate gradients row by row, of at most {KEPT_ROWS} rows: of more, every n-th",
    "inputs": "means of the readers' inputs and of their squares",
    "grams": "Gram matrices of the readers' inputs",
    "turns": "how far each unit turns the stream that it is added to",
    "moves": "how far each block moves its input",
    "rows": "the rows themselves, for passes of the method's own",
}
"""What a method may name in its ``NEEDS``; all but ``rows`` come from one pass."""


@dataclass(frozen=True)
class Gradients:
    """The gate gradients g of each row's loss; float64 [num_units] unless said otherwise, empty where not gathered."""

    mean: Tensor
    absolute: Tensor
    """Mean of |g|."""
    square: Tensor
    """Mean of g^2."""
    by_row: Tensor
    """g itself, [rows kept, num_units], float32 or finer."""


@dataclass(frozen=True)
class Evidence:
    """What ``rows`` say about ``workload``; what no method needed is empty."""

    workload: Workload
    rows: Rows
    seed: int = 0
    progress: Progress | None = None
    gradients: Gradients = field(default_factory=lambda: Gradients(*(torch.empty(0) for _ in range(4))))
    seen: Seen = field(default_factory=Seen)

    def grams(self) -> Iterator[tuple[str, Moments]]:
        """Every reader's path and moments, with its Gram matrix."""
        for group in gram_groups(self.workload):
            if not group <= {name for name, moments in self.seen.moments.items() if moments.gram is not None}:
                with watched(self.workload.module, self.workload.structure, grams=group) as seen:
                    _run(self.workload, self.rows, seen, None, seed=self.seed, progress=self.progress)
                yield from seen.moments.items()
            else:
                yield from ((name, self.seen.moments[name]) for name in group)


def gather(
    workload: Workload, needs: Collection[str], *, rows: Rows, seed: int = 0, progress: Progress | None = None
) -> Evidence:
    """The statistics in ``needs`` over ``rows``, from one pass forward, and backward where gradients are among them.

    ``seed`` draws the answers of rows without labels. Raises InputError where a NaN or an infinity arises, naming the
    layer and the row.
    """
    wanted = frozenset(needs) - {"rows"}
    assert wanted <= STATISTICS.keys(), f"there are no statistics {wanted - STATISTICS.keys()}"
    check_finite(workload.module, workload.name)
    groups = gram_groups(workload)
    grams = groups[0] if "grams" in wanted and len(groups) == 1 else frozenset()
    sums = _Sums(workload, len(rows), by_row="gates_by_row" in wanted) if wanted & {"gates", "gates_by_row"} else None
    options = {"inputs": "inputs" in wanted, "turned": "turns" in wanted, "moved": "moves" in wanted}
    with watched(workload.module, workload.structure, grams=grams, **options) as seen:
        if wanted - {"grams"} or grams:
            _run(workload, rows, seen, sums, seed=seed, progress=progress)
    found = sums.gradients() if sums else Evidence(workload, rows).gradients
    return Evidence(workload, rows, seed, progress, found, seen)


def gate_gradients(workload: Workload, batch: Batch, *, seed: int = 0) -> Tensor:
    """The gradient of each row's loss in its own gates, at gates of one: [batch, num_units] in float32 or finer.

    Where a row's loss depends on the other rows, as in retrieval, it is the gradient of all losses in the row's gates.
    """
    gates = ones(workload, batch)
    with frozen(workload.module), torch.enable_grad(), open_gates(workload.module, workload.structure, gates):
        (gradient,) = torch.autograd.grad(workload.losses(batch, seed=seed).sum(), gates)
    return gradient


def ones(workload: Workload, batch: Batch) -> Tensor:
    """Gates of one for every row of ``batch``, [batch, num_units], in float32 or finer; they require gradients."""
    parameter = next(workload.module.parameters())
    dtype, shape = torch.promote_types(parameter.dtype, torch.float32), (len(batch.rows), workload.structure.num_units)
    return torch.ones(shape, dtype=dtype, device=parameter.device, requires_grad=True)


def complaint(workload: Workload, batch: Batch, *, seed: int) -> InputError:
    """The error for a ``batch`` in which something was not finite: the layer where it arises, and the row."""

    def run(part: Batch) -> None:
        module, gates = workload.module, ones(workload, part)
        with frozen(module), torch.enable_grad(), gated(module, workload.structure, gates), finite.checked(module):
            loss = workload.losses(part, seed=seed).sum()
            finite.check(loss, "the loss")
            torch.autograd.grad(loss, gates)

    return finite.complaint(batch, run, workload.name)


def gram_groups(workload: Workload) -> list[frozenset[str]]:
    """The readers, in groups whose Gram matrices take at most a quarter of the room of the parameters; one or more in
    each."""
    room = workload.params // 4
    groups: list[set[str]] = [set()]
    used = 0
    for name in readers(workload.structure):
        size = matrix(workload.module.get_submodule(name)).shape[1] ** 2
        if groups[-1] and used + size > room:
            groups.append(set())
            used = 0
        groups[-1].add(name)
        used += size
    return [frozenset(group) for group in groups if group]


def batches(rows: Rows, *, share: float = 1.0) -> Iterator[Batch]:
    """``rows`` in batches of ``share`` of the usual size."""
    return giving_back(rows.batches(max(round(share * BATCH), 1), tokens=round(share * TOKENS)))


class _Sums:
    """Running sums over rows of gate gradients."""

    def __init__(self, workload: Workload, rows: int, *, by_row: bool) -> None:
        self.count = 0
        self.sums = torch.zeros(3, workload.structure.num_units, dtype=torch.float64)
        self.every = -(-rows // KEPT_ROWS) if by_row else 0
        self.kept: list[Tensor] = []

    def add(self, batch: Batch, gradient: Tensor) -> None:
        values = gradient.double().cpu()
        self.count += len(values)
        self.sums += torch.stack([values.sum(0), values.abs().sum(0), values.square().sum(0)])
        if self.every:
            self.kept.append(gradient[torch.from_numpy(batch.rows % self.every == 0)].cpu())

    def gradients(self) -> Gradients:
        mean, absolute, square = self.sums / max(self.count, 1)
        return Gradients(mean, absolute, square, torch.cat(self.kept) if self.kept else torch.empty(0))


def _run(
    workload: Workload, rows: Rows, seen: Seen, sums: _Sums | None, *, seed: int, progress: Progress | None
) -> None:
    """Everything forward once, and backward where there are ``sums`` to add to."""
    done = 0
    for batch in batches(rows):
        seen.inputs = batch.inputs
        fine = True
        if sums is not None:
            gradient = gate_gradients(workload, batch, seed=seed)
            sums.add(batch, gradient)
            fine = bool(torch.isfinite(gradient).all())
        else:
            with torch.no_grad():
                workload.forward(batch.inputs)
        if not (fine and seen.finite()):
            raise complaint(workload, batch, seed=seed)
        done += len(batch.rows)
        if progress:
            progress(done, len(rows), "rows")
    give_back()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the context no parameter has a gradient: only the gates do."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
