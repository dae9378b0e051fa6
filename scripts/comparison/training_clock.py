"""A Trainer whose steps are timed, and taken in turns with other processes."""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from .memory import PeakMemory
from .run_settings import RunSettings
from .turns import Turns

Batch = Mapping[str, torch.Tensor]


@dataclass
class Measured:
    """Attributes:
    steps: one row a step: round, seconds, tokens, train_loss.
    evaluations: one row an evaluation, the first before training: step, seconds of training, eval_loss.
    setup_seconds: patching, and what callbacks did before the first step.
    logs: what the method's callbacks logged, by step.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    setup_seconds: float = 0.0
    logs: list[dict[str, Any]] = field(default_factory=list)
    digest: str = ""  # of all token ids trained on, in order


class TimedTrainer(Trainer):
    """The Trainer, with these additions outside the timed part of a step: it waits for its turn, keeps the loss of
    each step, and evaluates.

    The time of a step runs from the first callback's `on_step_begin` to the last callback's `on_step_end`: forward,
    backward, gradient clipping, optimizer, and all that the method's own callbacks do in between. Fetching the
    batch, waiting and evaluating are not in it.

    Args:
        callbacks: the method's own.
        evaluate_loss: mean held-out loss of a model, or None for no evaluations.
        share: what this process tells the others, with its first wait.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: RunSettings,
        turns: Turns,
        train: Any,
        collate: Callable[[list[Any]], dict[str, torch.Tensor]],
        callbacks: list[TrainerCallback],
        output_dir: str,
        evaluate_loss: Callable[[nn.Module], float] | None = None,
        share: dict[str, Any] | None = None,
    ) -> None:
        self.settings, self.turns, self.evaluate_loss, self.share = settings, turns, evaluate_loss, share
        self.measured = Measured()
        self.memory = PeakMemory(settings.device)
        self._hash = hashlib.sha256()
        self._loss = self._tokens = torch.zeros(())
        self._started = 0.0

        super().__init__(
            model=model,
            args=training_arguments(settings, output_dir),
            train_dataset=train,
            data_collator=collate,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        # Around all others: a callback may have moved itself to the front.
        self.callback_handler.callbacks.insert(0, _Before(self))
        self.callback_handler.callbacks.append(_After(self))

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._hash.update(inputs["input_ids"].cpu().numpy().tobytes())
        self._tokens = inputs["attention_mask"].sum()
        self._loss = super().training_step(model, inputs, *args, **kwargs)
        return self._loss

    def now(self) -> float:
        """Seconds, after all work handed to the device is done."""
        if self.settings.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def train_begins(self) -> None:
        self._started = self.now()

    def train_begun(self) -> None:
        self.measured.setup_seconds += self.now() - self._started
        self._evaluate_if_due(step=0)

    def step_begins(self, step: int) -> None:
        """Args: step: number of steps done."""
        if step % self.settings.turn_steps == 0:
            self.turns.wait(self.progress(step), self.share)
        self.memory.start()
        self._started = self.now()

    def step_ends(self, step: int) -> None:
        seconds = self.now() - self._started
        self.memory.stop()
        row = {
            "step": step,
            "round": self.turns.round,
            "seconds": seconds,
            "tokens": int(self._tokens),
            "train_loss": float(self._loss),
        }
        self.measured.steps.append(row)
        self._evaluate_if_due(step)
        self.measured.digest = self._hash.hexdigest()[:16]

    def keep_logs(self, step: int, logs: dict[str, Any]) -> None:
        ours = {name: value for name, value in logs.items() if name.startswith("subquad/")}
        if ours:
            self.measured.logs.append({"step": step} | ours)

    def _evaluate_if_due(self, step: int) -> None:
        every, last = self.settings.eval_every, self.args.max_steps
        if self.evaluate_loss is None or not (step in (0, last) or (every and step % every == 0)):
            return
        seconds = self.measured.setup_seconds + sum(row["seconds"] for row in self.measured.steps)
        loss = self.evaluate_loss(self.model)
        self.measured.evaluations.append({"step": step, "seconds": seconds, "eval_loss": loss})

    def progress(self, step: int) -> dict[str, Any]:
        """What the parent displays."""
        evaluations = self.measured.evaluations
        return {"step": step, "eval_loss": evaluations[-1]["eval_loss"] if evaluations else None}


class _Before(TrainerCallback):
    """Stands before the method's callbacks, so that their time counts."""

    def __init__(self, trainer: TimedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.train_begins()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.step_begins(state.global_step)


class _After(TrainerCallback):
    """Stands behind them."""

    def __init__(self, trainer: TimedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.train_begun()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.step_ends(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.trainer.keep_logs(state.global_step, logs or {})


def training_arguments(settings: RunSettings, output_dir: str) -> TrainingArguments:
    """What every method is trained with."""
    return TrainingArguments(
        output_dir=output_dir,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=settings.lr_warmup_steps,
        optim="adamw_torch_fused",
        bf16=settings.autocast,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=settings.device == "cpu",
        dataloader_pin_memory=False,
        dataloader_drop_last=True,  # a smaller last batch would be a faster step
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
    )
