"""Budgets and compensations from the Trainer's own data, the same on every rank."""

from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.utils import logging

from ..errors import CalibrationError
from ..layers.compensation import Compensation
from ..layers.lookup import patched_parts, require_patched
from ..layers.preserve_mode_and_rng import preserve_mode_and_rng
from ..patching.patch import apply_plan
from ..plan import Plan
from ..planning.calibration import calibrate, compensate
from .trainer_batches import sample_batches

_BATCHES = 3

logger = logging.get_logger(__name__)


def fit_on_training_data(model: nn.Module, dataloader: DataLoader[Any], rows: int, args: TrainingArguments) -> None:
    """Plan budgets and fit compensations on batches of so many rows, where neither was done before.

    One rank does it, since each would measure other times and may draw other batches, and all follow. What cannot be
    planned or fitted is a warning: training goes on with the budgets that there are.
    """
    runtime, mlps = patched_parts(model)
    plans = runtime.plan is None and runtime.config.active is None
    if not plans and any(mlp.compensation for mlp in mlps):
        return
    shared: list[Any] = [None]
    if args.process_index == 0:
        with preserve_mode_and_rng(model):
            batches = sample_batches(dataloader, rows, _BATCHES, args.device)
        shared = [_planned_and_fitted(model, batches, plans)]
    broadcast_object_list(shared)
    if isinstance(shared[0], CalibrationError):
        logger.warning_once(
            f"nothing could be planned or fitted on the training data: {shared[0]}. Budgets stay as they are, "
            f"{mlps[-1].active} of {mlps[-1].index.neurons} neurons in {mlps[-1].name}. Call `calibrate` and "
            "`compensate` with batches of your own"
        )
        return
    plan, compensations = shared[0]
    if plan is not None:
        apply_plan(model, plan)
    for mlp, compensation in zip(mlps, compensations, strict=True):
        mlp.compensation = compensation and compensation.to(mlp.output.weight.device)


def _planned_and_fitted(
    model: nn.Module, batches: list[Any], plans: bool
) -> tuple[Plan | None, list[Compensation | None]] | CalibrationError:
    """A plan, if there is to be one, and the compensations, on the CPU, of the MLPs with their budgets."""
    try:
        if not batches:
            raise CalibrationError("the dataset can only be iterated")
        plan = calibrate(model, batches) if plans else None
        if plan is not None:
            apply_plan(model, plan)
        compensate(model, batches)
    except CalibrationError as error:
        return error
    fitted = (mlp.compensation for mlp in require_patched(model))
    return plan, [compensation and compensation.to(torch.device("cpu")) for compensation in fitted]
