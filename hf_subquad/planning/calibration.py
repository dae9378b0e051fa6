"""Measure a patched model on a few real batches, and plan from that what each MLP computes.

Two findings make this cheap (`docs/planning.md` has the numbers). What a sparse MLP does to the model's predictions
grows as the square of its output error, so one forward pass gives the factor, its sensitivity, for all k. And of
several sparse MLPs the effects add up but for a common factor, which one pass with all of them gives.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import SubquadConfig
from ..errors import CalibrationError, ConfigError
from ..layers.compensation import CompensationFit
from ..layers.lookup import require_patched, runtime_of, sparse_mlps
from ..layers.modes import sparse_forward
from ..layers.preserve_mode_and_rng import preserve_mode_and_rng
from ..layers.sparse_mlp import SparseMLP
from ..patching.patch import patch_model, unpatch_model
from ..plan import LayerPlan, Plan
from .allocation import Option, allocate, budgets
from .measurements import MLPMeasurements, MLPTimes, outputs_by_tiles, seeing_tokens, share_of
from .mlp_timing import MLPTiming, timed
from .predictions import Batch, Predictions, logits_of

# Shares at which sensitivities are measured, the first with an error: small enough to stand out from rounding.
_REFERENCES = (1 / 8, 1 / 16)
_JOINT_FACTOR = 2.0  # usual ratio of the joint effect to the sum of single ones, to begin with
_ROUNDS = 6
_CLOSE_ENOUGH = 0.9  # of the tolerance spent


def calibrate(
    model: nn.Module, batches: Iterable[Batch], config: SubquadConfig | None = None, tolerance: float | None = None
) -> Plan:
    """Measure, and allocate budgets. The model is left as it was, patched or not, random states included.

    Args:
        model: whose outputs have logits: scores of classes, or one value for regression.
        batches: keyword arguments of the model, on its device and of the size to train with. The last one judges what
            is fitted to the others; two or three will do, from one alone the plan is too hopeful.
        config: of the patch to plan for, if the model is not patched; a patched one has its own.
        tolerance: instead of the config's.

    Raises:
        CalibrationError: no batches, outputs without logits, or values that are not finite.
        ConfigError: a config was given for a patched model, or the tolerance is not positive.
        PatchError: the model cannot be patched.
    """
    batches = list(batches)
    if sparse_mlps(model):
        if config is not None:
            raise ConfigError("the model is patched already, and planned for with its own settings: leave config out")
        return _calibrate(model, batches, tolerance)
    patch_model(model, config)
    try:
        return _calibrate(model, batches, tolerance)
    finally:
        unpatch_model(model)


def compensate(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Fit, for every sparse MLP of a patched model, what stands in for the neurons that its budget skips.

    The callback does this at the start of training; a custom loop does it after `patch_model`. Without it the sparse
    forward is less accurate, and a plan promises too much.

    Raises:
        CalibrationError: no batches, or tokens that are not finite or too large to be fitted. What was fitted before
            stays.
    """
    batches = list(batches)
    if not batches:
        raise CalibrationError("compensate needs at least one batch")
    mlps = [mlp for mlp in require_patched(model) if not mlp.dense]
    if not mlps:
        return
    fits = {mlp.name: CompensationFit(mlp.index.sketch.basis) for mlp in mlps}

    def see(mlp: SparseMLP, tokens: Tensor) -> None:
        for x, _, missed in outputs_by_tiles(mlp, tokens, [mlp.k]):
            fits[mlp.name].add(x, missed[mlp.k])

    with preserve_mode_and_rng(model), seeing_tokens(model, mlps, see):
        for batch in batches:
            model(**batch)
    solved = [fits[mlp.name].solve() for mlp in mlps]
    for mlp, compensation in zip(mlps, solved, strict=True):
        mlp.compensation = compensation


