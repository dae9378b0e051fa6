"""The Trainer callback: passes every event to the function that handles it. It has no state of its own."""

from pathlib import Path
from typing import Any, cast

from accelerate.state import PartialState
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..head.patch_head import unpatch_automatic_head
from ..layers.patched_mlps import patched_parts, runtime_of, train_updates
from ..layers.preserve_mode_and_rng import preserve_mode_and_rng
from ..logs import get_logger
from .caller_frames import current_trainer, resumed_from
from .resume import resume
from .sidecar import load_sidecar, save_sidecar
from .sync_model import check_active, frozen_updates, sync_model
from .trainer_head import keeps_labels, own_loss, start_labelled_head
from .trainer_planning import fit_on_training_data
from .unsupported_engines import check_engine, compares_with_reference, uses_fsdp2

PLAN_NAME = "subquad_plan.json"

logger = get_logger(__name__)


class SubquadCallback(TrainerCallback, ExportableState):
    """Keeps a patched model in sync during `Trainer.train()`.

    There is nothing to configure: all settings are in `SubquadConfig`. The callback

    - raises a typed error if the patch would not take effect, or if the patch does not support the engine (FSDP1,
      DeepSpeed, `torch.nn.DataParallel`);
    - plans budgets on batches of the training data, unless there is a plan or a fixed `active`, and fits indices and
      corrections; under FSDP2 when the Trainer is created, on the device where the model is then;
    - limits logits to labelled positions if nothing reads the others;
    - folds, audits and adjusts budgets on schedule, and adds `subquad/...` to the Trainer's logs;
    - writes and reads the sidecar of each checkpoint.
    """

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        check_engine(args)
        runtime = runtime_of(model)
        train_updates(model)
        trainer = current_trainer()
        self._move_first(trainer)
        # Before the Trainer lets accelerate shard the model, and before `on_train_begin`.
        if uses_fsdp2() and not runtime.sharded and not compares_with_reference(args) and trainer is not None:
            with preserve_mode_and_rng(model):
                dataloader = trainer.get_train_dataloader() if trainer.train_dataset is not None else ()
            fit_on_training_data(model, dataloader, args.train_batch_size, args, keeps_labels(trainer) is not None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        optimizer: Any = None, train_dataloader: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        check_engine(args)  # for a callback that came by add_callback
        trainer = current_trainer()
        folder = _run_folder(trainer, args)
        if state.global_step:
            checkpoint = resumed_from() or _checkpoint_folder(folder, state)
            resume(model, checkpoint, state.global_step, type(self).__name__ in _states(state))
        _states(state).setdefault(type(self).__name__, self.state())  # resumed from one made without it
        check_active(model, optimizer)
        unpatch_automatic_head(model)  # of a training that was broken off
        self._move_first(trainer)
        runtime, mlps = patched_parts(model)
        runtime.exact_forward = compares_with_reference(args)
        if frozen := frozen_updates(mlps):
            logger.warning_once(
                f"updates of {len(frozen)} of {len(mlps)} patched MLPs do not train ({frozen[0]}, ...): they, or their "
                "layers, were frozen. To train them, set requires_grad on the parameters whose names end with update.U "
                "and update.V before creating the Trainer"
            )
        runtime.whole_rows = trainer is None or own_loss(trainer) is not None
        start_labelled_head(model, trainer, runtime.config.head_megabytes)  # a plan counts what it saves
        rows = state.train_batch_size or args.train_batch_size  # the first is less after auto_find_batch_size
        if runtime.exact_forward:
            logger.warning_once(
                f"the loss of {type(args).__name__} compares the model's log-probabilities with those of a dense "
                "model: so that the two agree, MLPs compute all neurons; their low-rank updates still train"
            )
        elif not uses_fsdp2():
            without_labels = trainer is not None and keeps_labels(trainer) is not None
            fit_on_training_data(model, train_dataloader, rows, args, without_labels)
        if runtime.plan is not None and state.is_world_process_zero:
            logger.info(f"the plan:\n{runtime.plan.table()}")
            folder.mkdir(parents=True, exist_ok=True)
            runtime.plan.save(folder / PLAN_NAME)
        sync_model(model, state.global_step, optimizer)
        runtime.idle_steps = 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        optimizer: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        report = sync_model(model, state.global_step, optimizer)
        if state.is_world_process_zero:
            for change in report.changes:
                logger.warning(f"step {state.global_step}: {change}")

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        logs: dict[str, float] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if logs is None or "loss" not in logs:  # of an evaluation, say, perhaps after unpatch_model
            return
        runtime = runtime_of(model)
        if runtime.last_report is None:
            return
        figures = runtime.last_report.metrics()
        if runtime.plan is not None:
            figures["subquad/planned_loss_increase"] = runtime.plan.loss_increase
            figures["subquad/planned_step_speedup"] = runtime.plan.step_speedup
        logs.update(figures)  # seen by the callbacks after this one
        state.log_history[-1].update(figures)  # the Trainer stored a copy already

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        PartialState().wait_for_everyone()  # the other ranks' files come before the sidecar, too
        if args.should_save or runtime_of(model).sharded:  # all ranks gather what one of them writes
            folder = _run_folder(current_trainer(), args)
            save_sidecar(model, _checkpoint_folder(folder, state), state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        unpatch_automatic_head(model)
        # The Trainer has loaded the best adapters; the updates that go with them are in the sidecar beside them.
        if not hasattr(model, "peft_config"):
            return
        if args.load_best_model_at_end and state.best_model_checkpoint:
            load_sidecar(model, state.best_model_checkpoint)
        logger.warning_once(
            "with PEFT, save_model and save_pretrained write PEFT's adapters only, not the updates of the MLPs: to "
            "write the plain model with everything merged, call hf_subquad.save_merged(model, folder)"
        )

    def state(self) -> dict[str, Any]:
        """An empty state. It marks the checkpoints of runs with this callback, which must have a sidecar."""
        return {"args": {}, "attributes": {}}

    def _move_first(self, trainer: Trainer | None) -> None:
        """Move this callback before the reporting ones, so that they see what it adds to `logs`: the Trainer puts the
        user's callbacks after TensorBoard, W&B and the like."""
        if trainer is not None and self in (callbacks := trainer.callback_handler.callbacks):
            callbacks.remove(self)
            callbacks.insert(0, self)


def _states(state: TrainerState) -> dict[str, Any]:
    """The saved states of callbacks, by class name (a dict, although the annotation says otherwise)."""
    return cast("dict[str, Any]", state.stateful_callbacks)


def _run_folder(trainer: Trainer | None, args: TrainingArguments) -> Path:
    """Where the checkpoints of this run are; a trial of a hyperparameter search has its own folder."""
    if trainer is None:
        return Path(args.output_dir or "")
    return Path(trainer._get_output_dir(getattr(trainer, "_trial", None)))  # set by the Trainer's own `train`


def _checkpoint_folder(run: Path, state: TrainerState) -> Path:
    return run / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
