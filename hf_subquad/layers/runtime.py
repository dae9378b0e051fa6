"""What all sparse MLPs of a model share: settings, the mode they run in, and what keeping in sync has noted."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers.utils import logging

from ..config import SubquadConfig
from ..errors import InactivePatchError
from ..plan import Plan
from .surroundings import Surroundings

logger = logging.get_logger(__name__)

Forward = Literal["auto", "dense", "sparse"]


@dataclass
class Runtime:
    """What all sparse MLPs of a model share.

    Attributes:
        forward: 'auto' is sparse in training (and in evaluation if `sparse_eval`); the others force it.
        surroundings: the model around the MLPs.
        exact_forward: the loss compares this model with a reference, so that a sparse forward would bias it.
        dense_step: the coming training step runs dense (`dense_share`).
        folded: updates were folded into base weights, so that there is no base model left to switch to.
        sync_seconds: time spent keeping in sync so far.
        synced_step: the step that was synced last.
        seen_calls: sparse forward passes of all MLPs when a training step was last checked for some.
        idle_steps: training steps since the start of training in which no MLP ran sparse; None once one did.
        last_report: what the latest sync measured, for logs.
        plan: where the budgets come from, if they were planned; kept up to date as they change.
    """

    config: SubquadConfig
    surroundings: Surroundings = field(default_factory=Surroundings, repr=False)
    forward: Forward = "auto"
    exact_forward: bool = False
    dense_step: bool = False
    folded: bool = False
    sync_seconds: float = 0.0
    synced_step: int | None = None
    seen_calls: int = 0
    idle_steps: int | None = 0
    last_report: Any = field(default=None, repr=False)
    plan: Plan | None = None

    def sparse(self, training: bool) -> bool:
        """Whether MLPs run sparse now, as far as their budgets allow it.

        Passes without gradients in training mode (rollouts, log-probabilities to compare with) are evaluation.
        """
        if self.updates_off():
            return False
        if self.forward != "auto":
            return self.forward == "sparse"
        if not training or not (torch.is_grad_enabled() or self.surroundings.recomputed_without_gradients()):
            return self.config.sparse_eval
        if self.exact_forward or self.dense_step:
            return False
        if self.synced_step is None and not torch.compiler.is_compiling():
            logger.warning_once(
                "patched MLPs train unplanned, and nothing keeps them in sync: give the Trainer "
                "callbacks=[SubquadCallback()], or, in a loop of your own, call calibrate, apply_plan and compensate "
                "before it, sync_model(model, 0) at its start and sync_model(model, step, optimizer) after each step"
            )
        return True

    def updates_off(self) -> bool:
        """Whether this pass is one of the base model alone, as PEFT's `disable_adapter` asks for.

        Raises:
            InactivePatchError: folds have changed the base model.
        """
        off = self.surroundings.adapters_off()
        if off and self.folded:
            raise InactivePatchError(
                "PEFT's adapters were switched off (disable_adapter) to run the base model, but fold_steps has folded "
                "updates into its weights: set fold_steps=0, or compare with a reference model of its own"
            )
        return off