def _calibrate(model: nn.Module, batches: Sequence[Batch], tolerance: float | None) -> Plan:
    mlps, config = require_patched(model), runtime_of(model).config
    tolerance = config.tolerance if tolerance is None else tolerance
    if not tolerance > 0:
        raise ConfigError(f"tolerance must be positive, got {tolerance!r}")
    if not batches:
        raise CalibrationError("calibrate needs at least one batch")
    with preserve_mode_and_rng(model), _restored(mlps):
        measured, dense, step_seconds = measure_mlps(model, batches)
        with sparse_forward(model):
            chosen, loss_increase = _choose(measured, dense, tolerance)
    return Plan(
        tolerance=tolerance,
        loss_increase=loss_increase,
        step_ms=1000 * step_seconds,
        tokens=len(measured[0].tokens),
        dtype=str(measured[0].tokens.dtype).removeprefix("torch."),
        device=measured[0].tokens.device.type,
        tile_size=config.tile_size,
        tile_order=config.tile_order,
        layers=tuple(_layer_plan(one, option) for one, option in zip(measured, chosen, strict=True)),
    )


@dataclass(frozen=True)
class MeasuredMLP:
    """What is known of one MLP, from which its budget is chosen.

    Attributes:
        tokens: [N, d], such as it was timed on.
        outputs: by k, the error of its output and what compensates it.
        sensitivity: nats that the model's predictions move per squared output error of this MLP alone.
    """

    mlp: SparseMLP
    tokens: Tensor
    outputs: MLPMeasurements
    timing: MLPTiming
    sensitivity: float

    def option(self, k: int) -> Option:
        if k >= self.mlp.index.neurons:
            return Option(self.mlp.index.neurons, self.timing.dense, 0.0)
        return Option(k, self.timing.at(k), self.sensitivity * self.outputs.error(k) ** 2)

    def options(self) -> list[Option]:
        """What it can be run with: all budgets, and dense."""
        neurons = self.mlp.index.neurons
        return [self.option(k) for k in (*budgets(neurons), neurons)]


def measure_mlps(model: nn.Module, batches: Sequence[Batch]) -> tuple[list[MeasuredMLP], Predictions, float]:
    """Measure every sparse MLP of a patched model. Budgets and compensations are left at what was tried last.

    Returns:
        The MLPs; the dense model's predictions on the last batch, which judges what is fitted to the others; and the
        seconds of a dense step on it.
    """
    mlps = sparse_mlps(model)
    outputs = {mlp.name: MLPMeasurements(mlp) for mlp in mlps}
    times = MLPTimes()
    with seeing_tokens(model, mlps, lambda mlp, tokens: outputs[mlp.name].fit(tokens)):
        for batch in batches[:-1] or batches:
            model(**batch)
    judged: dict[str, Tensor] = {}  # the step holds these tokens too
    with seeing_tokens(model, mlps, lambda mlp, tokens: judged.update({mlp.name: tokens})):
        dense, step_seconds = _dense_step(model, batches[-1])
    with torch.autocast(mlps[0].output.weight.device.type, enabled=False):
        for mlp in mlps:
            outputs[mlp.name].judge(judged[mlp.name])
            times.add(mlp, judged[mlp.name])
    judged.clear()
    for mlp in mlps:
        mlp.compensation = outputs[mlp.name].compensation(1)  # of any budget: it is to be timed too
        times.of(mlp)
    sensitivities = _sensitivities(model, outputs, dense)
    measured = [
        MeasuredMLP(mlp, times.tokens_of(mlp), outputs[mlp.name], times.of(mlp), sensitivities[mlp.name])
        for mlp in mlps
    ]
    return measured, dense, step_seconds


