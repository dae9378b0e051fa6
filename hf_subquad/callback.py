"""The Trainer callback: hands every event to the function that does the work. It keeps nothing itself."""

import os
import sys
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from .errors import InactivePatchError, SidecarError
from .patching import require_patched, runtime_of
from .sidecar import SIDECAR_NAME, load_sidecar, save_sidecar
from .sync import check_active, restart_moments, sync_model, train_updates

logger = logging.get_logger(__name__)


class SubquadCallback(TrainerCallback):
    """Keeps a patched model in sync during `Trainer.train()`.

    There is nothing to configure: settings belong to `SubquadConfig`. Raises a typed error at the start of training
    if the patch would not take effect, folds and refreshes on schedule, adds `subquad/...` to the Trainer's logs, and
    writes and reads the sidecar of each checkpoint.
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
        optimizer: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if state.global_step:
            self._resume(args, state, model, optimizer)
        check_active(model, optimizer)
        self._move_first(sys._getframe(1).f_locals.get("self"))  # for a callback that came by add_callback
        sync_model(model, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        optimizer: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        if not runtime_of(model).warming_up and not any(mlp.calls for mlp in require_patched(model)):
            raise InactivePatchError(
                "a training step ran, but no patched MLP did: is the Trainer training the model that was patched?"
            )
        sync_model(model, state.global_step, optimizer)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module,
        logs: dict[str, float] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        report = runtime_of(model).last_report
        if logs is None or "loss" not in logs or report is None:
            return
        logs.update(report.metrics())  # seen by the callbacks after this one
        state.log_history[-1].update(report.metrics())  # the Trainer stored a copy already

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

    def _resume(self, args: TrainingArguments, state: TrainerState, model: nn.Module, optimizer: Any) -> None:
        """Continue with the factors of the checkpoint that the Trainer has just loaded."""
        asked = args.resume_from_checkpoint
        folder = Path(asked) if isinstance(asked, str) and os.path.isdir(asked) else _checkpoint_folder(args, state)
        try:
            load_sidecar(model, folder)
        except FileNotFoundError:
            where = (
                f"no {SIDECAR_NAME} in {folder}. If training resumes from another folder, name it in "
                "TrainingArguments(resume_from_checkpoint=...)"
            )
            if hasattr(model, "peft_config"):
                raise SidecarError(f"{where}. Beside PEFT adapters it holds the only copy of the updates") from None
            logger.warning(f"{where}. Going on from the checkpoint's weights with fresh low-rank updates.")
            if optimizer is not None:
                restart_moments(require_patched(model), optimizer)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
