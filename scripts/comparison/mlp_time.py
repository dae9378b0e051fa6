"""How long a dense model spends in some of its MLPs, forward and backward, inside a real training step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

# Names of an MLP's projections in the model, in the order in which they are called; the output is the last.
Projections = Sequence[str]


class MlpTimer:
    """Seconds since `restart` spent in each MLP.

    An MLP's time is the span from the entry of its first projection to the exit of its last one, in the forward
    pass, plus the reverse span in the backward pass: its activation, gate product and dropout count, and so do the
    weight gradients and, under PEFT, its adapters. The hooks themselves cost microseconds.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.seconds: dict[str, float] = {}

    def restart(self) -> None:
        self.seconds = {}

    @contextmanager
    def watching(self, model: nn.Module, mlps: dict[str, Projections]) -> Iterator[None]:
        """Context manager: time these MLPs (by name) of `model`, which may be wrapped by PEFT."""
        names = dict(model.named_modules())
        handles = [
            handle
            for mlp, projections in mlps.items()
            for handle in self._hooks(mlp, [_find(names, path) for path in projections])
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, mlp: str, projections: list[nn.Module]) -> list[Any]:
        open_since: dict[str, float] = {}

        def enter(phase: str, *_: Any) -> None:
            open_since.setdefault(phase, self.now())

        def leave(phase: str, *_: Any) -> None:
            self.seconds[mlp] = self.seconds.get(mlp, 0.0) + self.now() - open_since.pop(phase)

        first, last = projections[0], projections[-1]
        return [
            first.register_forward_pre_hook(lambda *_: enter("forward")),
            last.register_forward_hook(lambda *_: leave("forward")),
            last.register_full_backward_pre_hook(lambda *_: enter("backward")),
            first.register_full_backward_hook(lambda *_: leave("backward")),
        ]


def _find(modules: dict[str, nn.Module], path: str) -> nn.Module:
    for name in (path, f"base_model.model.{path}"):
        if name in modules:
            return modules[name]
    raise KeyError(f"the model has no module {path}")
