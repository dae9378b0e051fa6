"""A Trainer whose steps are timed."""

import hashlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .memory import PeakMemory, give_back_freed
from .mlp_time import MlpTimer
from .settings import RunSettings

Batch = Mapping[str, torch.Tensor]
# By the name that this version of transformers does not warn of.
_KNOWN = TrainingArguments.__dataclass_fields__
_CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _KNOWN else "gradient_checkpointing"


class TimedTrainer(Trainer):
    """The Trainer, which outside of the timed part of a step keeps its loss, and evaluates.

    The time of a step runs from the first callback's `on_step_begin` to the last callback's `on_step_end`: forward,
    backward, gradient clipping, optimizer, and all that the method's own callbacks do in between. Fetching the
    batch and evaluating are not in it.

    Args:
        callbacks: the method's own.
        evaluate_loss: mean held-out loss of a model, or None for no evaluations.
        report: told of each step.
        mlps: if given, this is a turn: `untimed_steps`, `turn_steps`, and `profile_steps` in which these MLPs (see
            MlpTimer) are timed.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: RunSettings,
        train: Any,
        collate: Callable[[list[Any]], dict[str, torch.Tensor]],
        callbacks: list[TrainerCallback],
        output_dir: str,
        evaluate_loss: Callable[[nn.Module], float] | None = None,
        report: Callable[[Any], None] = lambda progress: None,
        mlps: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings, self.evaluate_loss, self.report, self.mlps = settings, evaluate_loss, report, mlps
        self.steps: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.logs: list[dict[str, Any]] = []
        self.setup_seconds = 0.0
        self.memory = PeakMemory(settings.device)
        self.digest = hashlib.sha256()
        self._timer: MlpTimer | None = None
        self._tokens = torch.zeros(())
        self._started = 0.0

        timed_steps = settings.untimed_steps + settings.turn_steps
        steps = settings.steps if mlps is None else timed_steps + settings.profile_steps
        self._profile_from = None if mlps is None else timed_steps
        super().__init__(
            model=model,
            args=training_arguments(settings, output_dir, steps),
            train_dataset=train,
            data_collator=collate,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        # Around all others, so that their time counts; a callback may have moved itself to the front.
        self.callback_handler.callbacks.insert(0, _Before(self))
        self.callback_handler.callbacks.append(_After(self))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            self.digest.update(batch["input_ids"].cpu().numpy().tobytes())
            self._tokens = batch["attention_mask"].sum()
        return batches, items

    def now(self) -> float:
        """Seconds, after all work handed to the device is done."""
        if self.settings.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step_begins(self, steps_done: int) -> None:
        if steps_done == self._profile_from:
            self._timer = MlpTimer(self.model, self.mlps or {}, self.now)
        if self._timer:
            self._timer.restart()
        self.memory.start()
        self._started = self.now()

    def step_ends(self, step: int) -> None:
        seconds = self.now() - self._started
        self.memory.stop()
        row = {"step": step, "seconds": seconds, "tokens": int(self._tokens)}
        self.steps.append(row | ({"mlp_seconds": self._timer.seconds} if self._timer else {}))
        self.evaluate_if_due(step)
        self.report({"step": step, "eval_loss": self.evaluations[-1]["eval_loss"] if self.evaluations else None})

    def evaluate_if_due(self, step: int) -> None:
        every, last = self.settings.eval_every, self.args.max_steps
        if self.evaluate_loss is not None and (step in (0, last) or (every and step % every == 0)):
            self.evaluations.append({"step": step, "eval_loss": self.evaluate_loss(self.model)})


class _Before(TrainerCallback):
    """Stands before the method's callbacks."""

    def __init__(self, trainer: TimedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._started = self.trainer.now()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.step_begins(state.global_step)


class _After(TrainerCallback):
    """Stands behind them."""

    def __init__(self, trainer: TimedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.setup_seconds = self.trainer.now() - self.trainer._started
        self.trainer.evaluate_if_due(step=0)
        give_back_freed()  # planning's memory is none of the steps'

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.step_ends(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if "loss" in logs:  # not from a forward hook, which could read logits: then subquad would compute all of them
            self.trainer.steps[-1]["train_loss"] = logs["loss"]
        ours = {name: value for name, value in logs.items() if name.startswith("subquad/")}
        if ours:
            self.trainer.logs.append({"step": state.global_step} | ours)


def training_arguments(settings: RunSettings, output_dir: str, steps: int) -> TrainingArguments:
    """What every method is trained with."""
    return TrainingArguments(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.lr_warmup_steps,
        optim="adamw_torch_fused",
        bf16=settings.autocast,
        **({_CHECKPOINTING: True} if settings.gradient_checkpointing else {}),
        use_liger_kernel=settings.liger,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=settings.device == "cpu",
        dataloader_pin_memory=False,
        dataloader_drop_last=True,  # a smaller last batch would be a faster step
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
    )
