"""How long one MLP takes, forward and backward: before the patch, dense, and with several budgets."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..layers.budget import Budget
from ..layers.classify_tokens import BatchClasses
from ..layers.sparse_mlp import SparseMLP
from .measured_token_class import MLPCall

_ROUNDS = 4
_LONG = 0.1  # seconds: two rounds of this length are as good as four short ones


@dataclass(frozen=True)
class MLPTiming:
    """Milliseconds of one forward and backward pass: the minimum over interleaved rounds, which other load affects
    least, rounded to two digits to make plans more reproducible.

    Attributes:
        full: the projections as they were before the patch, with gradients for weights that were trainable.
        dense: the patched MLP with all its neurons, for all tokens, padding included.
        budgets: by budget.
    """

    full: float
    dense: float
    budgets: dict[Budget, float]


@torch.enable_grad()
def time_mlp(mlp: SparseMLP, call: MLPCall, budgets: Sequence[Budget], padding: int = 0) -> MLPTiming:
    """Time an MLP on the tokens of a call, in their dtype or, under autocast, autocast's.

    Only the projections and the activation are run, without the model around them. Gradients have the same relative
    norms by token as in the call.

    Args:
        padding: number of tokens that are not in the call, but that the MLP sees before the patch.
    """
    x = call.x.detach().requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(call.tokens.shape, generator=generator, device="cpu").to(x)
    gradient = (noise * call.energy.sqrt()[:, None].to(x)).view_as(x)
    padded_x, padded_gradient = (
        nn.functional.pad(values.detach().flatten(0, -2), (0, 0, 0, padding)) for values in (x, gradient)
    )
    padded_x.requires_grad_(True)
    ways: dict[Any, Callable[[], object]] = {
        "full": lambda: _full(mlp, padded_x, padded_gradient),
        "dense": lambda: _patched(mlp, padded_x, padded_gradient, None),
    }
    for budget in budgets:
        ways[budget] = lambda budget=budget: _patched(mlp, x, gradient, budget)  # type: ignore[misc]
    seconds: dict[Any, list[float]] = {way: [] for way in ways}
    batch = BatchClasses({} if call.classes is None else {"only": call.classes})
    with mlp.runtime.set_aside("sparse", batch):
        for round_number in range(_ROUNDS):  # the first one fills caches, and seldom has the least
            for way, run in ways.items():
                seconds[way].append(timed(run, x.device))
            if round_number and sum(values[-1] for values in seconds.values()) > _LONG:
                break
    ms = {way: float(f"{1000 * min(values):.2g}") for way, values in seconds.items()}
    return MLPTiming(ms["full"], ms["dense"], {budget: ms[budget] for budget in budgets})


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, including work queued on the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    started = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def _full(mlp: SparseMLP, x: Tensor, gradient: Tensor) -> None:
    wanted: list[Tensor] = []

    def call(path: str, values: Tensor) -> Tensor:
        projection: Any = mlp.parent.get_submodule(path)
        weights = {  # those in 4 bits as they are, never trainable: detached, they would lose their scales
            name: value.detach().requires_grad_() if projection.trainable[name] else value
            for name, value in projection.named_parameters(recurse=False)
        }
        wanted.extend(value for value in weights.values() if value.requires_grad)
        result: Tensor = functional_call(mlp.sources[path], weights, (values,))
        return result

    *inputs, output = mlp.sources
    y = call(output, mlp.index.combine([call(path, x) for path in inputs]))
    torch.autograd.grad(y, [x, *wanted], gradient.to(y.dtype))


def _patched(mlp: SparseMLP, x: Tensor, gradient: Tensor, budget: Budget | None) -> None:
    mlp.runtime.forward = "dense" if budget is None else "sparse"  # until `set_aside` ends
    in_order = sorted(mlp.inputs, key=lambda projection: projection is not mlp.opens)
    with mlp.using(budget):
        found = {projection: projection(x) for projection in in_order}
        y = mlp.output(mlp.index.combine([found[projection] for projection in mlp.inputs]))
    factors = [factor for projection in mlp.projections for factor in projection.update.parameters()]
    torch.autograd.grad(y, [x, *(factor for factor in factors if factor.requires_grad)], gradient.to(y.dtype))
