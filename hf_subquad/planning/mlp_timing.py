"""How long one MLP takes, forward and backward: before the patch, dense, and sparse at several k."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ..layers.sparse_mlp import SparseMLP

_ROUNDS = 4
_LONG = 0.1  # seconds: two rounds of this length are as good as four short ones


@dataclass(frozen=True)
class MLPTiming:
    """Milliseconds of one forward and backward pass: the least of interleaved rounds, which other load disturbs least.

    Attributes:
        full: the projections as they were before the patch, with gradients for weights that were trainable.
        dense: the patched MLP with all its neurons.
        sparse: by k.
    """

    full: float
    dense: float
    sparse: dict[int, float]

    def at(self, k: int) -> float:
        """Sparse milliseconds at any k, on the straight line through the least and the greatest k measured; below, not
        less than in proportion."""
        (low, low_ms), (high, high_ms) = min(self.sparse.items()), max(self.sparse.items())
        slope = max(0.0, high_ms - low_ms) / max(1, high - low)
        return max(low_ms + slope * (k - low), low_ms * min(1.0, k / low))


@torch.enable_grad()
def time_mlp(mlp: SparseMLP, x: Tensor, ks: Sequence[int]) -> MLPTiming:
    """Time an MLP on tokens x [N, d], in the dtype of x or, under autocast, autocast's.

    The projections and the activation are run by themselves, without what the model computes around them.
    """
    x = x.detach().requires_grad_(True)
    ways: dict[Any, Callable[[], object]] = {"full": lambda: _full(mlp, x), "dense": lambda: _patched(mlp, x, None)}
    for k in ks:
        ways[k] = lambda k=k: _patched(mlp, x, k)  # type: ignore[misc]
    seconds: dict[Any, list[float]] = {way: [] for way in ways}
    for round_number in range(_ROUNDS):  # the first one fills caches, and seldom has the least
        for way, run in ways.items():
            seconds[way].append(timed(run, x.device))
        if round_number and sum(values[-1] for values in seconds.values()) > _LONG:
            break
    ms = {way: 1000 * min(values) for way, values in seconds.items()}
    return MLPTiming(ms["full"], ms["dense"], {k: ms[k] for k in ks})


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, the device's queue included."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    started = time.perf_counter()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def _full(mlp: SparseMLP, x: Tensor) -> None:
    wanted: list[Tensor] = []

    def call(path: str, values: Tensor) -> Tensor:
        source, trainable = mlp.sources[path], mlp.trainable[path]
        weights = {
            name: value.detach().requires_grad_(trainable[name])
            for name, value in mlp.parent.get_submodule(path).named_parameters(recurse=False)
        }
        wanted.extend(value for value in weights.values() if value.requires_grad)
        result: Tensor = functional_call(source, weights, (values,))
        return result

    *inputs, output = mlp.sources
    y = call(output, mlp.index.combine([call(path, x) for path in inputs]))
    torch.autograd.grad(y, [x, *wanted], torch.ones_like(y))


def _patched(mlp: SparseMLP, x: Tensor, k: int | None) -> None:
    before = mlp.k, mlp.dense, mlp.runtime.forward
    mlp.dense, mlp.runtime.forward = k is None, "dense" if k is None else "sparse"
    mlp.k = mlp.k if k is None else k
    try:
        y = mlp.output(mlp.index.combine([projection(x) for projection in mlp.inputs]))
    finally:
        mlp.k, mlp.dense, mlp.runtime.forward = before
    factors = [factor for projection in mlp.projections for factor in projection.update.parameters()]
    torch.autograd.grad(y, [x, *(factor for factor in factors if factor.requires_grad)], torch.ones_like(y))
