"""The Trainer callback: hands every event to the function that does the work. It keeps nothing itself."""

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .calibration import calibrate, compensate
from .errors import CalibrationError, InactivePatchError, SidecarError
from .patching import apply_plan, patched_parts, require_patched, runtime_of
from .plan import Plan
from .sidecar import SIDECAR_NAME, load_sidecar, save_sidecar
from .sync import check_active, restart_moments, sync_model, train_updates
from .trainer_batches import sample_batches
from .undisturbed import undisturbed

PLAN_NAME = "subquad_plan.json"

_CALIBRATION_BATCHES = 3

logger = logging.get_logger(__name__)


class SubquadCallback(TrainerCallback):
    """Keeps a patched model in sync during `Trainer.train()`.

    There is nothing to configure: settings belong to `SubquadConfig`. Raises a typed error at the start of training
    if the patch would not take effect; plans budgets from batches of the training data, if there is neither a plan nor
    a fixed `active`, and fits what compensates for skipped neurons; folds, audits and adjusts budgets on schedule; adds
    `subquad/...` to the Trainer's logs; writes and reads the sidecar of each checkpoint.
    """

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        runtime_of(model)
        if args.use_liger_kernel:
            raise InactivePatchError(
                "use_liger_kernel=True rebinds the MLPs' forward and would bypass the patch: set it to False"
            )
        train_updates(model)
        self._move_first(sys._getframe(1).f_locals.get("self"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        optimizer: Any = None, train_dataloader: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if state.global_step:
            resumed_from = _resumed_from(sys._getframe(1)) or _checkpoint_folder(args, state)
            self._resume(Path(resumed_from), state, model, optimizer)
        check_active(model, optimizer)
        self._move_first(sys._getframe(1).f_locals.get("self"))  # for a callback that came by add_callback
        self._fit(args, model, train_dataloader)
        runtime = runtime_of(model)
        if runtime.plan is not None and state.is_world_process_zero:
            print(runtime.plan.table(), flush=True)
            os.makedirs(args.output_dir, exist_ok=True)
            runtime.plan.save(Path(args.output_dir) / PLAN_NAME)
        sync_model(model, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        optimizer: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        runtime, mlps = patched_parts(model)
        calls = sum(mlp.calls for mlp in mlps)
        if runtime.sparse(training=True) and not all(mlp.dense for mlp in mlps) and calls == runtime.seen_calls:
            raise InactivePatchError(
                "a training step ran, but no patched MLP did: is the Trainer training the model that was patched?"
            )
        runtime.seen_calls = calls
        report = sync_model(model, state.global_step, optimizer)
        if state.is_world_process_zero:
            for change in report.changes:
                logger.warning(f"step {state.global_step}: {change}")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        logs: dict[str, float] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        runtime = runtime_of(model)
        if logs is None or "loss" not in logs or runtime.last_report is None:
            return
        figures = runtime.last_report.metrics()
        if runtime.plan is not None:
            figures["subquad/planned_loss_increase"] = runtime.plan.loss_increase
            figures["subquad/planned_step_speedup"] = runtime.plan.step_speedup
        logs.update(figures)  # seen by the callbacks after this one
        state.log_history[-1].update(figures)  # the Trainer stored a copy already

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero:
            save_sidecar(model, _checkpoint_folder(args, state), state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        # The Trainer has loaded the best adapters; the updates that go with them are in the sidecar beside them.
        if not hasattr(model, "peft_config"):
            return
        if args.load_best_model_at_end and state.best_model_checkpoint:
            load_sidecar(model, state.best_model_checkpoint)
        logger.warning_once(
            "beside PEFT, save_model and save_pretrained write PEFT's adapters only, without what the MLPs learnt: "
            "save with model.merge_and_unload().save_pretrained(folder)"
        )

    def _move_first(self, handler: Any) -> None:
        """Put this callback before the reporting ones, so that what it adds to `logs` reaches them.

        The Trainer appends the user's callbacks after TensorBoard, W&B and the like, and hands callbacks no
        reference to their handler; the handler is the caller of `on_init_end`.
        """
        if isinstance(handler, CallbackHandler) and self in handler.callbacks:
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)
        else:
            logger.warning("subquad/... will be in the Trainer's log history, but not in its reporting integrations")

    def _fit(self, args: TrainingArguments, model: nn.Module, dataloader: Any) -> None:
        """Plan budgets and fit compensations on batches of the training data, where neither was done before.

        One rank plans, since each would measure other times, and all follow.
        """
        runtime, mlps = patched_parts(model)
        plans = runtime.plan is None and runtime.config.active is None
        if not plans and any(mlp.compensation for mlp in mlps):
            return
        with undisturbed(model):
            batches = sample_batches(dataloader, args.train_batch_size, _CALIBRATION_BATCHES, args.device)
        try:
            if not batches:
                raise CalibrationError("the dataset can only be iterated")
            if plans:
                shared = [_planned(model, batches) if args.process_index == 0 else None]
                broadcast_object_list(shared)
                if isinstance(shared[0], CalibrationError):
                    raise shared[0]
                apply_plan(model, shared[0])
            compensate(model, batches)
        except CalibrationError as error:
            logger.warning_once(
                f"nothing could be planned or fitted on the training data: {error}. Budgets stay as they are, "
                f"{mlps[-1].active} of {mlps[-1].index.neurons} neurons in {mlps[-1].name}. Call `calibrate` and "
                "`compensate` with batches of your own"
            )

    def _resume(self, folder: Path, state: TrainerState, model: nn.Module, optimizer: Any) -> None:
        """Continue with the factors of the checkpoint that the Trainer has just loaded."""
        try:
            load_sidecar(model, folder)
        except FileNotFoundError:
            missing = f"the checkpoint {folder} has no {SIDECAR_NAME}: it was made without SubquadCallback, or lost it"
            if hasattr(model, "peft_config"):
                raise SidecarError(f"{missing}. Beside PEFT adapters it is the only copy of the updates") from None
            logger.warning(f"{missing}. Going on from its weights with fresh low-rank updates.")
            runtime_of(model).synced_step = state.global_step
            if optimizer is not None:
                restart_moments(require_patched(model), optimizer)


def _planned(model: nn.Module, batches: list[Any]) -> Plan | CalibrationError:
    try:
        return calibrate(model, batches)
    except CalibrationError as error:
        return error


def _resumed_from(frame: FrameType | None) -> str | None:
    """The checkpoint folder that `Trainer.train` resumes from, which callbacks are not told: from its own frame."""
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Trainer) and "resume_from_checkpoint" in frame.f_locals:
            folder = frame.f_locals["resume_from_checkpoint"]
            return folder if isinstance(folder, str) and os.path.isdir(folder) else None
        frame = frame.f_back
    return None


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
