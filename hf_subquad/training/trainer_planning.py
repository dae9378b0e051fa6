"""Plans budgets and fits indices and corrections on the Trainer's own data, with the same result on every rank."""

import time
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, send_to_device
from torch import nn
from transformers import TrainingArguments

from ..errors import CalibrationError
from ..layers.attention_patch import use_sequence_attention, uses_sequence_attention
from ..layers.budget import Budget
from ..layers.patched_mlps import patched_parts
from ..layers.preserve_mode_and_rng import preserve_mode_and_rng
from ..layers.sparse_mlp import SparseMLP
from ..logs import get_logger
from ..patching.patch import apply_plan
from ..plan import Plan
from ..planning.make_plan import compensate, plan_and_fit
from .trainer_batches import sample_batches

_BATCHES = 3

logger = get_logger(__name__)


def fit_on_training_data(
    model: nn.Module, dataloader: Any, rows: int, args: TrainingArguments, without_labels: bool = False
) -> None:
    """Plan budgets and fit indices and corrections on batches of `rows` rows, unless that is done already.

    With `without_labels` the model will be called without them, so that token classes will not be known.

    Only rank 0 does it, and all ranks use its result, because each would measure different times and may draw different
    batches. Any failure becomes a warning and does not stop training: MLPs then run dense, or with the budgets that
    they were given.
    """
    runtime, mlps = patched_parts(model)
    plans = runtime.plan is None and runtime.config.active is None
    if not plans and (any(mlp.corrections for mlp in mlps) or all(mlp.dense for mlp in mlps)):
        return
    shared: list[Any] = [None]
    if args.process_index == 0:
        runtime.without_labels = without_labels
        try:
            shared = [_planned_and_fitted(model, mlps, dataloader, rows, args.device, plans)]
        finally:
            runtime.without_labels = False
    broadcast_object_list(shared)
    if isinstance(shared[0], str):
        consequence = "MLPs keep the budgets that they were given, and are less accurate than with a fitted index"
        if plans:
            consequence = "MLPs run dense"
            for mlp in mlps:
                mlp.set_budget(Budget())
        logger.warning_once(
            f"planning or fitting on the training data failed ({shared[0]}). {consequence}. To do it by hand before "
            "creating the Trainer, with two or three batches of keyword arguments for the model: "
            "apply_plan(model, calibrate(model, batches)); compensate(model, batches)"
        )
        return
    plan, fitted, runtime.padding.may_skip, by_sequence = shared[0]
    if plan is not None:
        apply_plan(model, plan)
    if args.process_index:
        if by_sequence:
            use_sequence_attention(model)
        for mlp, one in zip(mlps, fitted, strict=True):
            summary, mlp.corrections = send_to_device(one, mlp.output.weight.device)
            mlp.index.adopt(summary)


def _planned_and_fitted(
    model: nn.Module, mlps: list[SparseMLP], dataloader: Any, rows: int, device: torch.device, plans: bool
) -> tuple[Plan | None, list[Any], bool | None, bool] | str:
    """A plan, if one is wanted; what was fitted for each MLP, on the CPU: the summary of its tokens for the index, and
    its corrections; whether padding is skipped, and whether attention skips it, too. Or the reason why that failed."""
    started = time.perf_counter()
    here = mlps[0].output.weight.device
    try:
        if here.type != device.type:  # FSDP moves the model later
            raise CalibrationError(f"the model is on {here} now, and will be trained on {device}")
        with preserve_mode_and_rng(model):
            batches = sample_batches(dataloader, rows, _BATCHES, device)
        logger.info(
            f"{'planning' if plans else 'fitting'} {len(mlps)} MLPs on {len(batches)} batches of the training data"
        )
        plan = plan_and_fit(model, batches) if plans else None
        if plan is None:
            compensate(model, batches)
    except Exception as error:  # the user's data and model may raise anything here, and train nevertheless
        return f"{type(error).__name__}: {error}"
    logger.info(f"{'planning' if plans else 'fitting'} took {time.perf_counter() - started:.1f} s")
    fitted = send_to_device([(mlp.index.summary, mlp.corrections) for mlp in mlps], torch.device("cpu"))
    return plan, fitted, mlps[0].runtime.padding.may_skip, uses_sequence_attention(model)
