"""Measures a model on a few real batches, and plans the budget of each MLP.

Two findings make this cheap (`docs/planning.md` has the numbers). To first order, a small error of an MLP's output
changes the loss by its product with the gradient there, so one backward pass is enough to compare all budgets of all
MLPs. And the effects of several MLPs add up, up to a common factor, which a few passes measure. A plan is accepted only
if the predictions and the gradient of the whole model, with all budgets together, are close enough to the dense ones
on a batch to which nothing was fitted.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..config import SubquadConfig
from ..errors import CalibrationError, ConfigError
from ..layers.budget import TokenClass
from ..layers.compensation import Compensation
from ..layers.dense_or_sparse import sparse_forward
from ..layers.patched_mlps import patched_parts, require_patched, require_whole, sparse_mlps, train_updates
from ..layers.preserve_mode_and_rng import preserve_mode_and_rng, seed_devices
from ..layers.sparse_mlp import SparseMLP
from ..ops.mlp_products import without_autocast
from ..patching.patch import apply_plan, patch_model, unpatch_model
from ..plan import Plan
from .choose_budgets import choose
from .divergence import Batch
from .measured_mlp import MeasuredMLP, find_classes, measure_mlps, recorded
from .measured_token_class import MLPCall, TokenClassMeasurements, fit_index, tokens_by_class
from .step_timing import time_steps


def calibrate(
    model: nn.Module, batches: Iterable[Batch], config: SubquadConfig | None = None, tolerance: float | None = None
) -> Plan:
    """Measure a model, patched or not, and plan a budget for each MLP. The model and random states are restored, but
    updates that `get_peft_model` froze after the patch are made trainable again.

    Args:
        model: a model whose outputs have logits or a loss.
        batches: keyword arguments of the model, labels included, on its device and of the size to train with. What is
            fitted to the others is evaluated on the last one. Two or three are enough; with a single one the plan is
            too optimistic.
        config: settings of the patch to plan for, if the model is not patched; a patched model has its own.
        tolerance: overrides the config's.

    Raises:
        CalibrationError: no batches, outputs with neither logits nor a loss, or values that are not finite.
        ConfigError: a config was given for a patched model, or the tolerance is not positive.
        PatchError: the model cannot be patched.
        ParallelismError: FSDP holds its weights in shards.
    """
    batches = list(batches)
    patched = bool(sparse_mlps(model))
    if patched and config is not None:
        raise ConfigError("the model is patched already, and calibrate uses its settings: leave config out")
    if not patched:
        patch_model(model, config)
    _train_updates_beside_adapters(model)
    try:
        with _restored(require_patched(model), always=True):
            return _calibrate(model, batches, tolerance)
    finally:
        if not patched:
            unpatch_model(model)


def plan_and_fit(model: nn.Module, batches: Iterable[Batch]) -> Plan:
    """`calibrate` a patched model, and leave it with the plan's budgets, a fitted index and corrections.

    Raises:
        CalibrationError: as `calibrate`. The model is unchanged.
    """
    with _restored(require_patched(model)):
        plan = _calibrate(model, list(batches), None)
    apply_plan(model, plan)
    return plan


def compensate(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Fit the index of every MLP of a patched model to its inputs, and corrections for the neurons that budgets skip.

    `SubquadCallback` does this at the start of training; in a custom loop, call it after `patch_model` or `apply_plan`.
    Without it the sparse forward is less accurate than the plan says. Updates that `get_peft_model` froze after the
    patch are made trainable again.

    Raises:
        CalibrationError: no batches, or tokens that are not finite or too large to be fitted. Earlier fits are kept.
        ParallelismError: FSDP holds the weights in shards.
    """
    batches = list(batches)
    if not batches:
        raise CalibrationError("compensate needs at least one batch")
    _train_updates_beside_adapters(model)
    runtime, mlps = patched_parts(model)
    mlps = [mlp for mlp in mlps if not mlp.dense]
    if not mlps:
        return
    require_whole(mlps)
    with _restored(mlps), preserve_mode_and_rng(model):
        find_classes(model, runtime, batches)
        calls = recorded(model, mlps, batches)
        with without_autocast(mlps[0].output.weight.device):
            corrections = [_fit_budget(mlp, calls[mlp.name]) for mlp in mlps]
    for mlp, fitted in zip(mlps, corrections, strict=True):
        mlp.corrections = fitted


