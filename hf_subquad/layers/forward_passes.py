"""The forward passes of a model: which one runs now, and which one gradient checkpointing computes again."""

from collections import deque
from dataclasses import dataclass, field
from threading import get_ident

import torch
from torch import Tensor

from .classify_tokens import BatchClasses

_REMEMBERED = 256  # passes whose backward pass may be to come


@dataclass
class Passes:
    """Attributes:
    latest: the last pass that began; None before the first.
    """

    latest: BatchClasses | None = None
    # The passes in progress, by thread; a wrapper's before that of the model inside.
    _running: dict[int, list[BatchClasses]] = field(default_factory=dict)
    _remembered: deque[BatchClasses] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    _outside: BatchClasses = field(default_factory=lambda: BatchClasses({}))  # of calls that no hook announces

    def begin(self, batch: BatchClasses) -> None:
        self._running.setdefault(get_ident(), []).append(batch)
        self._note(batch)

    def replace(self, batch: BatchClasses) -> None:
        """The pass in progress sees other tokens than it was called with."""
        running = self._running.setdefault(get_ident(), [])
        batch.whole = running[-1].whole or running[-1] if running else None
        if running and self._remembered and self._remembered[-1] is running[-1]:
            self._remembered.pop()
        running[-1:] = [batch]
        self._note(batch)

    def end(self) -> None:
        running = self._running.get(get_ident(), [])
        if running:
            running.pop()
        if not running:
            self._running.pop(get_ident(), None)

    def of(self, mlp: str, x: Tensor) -> BatchClasses:
        """The pass in which an MLP is called with x [..., d]."""
        if computed_again():
            known = [*self._remembered, self._outside]
            return BatchClasses.nearest(known, mlp, x)
        running = self._running.get(get_ident())
        batch = running[-1] if running else self._outside
        if batch.may_repeat or torch.is_grad_enabled():  # reentrant checkpointing begins without gradients
            batch.note(mlp, x)
        return batch

    def forget(self) -> None:
        """After an optimizer step: passes before it are not computed again, as their weights have changed."""
        self._remembered.clear()
        self._running.pop(get_ident(), None)  # of a pass that was interrupted
        self._outside = BatchClasses({})

    def _note(self, batch: BatchClasses) -> None:
        self.latest = batch
        if torch.is_grad_enabled():  # else nothing of it is computed again
            batch.may_repeat = True
            self._remembered.append(batch)


def computed_again() -> bool:
    """Whether this runs in a backward pass, so that a forward in it is one that gradient checkpointing repeats."""
    return torch._C._current_graph_task_id() != -1
