"""Gradient flow, watched while a model is trained: what is wrong with a step, and what is done about it.

Every step's loss, and the norm of its gradient in every block, are held against what they were lately:

    not finite  a NaN or an infinity; the batch is skipped, and of two in a row the second one goes back
    spike       a loss far above the median of the last ones, in units of their own spread; noted, since a batch may be
                hard; of two in a row the second one halves the rate
    diverging   the median of the last few losses is several times the lowest there was; goes back
    exploding   a block's norm is far above its own median; the rate is halved (the step itself is clipped)
    vanishing   a block's norm is far below its own median; noted

Going back means to the last weights that were kept while all was well, at a tenth of the rate. Nothing is done before
there is enough to judge by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from ...errors import EdgepressError
from ...models.statistics.gradient_flow import EXPLODING, VANISHING

WINDOW = 25
"""Steps that the running medians are over."""
ENOUGH = 10
"""Steps without which nothing is judged."""
RECENT = 9
SPIKE = 10.0
"""Robust standard deviations above the median, at ``HIGH`` times the median at least."""
HIGH = 5.0
"""How many times the usual loss is too much; rows of one length make a batch, and short texts may lose several times as
much as long ones."""
MOST = 6
"""Times that a run may go back."""


class DivergedError(EdgepressError):
    """Training left the finite numbers, or got worse and worse, whatever the rate."""


@dataclass
class Flow:
    """The losses and the blocks' gradient norms of the last steps, and what has been done so far."""

    layers: tuple[str, ...]
    rate: float = 1.0
    """What the learning rate is multiplied by: every remedy lowers it."""
    first: float | None = None
    """The first loss, None until there is a finite one."""
    best: float | None = None
    """The lowest median of ``RECENT`` losses, or the first one until there are as many."""
    losses: list[float] = field(default_factory=list)
    norms: list[list[float]] = field(default_factory=list)
    flagged: list[str] = field(default_factory=list)
    """Layers that were exploding or vanishing in the step before."""
    broken: int = 0
    """Steps in a row that were not finite."""
    high: int = 0
    """Steps in a row whose loss was a spike."""
    returns: int = 0

    def judge(self, step: int, loss: float, norms: Sequence[float]) -> list[dict[str, Any]]:
        """What is wrong with a step before it is taken: events of ``step``, ``kind``, ``where`` and what is ``done``.

        ``norms`` are those of ``layers``. Raises DivergedError where going back has not helped.
        """
        events = list(self._wrong(loss, norms))
        if not any(done in {"skipped", "went back"} for _, _, done in events):
            self._note(loss, norms)
        if any(done == "rate halved" for _, _, done in events):
            self.rate, self.losses, self.norms = self.rate / 2, [], []
        if any(done == "went back" for _, _, done in events):
            self._return(step, loss)
        return [{"step": step, "kind": kind, "where": where, "done": done} for kind, where, done in events]

    def _wrong(self, loss: float, norms: Sequence[float]) -> list[tuple[str, str, str]]:
        bad = [name for name, norm in zip(self.layers, norms, strict=True) if not math.isfinite(norm)]
        if bad or not math.isfinite(loss):
            self.broken += 1
            where = "the loss" if not math.isfinite(loss) else ", ".join(bad[:3])
            return [("not finite", where, "skipped" if self.broken == 1 else "went back")]
        self.broken = 0
        recent = self.recent(loss)
        if self.best is not None and len(self.losses) + 1 >= RECENT and recent > HIGH * self.best:
            return [("diverging", f"the loss, {recent:.3g} after {self.best:.3g}", "went back")]
        if len(self.losses) < ENOUGH:
            return []
        events = []
        usual = median(self.losses)
        spread = 1.4826 * median(abs(value - usual) for value in self.losses)
        self.high = self.high + 1 if loss > HIGH * usual and loss - usual > SPIKE * spread else 0
        if self.high:
            done = "noted" if self.high == 1 else "rate halved"
            events.append(("spike", f"the loss, {loss:.3g} after {usual:.3g}", done))
        flagged = []
        for place, (name, norm) in enumerate(zip(self.layers, norms, strict=True)):
            before = median(row[place] for row in self.norms)
            if VANISHING * before <= norm <= EXPLODING * before:
                continue
            flagged.append(name)
            if name not in self.flagged:
                kind, done = ("exploding", "rate halved") if norm > before else ("vanishing", "noted")
                events.append((kind, f"{name}, {norm:.3g} after {before:.3g}", done))
        self.flagged = flagged
        return events

    def recent(self, *more: float) -> float:
        """The median of the last losses."""
        return median([*self.losses, *more][-RECENT:])

    def _note(self, loss: float, norms: Sequence[float]) -> None:
        self.losses = [*self.losses, loss][-WINDOW:]
        self.norms = [*self.norms, list(norms)][-WINDOW:]
        if self.first is None or self.best is None:
            self.first = self.best = loss
        if len(self.losses) >= RECENT:
            self.best = min(self.best, self.recent())

    def _return(self, step: int, loss: float) -> None:
        self.returns += 1
        if self.returns > MOST:
            raise DivergedError(
                f"Recovery diverged at step {step}, with a loss of {loss:.3g}, and so it did {MOST} times before, each "
                f"time at a tenth of the rate: look for rows that are not finite, or train at a lower rate."
            )
        self.rate, self.losses, self.norms, self.broken = self.rate / 10, [], [], 0

    @property
    def healthy(self) -> bool:
        """Whether the weights of now are worth keeping to come back to."""
        return self.best is not None and len(self.losses) >= RECENT and self.recent() <= HIGH / 2 * self.best

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Flow:
        """The inverse of :meth:`to_json`."""
        return cls(**{**data, "layers": tuple(data["layers"])})