def _train_updates_beside_adapters(model: nn.Module) -> None:
    if hasattr(model, "peft_config"):
        train_updates(model)


@contextmanager
def _restored(mlps: Sequence[SparseMLP], always: bool = False) -> Iterator[None]:
    """Context manager: after an error, or `always`, budgets, corrections and indices are as before.

    The counts of forward passes are restored in any case: they are of training, and this is none.
    """
    before = [(mlp, mlp.budget, mlp.corrections, mlp.calls, dict(vars(mlp.index))) for mlp in mlps]
    restore = True
    try:
        yield
        restore = always
    finally:
        for mlp, budget, corrections, calls, index in before:
            mlp.calls = calls
            if restore:
                mlp.set_budget(budget)
                mlp.corrections = corrections
                vars(mlp.index).update(index)
                mlp.forget_call()


def _calibrate(model: nn.Module, batches: Sequence[Batch], tolerance: float | None) -> Plan:
    runtime, mlps = patched_parts(model)
    require_whole(mlps)
    config = runtime.config
    tolerance = config.tolerance if tolerance is None else tolerance
    if not tolerance > 0:
        raise ConfigError(f"tolerance must be positive, got {tolerance!r}")
    if not batches:
        raise CalibrationError("calibrate needs at least one batch")
    started = time.perf_counter()
    with preserve_mode_and_rng(model):
        measured, reference, batch = measure_mlps(model, batches)
        classes = next(iter(batch.stacks.values()), None)
        seed_devices(model, config.seed)  # of the rows that are sampled, so that plans repeat
        with sparse_forward(model):
            choice = choose(measured, reference, tolerance)
        del reference  # its gradient is as large as the trained parameters
        for one, option in zip(measured, choice.options, strict=True):
            one.run_with(option.budget)
        step_seconds, planned_seconds = time_steps(model, batches[-1])
    layers = tuple(map(MeasuredMLP.planned, measured, choice.options, choice.reasons))
    saved_ms = 0.0  # outside of the MLPs
    if planned_seconds is not None:
        in_mlps = sum(layer.dense_ms - layer.sparse_ms for layer in layers)
        saved_ms = max(0.0, 1000 * (step_seconds - planned_seconds) - in_mlps)
    padding, context, _ = classes.shares() if classes else (0.0, 0.0, 1.0)
    return Plan(
        tolerance=tolerance,
        loss_increase=choice.fidelity.divergence,
        gradient_cosine=choice.fidelity.cosine,
        step_ms=1000 * step_seconds,
        planning_seconds=time.perf_counter() - started,
        padding_share=padding,
        context_share=context,
        tokens=classes.tokens if classes else measured[0].tokens,
        dtype=measured[0].dtype,
        device=mlps[0].output.weight.device.type,
        tile_size=config.tile_size,
        tile_order=config.tile_order,
        saved_elsewhere_ms=saved_ms,
        layers=layers,
        gradient_noise=choice.noise,
    )


def _fit_budget(mlp: SparseMLP, calls: Sequence[MLPCall]) -> dict[TokenClass, Compensation]:
    """Fit an MLP's index, and the corrections of its budget."""
    by_class = tokens_by_class(calls)
    fit_index(mlp, by_class)
    if mlp.budget.predicted == mlp.budget.context:  # treated alike, in the same tiles
        by_class = {"predicted": torch.cat(list(by_class.values()))}
    found: dict[TokenClass, Compensation] = {}
    for name, tokens in by_class.items():
        if (k := mlp.budget.neurons(name)) is not None:
            measured = TokenClassMeasurements(mlp, [k])
            measured.fit(tokens)
            found[name] = measured.corrections[k]
    return found
