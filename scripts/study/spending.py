"""Three ways to spend the same predicted milliseconds on the neurons of several MLPs.

`uniform` gives every MLP the same share of its neurons, `threshold` the same output error, `allocated` what the
library's global allocation does. Each returns k by MLP, m where the MLP runs dense.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_subquad.layers.compensation import Compensation
from hf_subquad.layers.lookup import sparse_mlps
from hf_subquad.layers.sparse_mlp import SparseMLP
from hf_subquad.planning.allocation import Option, allocate
from hf_subquad.planning.calibration import MeasuredMLP
from hf_subquad.planning.measurements import MLPTimes, share_of
from hf_subquad.planning.mlp_timing import MLPTiming

_SHARES = [step / 256 for step in range(255, 15, -1)]  # that `uniform` tries; below 1/16 nothing is measured
_BISECTIONS = 40


def time_mlps(model: nn.Module, tokens: Mapping[str, Tensor], compensated: bool) -> list[MLPTiming]:
    """Times of every patched MLP on its tokens [N, d], under the installed selection."""
    times, found = MLPTimes(), []
    for mlp in sparse_mlps(model):
        mlp.compensation = _idle_compensation(mlp) if compensated else None
        times.add(mlp, tokens[mlp.name])
        found.append(times.of(mlp))
        mlp.compensation = None
    return found


def uniform(mlps: Sequence[SparseMLP], timings: Sequence[MLPTiming], ms: float) -> list[int]:
    """The greatest share of all MLPs' neurons that takes at most `ms`, or the least one that is tried."""
    for share in _SHARES:
        active = [share_of(mlp, share) for mlp in mlps]
        if predicted_ms(active, mlps, timings) <= ms:
            break
    return active


def threshold(measured: Sequence[MeasuredMLP], ms: float) -> list[int]:
    """The least error, allowed to every MLP alike, that takes at most `ms`, or else the greatest that is known."""
    known = sorted({one.outputs.error(option.active) for one in measured for option in one.options()[:-1]})
    for allowed in known:
        active = [_within(one, allowed).active for one in measured]
        if predicted_ms(active, *_parts(measured)) <= ms:
            break
    return active


def _within(measured: MeasuredMLP, error: float) -> Option:
    """The fastest option with at most this error."""
    *sparse, dense = measured.options()
    allowed = [option for option in sparse if measured.outputs.error(option.active) <= error]
    return min([*allowed, dense], key=lambda option: option.ms)


def allocated(measured: Sequence[MeasuredMLP], ms: float) -> list[int]:
    """The global allocation of the least loss that takes at most `ms`, or else of the fastest."""
    options = [one.options() for one in measured]
    low, high = 0.0, sum(max(option.loss for option in of_mlp) for of_mlp in options)
    best = allocate(options, high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        chosen = allocate(options, middle)
        if sum(option.ms for option in chosen) <= ms:
            best, high = chosen, middle
        else:
            low = middle
    return [option.active for option in best]


WAYS: dict[str, Callable[[Sequence[MeasuredMLP], float], list[int]]] = {
    "uniform": lambda measured, ms: uniform(*_parts(measured), ms),
    "threshold": threshold,
    "allocated": allocated,
}


def predicted_ms(active: Sequence[int], mlps: Sequence[SparseMLP], timings: Sequence[MLPTiming]) -> float:
    return sum(
        timing.dense if k >= mlp.index.neurons else timing.at(k)
        for k, mlp, timing in zip(active, mlps, timings, strict=True)
    )


def _parts(measured: Sequence[MeasuredMLP]) -> tuple[list[SparseMLP], list[MLPTiming]]:
    return [one.mlp for one in measured], [one.timing for one in measured]


def _idle_compensation(mlp: SparseMLP) -> Compensation:
    """One that adds nothing and takes as long as any."""
    basis = mlp.index.sketch.basis
    width = _width(mlp)
    return Compensation(basis, basis.new_zeros(width, len(basis)), basis.new_zeros(width))


def _width(mlp: SparseMLP) -> int:
    """d_out."""
    return mlp.output.rows().shape[1]


def forward_backward(mlp: SparseMLP, x: Tensor) -> None:
    """One pass of an MLP's projections and activation on tokens x [N, d], with gradients of x and of the updates."""
    y = mlp.output(mlp.index.combine([projection(x) for projection in mlp.inputs]))
    factors = [factor for projection in mlp.projections for factor in projection.update.parameters()]
    torch.autograd.grad(y, [x, *factors], torch.ones_like(y))
