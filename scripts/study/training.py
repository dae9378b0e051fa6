"""Fine-tune several sparse models on the same batches, in turns, so that drift of the machine cancels."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from methods import apply_method
from torch import nn

from hf_subquad import SubquadConfig, sync_model
from hf_subquad.planning.predictions import Batch

_LARGEST_GRADIENT = 1.0  # norm, the Trainer's default


@dataclass(frozen=True)
class Training:
    """What all runs share."""

    learning_rate: float
    steps: int
    turn_steps: int
    seed: int


class Run:
    """One model in training.

    Attributes:
        rows: by step: `step`, `seconds` (forward, backward, clipping, optimizer, sync), `timed`, `train_loss`.
    """

    def __init__(
        self, base: nn.Module, config: SubquadConfig, prepare: Callable[[nn.Module], None], training: Training
    ) -> None:
        """
        Args:
            base: not patched; a copy of it is.
            prepare: sets selection and budgets of the patched copy.
        """
        transformers.set_seed(training.seed)  # so that the adapters start from the same values
        self.model, _ = apply_method(
            copy.deepcopy(base), "subquad", rank=config.rank, alpha=config.alpha, subquad=config, rest="lora"
        )
        prepare(self.model)
        self.model.train()
        self._trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, lr=training.learning_rate, weight_decay=0.0, fused=True)
        self._schedule = transformers.get_scheduler("linear", self._optimizer, 0, training.steps)
        self._training = training
        self.rows: list[dict[str, Any]] = []
        sync_model(self.model, 0)

    def step(self, batch: Batch) -> None:
        step = len(self.rows) + 1
        torch.manual_seed(self._training.seed + step)  # dropout, where there is any, is the same in all runs
        started = time.perf_counter()
        loss = self.model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained, _LARGEST_GRADIENT)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        sync_model(self.model, step, self._optimizer)
        seconds = time.perf_counter() - started
        self._schedule.step()
        # The first step of a turn finds caches and allocator as another model left them.
        timed = self._training.turn_steps == 1 or (step - 1) % self._training.turn_steps > 0
        self.rows.append({"step": step, "seconds": seconds, "timed": timed, "train_loss": loss.item()})


def train_in_turns(runs: Sequence[Run], batches: Sequence[Batch], turn_steps: int, tick: Callable[[], Any]) -> None:
    """Take every run through all batches; `tick` is called after each step."""
    for first in range(0, len(batches), turn_steps):
        for run in runs:
            for batch in batches[first : first + turn_steps]:
                run.step(batch)
                tick()
