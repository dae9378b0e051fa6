"""The Trainer callback: hands every event to the function that does the work. It keeps nothing itself."""

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .calibration import calibrate, compensate
from .checkpoints import last_whole_checkpoint
from .compensation import Compensation
from .errors import CalibrationError, InactivePatchError, ParallelismError, SidecarError
from .patching import apply_plan, patched_parts, require_patched, runtime_of
from .plan import Plan
from .sidecar import SIDECAR_NAME, load_sidecar, save_sidecar
from .sync import check_active, restart_moments, sync_model, train_updates
from .trainer_batches import sample_batches
from .undisturbed import undisturbed

PLAN_NAME = "subquad_plan.json"

_CALIBRATION_BATCHES = 3

logger = logging.get_logger(__name__)


class SubquadCallback(TrainerCallback, ExportableState):
    """Keeps a patched model in sync during `Trainer.train()`.

    There is nothing to configure: settings belong to `SubquadConfig`. Raises a typed error at the start of training
    if the patch would not take effect, or cannot follow (FSDP, DeepSpeed, `torch.nn.DataParallel`); plans budgets from
    batches of the training data, if there is neither a plan nor a fixed `active`, and fits what compensates for skipped
    neurons; folds, audits and adjusts budgets on schedule; adds `subquad/...` to the Trainer's logs; writes and reads
    the sidecar of each checkpoint.
    """

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        _refuse(args)
        runtime_of(model)
        train_updates(model)
        self._move_first(sys._getframe(1).f_locals.get("self"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        optimizer: Any = None, train_dataloader: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        _refuse(args)  # for a callback that came by add_callback
        if state.global_step:
            resumed_from = _resumed_from(sys._getframe(1)) or _checkpoint_folder(args, state)
            self._resume(Path(resumed_from), state, model, optimizer)
        _states(state).setdefault(type(self).__name__, self.state())  # resumed from one made without it
        check_active(model, optimizer)
        self._move_first(sys._getframe(1).f_locals.get("self"))
        self._fit(args, state, model, train_dataloader)
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
        PartialState().wait_for_everyone()  # the other ranks' files come before the sidecar, too
        if args.should_save:
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

    def state(self) -> dict[str, Any]:
        """Nothing to keep; that it is there tells a checkpoint that lacks its sidecar from one that never had any."""
        return {"args": {}, "attributes": {}}

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

    def _fit(self, args: TrainingArguments, state: TrainerState, model: nn.Module, dataloader: Any) -> None:
        """Plan budgets and fit compensations on batches of the training data, where neither was done before.

        One rank does it, since each would measure other times and may draw other batches, and all follow.
        """
        runtime, mlps = patched_parts(model)
        plans = runtime.plan is None and runtime.config.active is None
        if not plans and any(mlp.compensation for mlp in mlps):
            return
        shared: list[Any] = [None]
        if args.process_index == 0:
            rows = state.train_batch_size or args.train_batch_size  # the first is less after auto_find_batch_size
            with undisturbed(model):
                batches = sample_batches(dataloader, rows, _CALIBRATION_BATCHES, args.device)
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

    def _resume(self, folder: Path, state: TrainerState, model: nn.Module, optimizer: Any) -> None:
        """Continue with the factors of the checkpoint that the Trainer has just loaded."""
        try:
            load_sidecar(model, folder)
        except FileNotFoundError:
            if type(self).__name__ in _states(state):
                whole = last_whole_checkpoint(folder.parent)
                other = f"resume from {whole}" if whole else "there is no whole checkpoint beside it"
                raise SidecarError(
                    f"the checkpoint {folder} has no {SIDECAR_NAME}: its saving was interrupted, or the file was lost. "
                    f"Its weights are whole, its low-rank updates are not known: {other}, or load its weights with "
                    "from_pretrained and train anew"
                ) from None
            made = f"the checkpoint {folder} was made without SubquadCallback and has no {SIDECAR_NAME}"
            if hasattr(model, "peft_config"):
                raise SidecarError(f"{made}. Beside PEFT adapters it is the only copy of the updates") from None
            logger.warning(f"{made}. Going on from its weights with fresh low-rank updates.")
            runtime_of(model).synced_step = state.global_step
            if optimizer is not None:
                restart_moments(require_patched(model), optimizer)


def _refuse(args: TrainingArguments) -> None:
    """Raise the error of what patched layers cannot follow, before anything is trained."""
    if args.use_liger_kernel:
        raise InactivePatchError(
            "use_liger_kernel=True rebinds the MLPs' forward and would bypass the patch: set it to False"
        )
    engine = AcceleratorState._shared_state.get("distributed_type")  # to construct one would set it anew
    asked = DistributedType.FSDP if args.fsdp else DistributedType.DEEPSPEED if args.deepspeed else None
    splitting = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM} & {engine, asked}
    if splitting:
        raise ParallelismError(
            f"{splitting.pop().value} splits weights, or what the optimizer knows of them, over processes, and "
            "choosing neurons and folding need them whole: train with plain data parallelism (DDP), as accelerate "
            "launch --multi_gpu does without it"
        )
    if args.n_gpu > 1:
        raise ParallelismError(
            f"the Trainer would copy the model to {args.n_gpu} GPUs in every step (torch.nn.DataParallel), and the "
            "copies would share one selection of neurons: start one process a GPU (accelerate launch, torchrun), or "
            "show one GPU only (CUDA_VISIBLE_DEVICES=0)"
        )


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


def _states(state: TrainerState) -> dict[str, Any]:
    """What checkpoints keep of callbacks, by their class (a dict, other than the annotation says)."""
    return cast("dict[str, Any]", state.stateful_callbacks)


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
