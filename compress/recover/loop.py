"""The loop: one step of distillation after the other, watched, kept, and shared out among the processes there are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ...errors import UnavailableError
from ...models.data import Batch, Rows
from ...models.workload import Progress, Workload
from . import state
from .flow import DivergedError, Flow
from .held_out import hold_out
from .losses import LEAST, Objective, look, moved
from .state import State

if TYPE_CHECKING:
    from accelerate import Accelerator

WARMUP = 0.1
CLIP = 1.0
EVERY = 20
"""Steps after which the state is kept, in memory and on disk, where all is well."""
CHECKED = 64
"""Calibration rows that tell whether a run has ended better than it began."""
OUTSIDE = "outside the blocks"


@dataclass(frozen=True)
class Options:
    steps: int
    batch: int
    lr: float
    evaluate_every: int
    patience: int
    seed: int


class Training:
    """A run: ``student`` is trained in place, and ``trace`` and ``flow`` tell how it went.

    ``weights`` are the parameters to train, by name; ``run`` is the digest of all that the run depends on. With
    ``sharded`` every process holds a part of the student's parameters, gradients and optimizer state, else all of them.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        student: Workload,
        original: Workload,
        objective: Objective,
        weights: Mapping[str, nn.Parameter],
        *,
        options: Options,
        mixed: AbstractContextManager[Any],
        run: str,
        sharded: bool,
    ) -> None:
        self.accelerator, self.student, self.original, self.options = accelerator, student, original, options
        self.objective, self.mixed, self.run = objective, mixed, run
        self.rows, self.held = original.data.train, None
        if options.evaluate_every:
            self.rows, self.held = hold_out(original)
        if sharded:
            _shard(student, accelerator.device, accelerator.num_processes)
            weights = {name: student.module.get_parameter(name) for name in weights}
        elif accelerator.num_processes > 1:
            weights = self._reached(weights)
        self.weights = dict(weights)
        self.wrapped = student if sharded else replace(student, module=accelerator.prepare(student.module))
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=options.lr, weight_decay=0.01)
        self.layers = _by_layer(student, self.weights)
        self.flow = Flow(tuple(self.layers))
        self.step = self.updates = 0
        self.trace: list[dict[str, Any]] = []
        self.best: tuple[float, int] | None = None
        """The best value on the rows held out, and the step it was after."""
        self.best_weights: dict[str, Tensor] = {}
        self.finished = False
        self.start: float | None = None
        """Where the run stood before its first step."""
        self.kept = self._state()

    # ---- the loop

    def train(self, path: Path | None, progress: Progress | None) -> None:
        """Take the steps that are left; ``path`` is the file of the state. Raises DivergedError."""
        if self.start is None:
            self.start = self._standing()
        for batch in _endless(self.rows, self.options.batch, self.options.seed, self.step):
            if self.finished or self._late or self.step >= self.options.steps:
                break
            self._take(batch)
            if self.step % EVERY == 0 and self.flow.healthy:
                self._keep(path)
            if progress and self.accelerator.is_main_process:
                progress(self.step, self.options.steps, self._note())
        if not self.finished:
            self._end()
            self._keep(path)

    def _take(self, batch: Batch) -> None:
        torch.manual_seed(self.options.seed + self.step)  # what a module draws is the step's own, resumed or not
        loss = self._backward(batch)
        norms = self._norms()
        total = math.hypot(*norms)
        self.step += 1
        events = self.flow.judge(self.step, loss, norms)
        rate = self.options.lr * _rate(self.step - 1, self.options.steps) * self.flow.rate
        done = {event["done"] for event in events}
        if "went back" in done:
            self._lay_back(self.kept)
            self.flow.best = self.kept.facts["flow"]["best"] or self.flow.first
        elif "skipped" not in done:
            nn.utils.clip_grads_with_norm_(self.weights.values(), CLIP, torch.tensor(total))
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()
            self.updates += 1
        figures = {"loss": _finite(loss), "lr": rate, "grad_norm": _finite(total), "norms": [_finite(n) for n in norms]}
        entry = {"step": self.step, **figures, "events": events}
        self.trace.append(entry)
        every = self.options.evaluate_every
        if every and (self.step % every == 0 or self.step == self.options.steps):
            entry["held_out"] = self._judge()

    def _backward(self, batch: Batch) -> float:
        """The gradients of a batch's loss, and the loss."""
        share, weight = self._share(batch)
        with self.mixed:
            with torch.no_grad():
                theirs = look(self.original, share, self.objective.watched(1))
            ours = look(self.wrapped, share, self.objective.watched(0))
        errors, sizes, weights = self.objective(self.original.task, share, ours, theirs)
        sizes = self.accelerator.reduce(sizes * weight, reduction="sum").clamp(min=LEAST)
        each = weights * errors * weight / sizes * self.accelerator.num_processes  # the processes' mean is taken later
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(each.sum())
        return float(self.accelerator.reduce(each.sum().detach(), reduction="mean"))

    def _share(self, batch: Batch) -> tuple[Batch, float]:
        """This process' rows of a batch, padded as the whole, and their weight: 0 where there are none left for it."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = slice(rank, None, processes) if rank < len(batch.rows) else slice(0, 1)
        inputs = {name: tensor[mine] for name, tensor in batch.inputs.items()}
        share = Batch(batch.rows[mine], inputs, None if batch.labels is None else batch.labels[mine])
        return moved(share, self.accelerator.device), float(rank < len(batch.rows))

    def _norms(self) -> list[float]:
        norms = [
            state.gathered(nn.utils.get_total_norm([p.grad for p in layer if p.grad is not None]))
            for layer in self.layers.values()
        ]
        return [float(norm) for norm in torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()]

    def _reached(self, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """The weights that the loss of the first batch depends on; processes wait for the gradients of all others."""
        batch = moved(
            next(iter(self.rows.batches(self.options.batch, seed=self.options.seed))), self.accelerator.device
        )
        with torch.no_grad():
            theirs = look(self.original, batch, self.objective.watched(1))
        ours = look(self.student, batch, self.objective.watched(0))
        self.objective(self.original.task, batch, ours, theirs)[0].sum().backward()  # type: ignore[no-untyped-call]
        reached = {name: weight for name, weight in weights.items() if weight.grad is not None}
        for name, weight in weights.items():
            weight.requires_grad_(name in reached).grad = None
        return reached

    def _standing(self) -> float:
        """The loss on a few calibration rows, the same ones whenever it is asked for."""
        errors = sizes = torch.zeros(())
        weights = torch.ones(())
        with torch.no_grad(), self.mixed:
            for part in self.original.data.calibration.take(CHECKED).batches(self.options.batch):
                batch = moved(part, self.accelerator.device)
                ours = look(self.student, batch, self.objective.watched(0))
                theirs = look(self.original, batch, self.objective.watched(1))
                error, size, weights = self.objective(self.original.task, batch, ours, theirs)
                errors, sizes = errors.to(error) + error, sizes.to(size) + size
        loss = (weights * errors / sizes.clamp(min=LEAST)).sum()
        return float(self.accelerator.reduce(loss, reduction="mean"))  # all processes decide alike

    # ---- judged on the rows held out

    def _judge(self) -> float:
        assert self.held is not None
        mine = torch.tensor(self.held.value(self.student), device=self.accelerator.device)
        value = float(self.accelerator.reduce(mine, reduction="mean"))  # all processes decide alike
        if self.held.is_better(value, self.best[0] if self.best else None):
            self.best = value, self.step
            self.best_weights = {name: state.copied(weight) for name, weight in self.weights.items()}
        return value

    @property
    def _late(self) -> bool:
        """Whether patience is at its end."""
        since = self.step - self.best[1] if self.best else 0
        return 0 < self.options.patience * self.options.evaluate_every <= since

    def _end(self) -> None:
        """Settle for the best weights, or for those kept last where the run has ended worse than it began."""
        if self.flow.first is None:
            raise DivergedError("Recovery could not take a single step: no batch had a finite loss.")
        if self.best_weights:
            for name, weight in self.weights.items():
                state.local(weight).copy_(self.best_weights[name])
        elif self.start is not None and math.isfinite(self.start) and not self._standing() <= self.start:
            self._lay_back(self.kept)
            done = {"step": self.step, "kind": "worse than at first", "where": "the loss", "done": "went back"}
            self.trace[-1]["events"].append(done)
        self.finished = True

    def _note(self) -> str:
        entry = self.trace[-1]
        told = "".join(f", {event['kind']}: {event['done']}" for event in entry["events"])
        loss = "no loss" if entry["loss"] is None else f"loss {entry['loss']:.3f}"
        return loss + told

    # ---- the state

    def go_on(self, path: Path | None) -> None:
        """Go on from the state at ``path``, where there is one."""
        found = state.read(path, self.run, self.weights) if path else None
        if found is None:
            return
        facts = found.facts
        self.kept = found
        self._lay_back(found)
        self.step, self.finished, self.trace = facts["step"], facts["finished"], list(facts["trace"])
        self.flow = Flow.from_json(facts["flow"])
        self.start = facts["start"]
        self.best = tuple(facts["best"]) if facts["best"] else None
        self.best_weights = {n: found.tensors[f"best.{n}"] for n in self.weights if f"best.{n}" in found.tensors}

    def _state(self) -> State:
        tensors = state.taken(self.weights, self.optimizer)
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        facts = {
            "run": self.run,
            "step": self.step,
            "updates": self.updates,
            "finished": self.finished,
            "start": self.start,
            "best": self.best,
            "flow": self.flow.to_json(),
            "trace": list(self.trace),
        }
        return State(tensors, facts)

    def _keep(self, path: Path | None) -> None:
        self.kept = self._state()
        if not path:
            return
        first = self.accelerator.is_main_process
        tensors = {name: tensor for name, tensor in state.whole(self.kept.tensors, self.weights) if first}
        if first:
            state.write(State(tensors, self.kept.facts), path)

    def give(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Copy what was trained, put together where it is sharded, to ``weights`` of the same names."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                weights[name].copy_(state.gathered(weight))

    def _lay_back(self, kept: State) -> None:
        self.updates = kept.facts["updates"]
        state.lay_back(kept.tensors, self.weights, self.optimizer, self.updates)


def _shard(student: Workload, device: torch.device, processes: int) -> None:
    """Leave this process its share of every parameter of ``student``, on ``device``; a block's are gathered while it
    runs. Raises UnavailableError for a parameter that cannot be cut."""
    for name, parameter in student.module.named_parameters():
        if not parameter.dim():
            raise UnavailableError(f"FSDP cannot shard '{name}', which is a single number; train without --use_fsdp.")
    mesh = init_device_mesh(device.type, (processes,))
    for stack in student.structure.stacks:
        for place in range(stack.count):
            fully_shard(student.module.get_submodule(f"{stack.path}.{place}"), mesh=mesh)
    fully_shard(student.module, mesh=mesh)


def _finite(value: float) -> float | None:
    """``value`` as JSON can say it."""
    return value if math.isfinite(value) else None


def _rate(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _endless(rows: Rows, batch: int, seed: int, start: int) -> Iterator[Batch]:
    """Batch after batch, epoch after epoch, from the ``start``-th on."""
    epoch, skipped = divmod(start, math.ceil(len(rows) / batch) or 1)
    while True:
        yield from rows.batches(batch, seed=seed + epoch, skip=skipped)
        epoch, skipped = epoch + 1, 0


def _by_layer(student: Workload, weights: Mapping[str, nn.Parameter]) -> dict[str, list[nn.Parameter]]:
    """The weights of each block, and those outside; of a model without blocks, of each layer."""
    blocks = [f"{stack.path}.{place}" for stack in student.structure.stacks for place in range(stack.count)]
    layers: dict[str, list[nn.Parameter]] = {}
    for name, weight in weights.items():
        own = next((block for block in blocks if name.startswith(f"{block}.")), None)
        layers.setdefault(own or (OUTSIDE if blocks else name.rpartition(".")[0]), []).append(weight)
    return layers
