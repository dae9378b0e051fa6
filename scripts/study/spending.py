"""Three ways to spend the same predicted milliseconds on the neurons of several MLPs.

`uniform` gives every MLP the same share of its neurons, `threshold` the same output error, `allocated` what the
library's global allocation does. Each returns k by MLP, m where the MLP runs dense.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_subquad import sparse_forward
from hf_subquad.allocation import Option, allocate, budgets
from hf_subquad.compensation import Compensation
from hf_subquad.layers import SparseMLP
from hf_subquad.measurements import MLPMeasurements, MLPTimes, seeing_tokens, share_of
from hf_subquad.mlp_timing import MLPTiming
from hf_subquad.patching import sparse_mlps
from hf_subquad.predictions import Batch, Predictions
from hf_subquad.undisturbed import undisturbed

_REFERENCE = 1 / 8  # share at which sensitivities are measured, as the library does
_SHARES = [step / 256 for step in range(255, 15, -1)]  # that `uniform` tries; below 1/16 nothing is measured
_BISECTIONS = 40
_ROUNDS = 2


@dataclass(frozen=True)
class Measured:
    """What is known of one MLP under the selection and with the compensation that is studied.

    Attributes:
        sensitivity: nats that the model's predictions move, per squared output error of this MLP alone.
    """

    mlp: SparseMLP
    outputs: MLPMeasurements
    timing: MLPTiming
    sensitivity: float

    def option(self, k: int) -> Option:
        if k >= self.mlp.index.neurons:
            return Option(self.mlp.index.neurons, self.timing.dense, 0.0)
        return Option(k, self.timing.at(k), self.sensitivity * self.outputs.error(k) ** 2)

    def options(self) -> list[Option]:
        neurons = self.mlp.index.neurons
        return [self.option(k) for k in (*budgets(neurons), neurons)]

    def row(self) -> dict[str, Any]:
        errors = [{"active": k, "error": self.outputs.error(k)} for k in budgets(self.mlp.index.neurons)]
        return {
            "name": self.mlp.bare_name,
            "neurons": self.mlp.index.neurons,
            "sensitivity": self.sensitivity,
            "full_ms": self.timing.full,
            "dense_ms": self.timing.dense,
            "sparse_ms": self.timing.sparse,
            "errors": errors,
        }


class _Uncompensated(MLPMeasurements):
    """Output errors of an MLP without compensation: all of it is fitted to nothing being missed."""

    def fit(self, tokens: Tensor) -> None:
        nothing = tokens.new_zeros(len(tokens), _width(self.mlp))
        for fit in self._fits.values():
            fit.add(tokens, nothing)


def time_mlps(model: nn.Module, tokens: Mapping[str, Tensor], compensated: bool) -> list[MLPTiming]:
    """Times of every patched MLP on its tokens [N, d], under the installed selection."""
    times, found = MLPTimes(), []
    for mlp in sparse_mlps(model):
        mlp.compensation = _idle_compensation(mlp) if compensated else None
        times.add(mlp, tokens[mlp.name])
        found.append(times.of(mlp))
        mlp.compensation = None
    return found


def time_both(model: nn.Module, tokens: Mapping[str, Tensor]) -> dict[bool, list[MLPTiming]]:
    """`time_mlps` without and with compensation, in turns, so that the two can be compared; the least of all rounds."""
    rounds = [(time_mlps(model, tokens, False), time_mlps(model, tokens, True)) for _ in range(_ROUNDS)]
    found: dict[bool, list[MLPTiming]] = {False: [], True: []}
    for number in range(len(sparse_mlps(model))):
        timings = [tuple(timing[number] for timing in pair) for pair in rounds]
        full = min(timing.full for pair in timings for timing in pair)
        dense = min(timing.dense for pair in timings for timing in pair)
        for compensated in found:
            of_kind = [pair[compensated].sparse for pair in timings]
            sparse = {k: min(sparse[k] for sparse in of_kind) for k in of_kind[0]}
            found[compensated].append(MLPTiming(full, dense, sparse))
    return found


def measure(
    model: nn.Module, batches: Sequence[Batch], timings: Sequence[MLPTiming], compensated: bool
) -> tuple[list[Measured], Predictions]:
    """Measure as `hf_subquad.calibrate` does, under the installed selection; the last batch judges.

    Returns:
        By MLP, and the dense predictions on the judging batch.
    """
    mlps = sparse_mlps(model)
    outputs = {mlp.name: (MLPMeasurements if compensated else _Uncompensated)(mlp) for mlp in mlps}
    with undisturbed(model):
        with seeing_tokens(model, mlps, lambda mlp, tokens: outputs[mlp.name].fit(tokens)):
            for batch in batches[:-1] or batches:
                model(**batch)
        with seeing_tokens(model, mlps, lambda mlp, tokens: outputs[mlp.name].judge(tokens)):
            dense = Predictions(model, batches[-1])
        measured = [
            Measured(mlp, outputs[mlp.name], timing, _sensitivity(model, mlp, outputs[mlp.name], dense, compensated))
            for mlp, timing in zip(mlps, timings, strict=True)
        ]
    return measured, dense


def _sensitivity(
    model: nn.Module, mlp: SparseMLP, outputs: MLPMeasurements, dense: Predictions, compensated: bool
) -> float:
    k = share_of(mlp, _REFERENCE)
    for other in sparse_mlps(model):
        other.dense = True
    mlp.set_active(k)
    mlp.compensation = outputs.compensation(k) if compensated else None
    with sparse_forward(model):
        divergence = dense.divergence()
    error = outputs.error(k)
    return divergence / error**2 if error else 0.0


def uniform(mlps: Sequence[SparseMLP], timings: Sequence[MLPTiming], ms: float) -> list[int]:
    """The greatest share of all MLPs' neurons that takes at most `ms`, or the least one that is tried."""
    for share in _SHARES:
        active = [share_of(mlp, share) for mlp in mlps]
        if predicted_ms(active, mlps, timings) <= ms:
            break
    return active


def threshold(measured: Sequence[Measured], ms: float) -> list[int]:
    """The least error, allowed to every MLP alike, that takes at most `ms`, or else the greatest that is known."""
    known = sorted({one.outputs.error(option.active) for one in measured for option in one.options()[:-1]})
    for allowed in known:
        active = [_within(one, allowed).active for one in measured]
        if predicted_ms(active, *_parts(measured)) <= ms:
            break
    return active


def _within(measured: Measured, error: float) -> Option:
    """The fastest option with at most this error."""
    *sparse, dense = measured.options()
    allowed = [option for option in sparse if measured.outputs.error(option.active) <= error]
    return min([*allowed, dense], key=lambda option: option.ms)


def allocated(measured: Sequence[Measured], ms: float) -> list[int]:
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


WAYS: dict[str, Callable[[Sequence[Measured], float], list[int]]] = {
    "uniform": lambda measured, ms: uniform(*_parts(measured), ms),
    "threshold": threshold,
    "allocated": allocated,
}


def predicted_ms(active: Sequence[int], mlps: Sequence[SparseMLP], timings: Sequence[MLPTiming]) -> float:
    return sum(
        timing.dense if k >= mlp.index.neurons else timing.at(k)
        for k, mlp, timing in zip(active, mlps, timings, strict=True)
    )


def _parts(measured: Sequence[Measured]) -> tuple[list[SparseMLP], list[MLPTiming]]:
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