def _dense_step(model: nn.Module, batch: Batch) -> tuple[Predictions, float]:
    """Predictions, and the seconds of forward and backward. Hooks that wait for gradients (DDP's) are not called."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found: list[Tensor] = []

    def step() -> None:
        logits = logits_of(model, batch)
        torch.autograd.grad(logits, trained, torch.ones_like(logits), allow_unused=True)
        found[:] = [logits.detach()]

    with torch.enable_grad():
        if trained[0].device.type != "cpu":
            step()  # loads kernels
        seconds = timed(step, trained[0].device)
    return Predictions(model, batch, found[0]), seconds


def _sensitivities(model: nn.Module, outputs: Mapping[str, MLPMeasurements], dense: Predictions) -> dict[str, float]:
    """Nats per squared output error, of each MLP sparse among dense ones, on as many rows as predictions are judged of.

    The errors are those on the same rows: the fewer tokens there are, the less those of a tile resemble each other.
    """
    errors = {name: one.errors for name, one in outputs.items()}
    for one in outputs.values():
        one.mlp.dense = True
    if (rows := dense.some_rows()) is not None:
        mlps, on_rows = [one.mlp for one in outputs.values()], {}
        try:
            with seeing_tokens(model, mlps, lambda mlp, x: on_rows.update({mlp.name: outputs[mlp.name].errors_on(x)})):
                some = Predictions(model, rows)
            errors, dense = on_rows, some
        except CalibrationError:  # a model that routes tokens does not run every MLP on so few: take the whole batch
            pass
    with sparse_forward(model):
        return {name: _sensitivity(one, errors[name], dense) for name, one in outputs.items()}


def _sensitivity(outputs: MLPMeasurements, errors: Mapping[int, float], dense: Predictions) -> float:
    for share in _REFERENCES:
        k = share_of(outputs.mlp, share)
        if errors[k]:
            _run_with(outputs, k)
            divergence = dense.divergence()
            outputs.mlp.dense = True
            return divergence / errors[k] ** 2
    return 0.0


def _choose(measured: Sequence[MeasuredMLP], dense: Predictions, tolerance: float) -> tuple[list[Option], float]:
    """An option for each MLP, with a joint divergence, which is measured and returned, of at most the tolerance."""
    options = [one.options() for one in measured]
    factor = _JOINT_FACTOR
    best, best_increase = [of_mlp[-1] for of_mlp in options], 0.0
    for _ in range(_ROUNDS):
        allocated = allocate(options, tolerance / factor)
        single = sum(option.loss for option in allocated)
        for one, option in zip(measured, allocated, strict=True):
            _run_with(one.outputs, option.active)
        joint = dense.divergence()
        if joint <= tolerance and _milliseconds(allocated) <= _milliseconds(best):
            best, best_increase = allocated, joint
        fastest = allocated == [min(of_mlp, key=lambda option: option.ms) for of_mlp in options]
        if joint <= tolerance and (fastest or not joint or joint >= _CLOSE_ENOUGH * tolerance):
            break
        if not single:  # single effects say nothing here: only dense is safe
            break
        found = joint / single
        factor = max(1.02 * found, 1.05 * factor) if joint > tolerance else max(found, factor / 4)
    return best, best_increase


def _layer_plan(measured: MeasuredMLP, chosen: Option) -> LayerPlan:
    neurons, timing = measured.mlp.index.neurons, measured.timing
    return LayerPlan(
        name=measured.mlp.name,
        neurons=neurons,
        active=chosen.active,
        break_even=next(option.active for option in measured.options() if option.ms >= timing.dense),
        error=measured.outputs.error(chosen.active) if chosen.active < neurons else 0.0,
        sensitivity=measured.sensitivity,
        full_ms=timing.full,
        dense_ms=timing.dense,
        sparse_ms=chosen.ms,
    )


def _run_with(outputs: MLPMeasurements, k: int) -> None:
    outputs.mlp.set_active(k)
    outputs.mlp.compensation = None if outputs.mlp.dense else outputs.compensation(k)


def _milliseconds(options: Sequence[Option]) -> float:
    return sum(option.ms for option in options)


@contextmanager
def _restored(mlps: Sequence[SparseMLP]) -> Iterator[None]:
    before = [(mlp, mlp.k, mlp.dense, mlp.compensation, mlp.calls) for mlp in mlps]
    try:
        yield
    finally:
        for mlp, k, dense, compensation, calls in before:
            mlp.k, mlp.dense, mlp.compensation, mlp.calls = k, dense, compensation, calls
