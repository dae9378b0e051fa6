"""Measure a patched model on a few real batches, and plan from that what each MLP computes.

Two findings make this cheap (`docs/planning.md` has the numbers). What a sparse MLP does to the model's predictions
grows as the square of its output error, so one forward pass gives the factor, its sensitivity, for all k. And of
several sparse MLPs the effects add up but for a common factor, which one pass with all of them gives.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .allocation import Option, allocate, budgets
from .compensation import CompensationFit
from .config import SubquadConfig
from .errors import CalibrationError, ConfigError
from .layers import SparseMLP
from .measurements import MLPMeasurements, MLPTimes, outputs_by_tiles, seeing_tokens, share_of
from .mlp_timing import MLPTiming, timed
from .patching import (
    dense_forward,
    patch_model,
    require_patched,
    runtime_of,
    sparse_forward,
    sparse_mlps,
    unpatch_model,
)
from .plan import LayerPlan, Plan
from .predictions import Batch, Predictions, logits_of
from .undisturbed import undisturbed

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

    with undisturbed(model), seeing_tokens(model, mlps, see):
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
    measured = {mlp.name: MLPMeasurements(mlp) for mlp in mlps}
    times = MLPTimes()

    def judge(mlp: SparseMLP, tokens: Tensor) -> None:
        measured[mlp.name].judge(tokens)
        times.add(mlp, tokens)

    with undisturbed(model), _restored(mlps):
        with seeing_tokens(model, mlps, lambda mlp, tokens: measured[mlp.name].fit(tokens)):
            for batch in batches[:-1] or batches:
                model(**batch)
        with seeing_tokens(model, mlps, judge):
            dense = Predictions(model, batches[-1])
        for mlp in mlps:
            mlp.compensation = measured[mlp.name].compensation(1)  # of any budget: it is to be timed too
            times.of(mlp)
        step_ms = 1000 * min(_step_seconds(model, batches[-1]) for _ in range(2))
        with sparse_forward(model):
            sensitivities = {mlp.name: _sensitivity(mlps, measured[mlp.name], dense) for mlp in mlps}
            options = [_options(measured[m.name], sensitivities[m.name], times.of(m)) for m in mlps]
            chosen, loss_increase = _choose(options, mlps, measured, dense, tolerance)
    x = times.tokens_of(mlps[0])
    return Plan(
        tolerance=tolerance,
        loss_increase=loss_increase,
        step_ms=step_ms,
        tokens=len(x),
        dtype=str(x.dtype).removeprefix("torch."),
        device=x.device.type,
        tile_size=config.tile_size,
        tile_order=config.tile_order,
        layers=tuple(
            _layer_plan(measured[mlp.name], option, of_mlp, sensitivities[mlp.name], times.of(mlp))
            for mlp, option, of_mlp in zip(mlps, chosen, options, strict=True)
        ),
    )


def _sensitivity(mlps: Sequence[SparseMLP], measured: MLPMeasurements, dense: Predictions) -> float:
    """Nats per squared output error, of one MLP sparse among dense ones."""
    for mlp in mlps:
        mlp.dense = True
    for share in _REFERENCES:
        k = share_of(measured.mlp, share)
        if error := measured.error(k):
            _run_with(measured, k)
            return dense.divergence() / error**2
    return 0.0


def _options(measured: MLPMeasurements, sensitivity: float, timing: MLPTiming) -> list[Option]:
    """What an MLP can be run with: all budgets, and dense."""
    neurons = measured.mlp.index.neurons
    sparse = [Option(k, timing.at(k), sensitivity * measured.error(k) ** 2) for k in budgets(neurons)]
    return [*sparse, Option(neurons, timing.dense, 0.0)]


def _choose(
    options: Sequence[Sequence[Option]],
    mlps: Sequence[SparseMLP],
    measured: Mapping[str, MLPMeasurements],
    dense: Predictions,
    tolerance: float,
) -> tuple[list[Option], float]:
    """An option for each MLP, with a joint divergence, which is measured and returned, of at most the tolerance."""
    factor = _JOINT_FACTOR
    best, best_increase = [of_mlp[-1] for of_mlp in options], 0.0
    for _ in range(_ROUNDS):
        allocated = allocate(options, tolerance / factor)
        single = sum(option.loss for option in allocated)
        for mlp, option in zip(mlps, allocated, strict=True):
            _run_with(measured[mlp.name], option.active)
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


def _layer_plan(
    measured: MLPMeasurements, chosen: Option, options: Sequence[Option], sensitivity: float, timing: MLPTiming
) -> LayerPlan:
    neurons = measured.mlp.index.neurons
    return LayerPlan(
        name=measured.mlp.bare_name,
        neurons=neurons,
        active=chosen.active,
        break_even=next(option.active for option in options if option.ms >= timing.dense),
        error=measured.error(chosen.active) if chosen.active < neurons else 0.0,
        sensitivity=sensitivity,
        full_ms=timing.full,
        dense_ms=timing.dense,
        sparse_ms=chosen.ms,
    )


def _run_with(measured: MLPMeasurements, k: int) -> None:
    measured.mlp.set_active(k)
    measured.mlp.compensation = None if measured.mlp.dense else measured.compensation(k)


def _milliseconds(options: Sequence[Option]) -> float:
    return sum(option.ms for option in options)


def _step_seconds(model: nn.Module, batch: Batch) -> float:
    """Forward and backward of the whole model, dense. Hooks that wait for gradients (DDP's) are not called."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        logits = logits_of(model, batch)
        torch.autograd.grad(logits, trained, torch.ones_like(logits), allow_unused=True)

    with torch.enable_grad(), dense_forward(model):
        return timed(step, trained[0].device)


@contextmanager
def _restored(mlps: Sequence[SparseMLP]) -> Iterator[None]:
    before = [(mlp, mlp.k, mlp.dense, mlp.compensation, mlp.calls) for mlp in mlps]
    try:
        yield
    finally:
        for mlp, k, dense, compensation, calls in before:
            mlp.k, mlp.dense, mlp.compensation, mlp.calls = k, dense, compensation, calls
