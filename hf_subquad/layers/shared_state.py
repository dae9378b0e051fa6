"""What all sparse MLPs of a model share: settings, the mode they run in, and the current batch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..config import SubquadConfig
from ..errors import InactivePatchError
from ..plan import Plan
from ..weights.shards import is_fsdp
from .attention_patch import restore_attention, skip_padding_in_attention
from .classify_tokens import BatchClasses, TokenClasses, classify
from .forward_passes import Passes, computed_again
from .may_skip_padding import Padding, most_and_least_padded
from .peft_and_checkpointing import Surroundings
from .preserve_mode_and_rng import preserve_mode_and_rng

Forward = Literal["auto", "dense", "exact", "sparse"]
Mode = Literal["dense", "exact", "sparse"]

logger = logging.get_logger(__name__)


@dataclass
class Runtime:
    """What all sparse MLPs of a model share.

    Attributes:
        forward: 'auto' is sparse in training (and in evaluation if `sparse_eval`); 'exact' skips padding only; 'dense'
            and 'sparse' force that mode.
        surroundings: the model around the MLPs.
        exact_forward: the loss compares this model with a reference, so a sparse forward would bias it.
        dense_step: the next training step uses all neurons and the whole gradient (`dense_share`).
        folded: updates were folded into the base weights, so the original base model is no longer available.
        sync_seconds: time spent in `sync_model` so far.
        synced_step: the last step that `sync_model` was called for.
        idle_steps: steps since a Trainer started in which no MLP ran sparse; None once one did or cannot, and in other
            loops.
        last_report: what the latest sync measured, for logs.
        plan: the plan that the budgets come from, if any; updated when they change.
        sharded: FSDP2 shards the weights.
        whole_rows: the loss is not the model's own, so it may depend on tokens after the last label of a row.
        without_labels: take no notice of labels, as the calls that are planned for will have none.
        padding: whether padding may be skipped.
        passes: the model's forward passes.
    """

    config: SubquadConfig
    surroundings: Surroundings = field(repr=False)
    forward: Forward = "auto"
    exact_forward: bool = False
    dense_step: bool = False
    folded: bool = False
    sync_seconds: float = 0.0
    synced_step: int | None = None
    idle_steps: int | None = None
    last_report: Any = field(default=None, repr=False)
    plan: Plan | None = None
    sharded: bool = False
    whole_rows: bool = False
    without_labels: bool = False
    padding: Padding = field(default_factory=Padding)
    passes: Passes = field(default_factory=Passes, repr=False)
    _trying: bool = field(default=False, repr=False)

    def mode_of(self, batch: BatchClasses, name: str, training: bool) -> Mode:
        """The mode in which an MLP runs in a pass: that of the first time, if gradient checkpointing repeats it."""
        known = computed_again() and name in batch.modes
        mode: Mode = batch.modes[name] if known else self.mode(training, batch.may_repeat)
        batch.modes[name] = mode
        return mode

    def mode(self, training: bool, may_repeat: bool = True) -> Mode:
        """The mode of a forward pass that starts now, and that gradient checkpointing `may_repeat`.

        Passes without gradients in training mode (rollouts, log-probabilities to compare with) count as evaluation.
        """
        if self.updates_off():
            return "dense"
        if self.forward != "auto":
            return self.forward
        if not training or not (
            torch.is_grad_enabled() or (may_repeat and self.surroundings.recomputed_without_gradients())
        ):
            return "sparse" if self.config.sparse_eval else "dense"
        if self.exact_forward or self.dense_step:
            return "exact"
        if self.synced_step is None:
            logger.warning_once(
                "patched MLPs train without a plan, and nothing keeps them in sync: give the Trainer "
                "callbacks=[SubquadCallback()]; or, in a custom loop, call calibrate, apply_plan and compensate before "
                "it, sync_model(model, 0) at its start and sync_model(model, step, optimizer) after each step"
            )
        return "sparse"

    def updates_off(self) -> bool:
        """Whether this pass must run the base model alone, as PEFT's `disable_adapter` requires.

        Raises:
            InactivePatchError: folds have changed the base model.
        """
        off = self.surroundings.adapters_off()
        if off and self.folded:
            raise InactivePatchError(
                "PEFT's adapters were switched off (disable_adapter) to run the base model, but fold_steps has folded "
                "updates into its weights: set fold_steps=0, or use a separate reference model"
            )
        return off

    def begin(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Called at the start of each forward pass of the model, with its inputs by name."""
        if self._trying:
            return
        evaluates = self.forward == "auto" and not model.training  # then all logits may be read
        batch = self._classify(model, inputs, whole_rows=evaluates)
        padded = any(of_stack.padding for of_stack in batch.stacks.values())
        sharded = self.sharded or is_fsdp(type(model))  # then other ranks would have to come along
        tries = not sharded and not _continues(inputs) and (model.training or self.forward in ("exact", "sparse"))
        if padded and self.padding.may_skip is None and tries:
            self.try_skipping_padding(model, inputs)
        unknown = not batch.stacks and model.training and torch.is_grad_enabled()  # some loss may read padding
        if batch.labelled_padding or unknown:
            restore_attention(model)
        self.passes.begin(batch)

    def sees(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Called within a forward pass if the model runs on other inputs than it was called with."""
        if not self._trying:
            self.passes.replace(self._classify(model, inputs))

    def end(self) -> None:
        """Called at the end of each forward pass of the model, also after an error."""
        if not self._trying:
            self.passes.end()

    def _classify(self, model: nn.Module, inputs: Mapping[str, Any], whole_rows: bool = False) -> BatchClasses:
        if self.without_labels:
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        return classify(model, inputs, whole_rows=self.whole_rows or whole_rows or _continues(inputs))

    def try_skipping_padding(self, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Test whether padding can be skipped in this model, if the batch has padding, and return whether it has."""
        if "return_dict" in inputs:  # a tuple does not tell which of its values is the loss
            inputs = {**inputs, "return_dict": True}
        classes = self._classify(model, inputs)
        if not any(of_stack.padding for of_stack in classes.stacks.values()):
            return False

        def loss(inputs: Mapping[str, Any]) -> Tensor | None:
            with self.set_aside("exact", self._classify(model, inputs)):
                return loss_of(model(**inputs))

        few = most_and_least_padded(inputs)
        with preserve_mode_and_rng(model):
            self.padding.try_skipping(model, [partial(loss, each) for each in (few, inputs) if each is not None])
            if self.padding.may_skip and few is not None:
                with self.set_aside("dense"):
                    skip_padding_in_attention(model, few)
        return True

    def classes_in(self, batch: BatchClasses, name: str, x: Tensor) -> TokenClasses | None:
        """Classes of the tokens x [..., d] that an MLP sees in a pass; None if unknown, or if padding may not be
        skipped."""
        return self.padding.usable_classes(batch.of(name, x))

    def latest_classes_of(self, name: str) -> TokenClasses | None:
        """Classes of the tokens that an MLP saw last; None if unknown, or if padding may not be skipped."""
        return self.padding.usable_classes(self.passes.latest.of_stack(name) if self.passes.latest else None)

    @contextmanager
    def set_aside(self, forward: Forward, batch: BatchClasses | None = None) -> Iterator[None]:
        """Context manager: inside, the model can be tried on a batch in a mode, and what is known of batches stays as
        it is."""
        before, held = self.forward, self.passes
        self.forward, self._trying, self.passes = forward, True, Passes()
        if batch is not None:
            self.passes.begin(batch)
        try:
            yield
        finally:
            self.forward, self._trying, self.passes = before, False, held

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "passes": Passes()}


def _continues(inputs: Mapping[str, Any]) -> bool:
    """Whether a call goes on from a cache or fills one, which other passes would change."""
    return inputs.get("past_key_values") is not None or inputs.get("use_cache") is True


def loss_of(outputs: Any) -> Tensor | None:
    """The loss in a model's outputs, which may be a dictionary; None if there is none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return loss if isinstance(loss, Tensor) else None
