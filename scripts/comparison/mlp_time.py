"""How long a model spends in some of its MLPs, forward and backward, inside a real training step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class MlpTimer:
    """Seconds since `restart` spent in MLPs.

    An MLP's time is the span from the entry of its first projection to the exit of its last one in the forward pass,
    plus the reverse span in the backward pass, unless its input needs no gradient: activation, gate product, dropout,
    weight gradients, adapters, and the selection of neurons count. Where a module of the model holds exactly these
    projections, the spans are that module's own, so that all projections still see the same input.

    No module gets a hook: with hooks, a patched model keeps the padding of its batches.

    Args:
        mlps: by name of the MLP, the paths of its projections in the bare model, in the order in which they are called.
    """

    def __init__(self, model: nn.Module, mlps: Mapping[str, Sequence[str]], now: Callable[[], float]) -> None:
        self.now = now
        self.seconds = 0.0
        modules = dict(model.named_modules())
        for mlp, projections in mlps.items():
            self._watch(*_ends(modules, mlp, projections))

    def restart(self) -> None:
        self.seconds = 0.0

    def _watch(self, first: nn.Module, last: nn.Module) -> None:
        since: dict[str, float] = {}

        def enter(phase: str) -> None:
            since[phase] = self.now()

        def leave(phase: str) -> None:
            self.seconds += self.now() - since.pop(phase)

        def opening(x: Tensor, *args: Any, opens: Callable[..., Any] = first.forward, **kwargs: Any) -> Any:
            enter("forward")
            if x.requires_grad and torch.is_grad_enabled():
                x = x.view_as(x)  # of which nothing outside of the MLP is computed
                x.register_hook(lambda _: leave("backward"))
            return opens(x, *args, **kwargs)

        first.forward = opening

        def closing(*args: Any, closes: Callable[..., Any] = last.forward, **kwargs: Any) -> Any:
            y = closes(*args, **kwargs)
            if y.requires_grad:
                y.register_hook(lambda _: enter("backward"))
            leave("forward")
            return y

        last.forward = closing


def _ends(modules: Mapping[str, nn.Module], mlp: str, projections: Sequence[str]) -> tuple[nn.Module, nn.Module]:
    """The modules at whose entry and exit an MLP begins and ends."""
    whole = _find(modules, mlp)
    linear = sum(isinstance(each, nn.Linear) and "lora_" not in path for path, each in whole.named_modules())
    if len(projections) > 2 and linear <= len(projections):
        return whole, whole
    return _find(modules, projections[0]), _find(modules, projections[-1])


def _find(modules: Mapping[str, nn.Module], path: str) -> nn.Module:
    for name in (path, f"base_model.model.{path}"):
        if name in modules:
            return modules[name]
    raise KeyError(f"the model has no module {path}")
