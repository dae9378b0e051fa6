"""What all sparse MLPs of a model share: settings, the mode they run in, and the current batch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..config import SubquadConfig
from ..errors import InactivePatchError
from ..plan import Plan
from ..weights.shards import is_fsdp
from .attention_patch import attend_as_before, skip_padding_in_attention
from .passes import Passes, computed_again
from .peft_and_checkpointing import Surroundings
from .preserve_mode_and_rng import preserve_mode_and_rng
from .token_classes import BatchClasses, TokenClasses, classify

Forward = Literal["auto", "dense", "exact", "sparse"]
Mode = Literal["dense", "exact", "sparse"]

_VAIN_TRIES = 4  # to find out whether padding may be skipped
_SAME = 1e-6  # relative difference of losses
_FAR = 30.0  # what padding holds while it is tried whether anything depends on it

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
        seen_calls: number of sparse forward passes of all MLPs at the last check for them.
        idle_steps: training steps since the start of training in which no MLP ran sparse; None once one did.
        last_report: what the latest sync measured, for logs.
        plan: the plan that the budgets come from, if any; updated when they change.
        skips_padding: whether the loss is independent of padding, so that it is skipped; None: not tested yet.
        elsewhere: magnitude of what MLPs return for tokens that they skip.
        sharded: FSDP2 shards the weights.
        whole_rows: the loss is not the model's own, so it may depend on tokens after the last label of a row.
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
    seen_calls: int = 0
    idle_steps: int | None = 0
    last_report: Any = field(default=None, repr=False)
    plan: Plan | None = None
    skips_padding: bool | None = None
    elsewhere: float = 0.0
    sharded: bool = False
    whole_rows: bool = False
    passes: Passes = field(default_factory=Passes, repr=False)
    _reached: Tensor | None = field(default=None, repr=False)  # whether padding had gradients, on its device
    _trying: bool = field(default=False, repr=False)
    _skipped: bool = field(default=False, repr=False)  # some MLP was given classes with padding
    _vain_tries: int = field(default=0, repr=False)

    def mode_of(self, batch: BatchClasses, name: str, training: bool) -> Mode:
        """The mode in which an MLP runs in a pass: that of the first time, if gradient checkpointing repeats it."""
        if computed_again() and name in batch.modes:
            found: Mode = batch.modes[name]
            return found
        mode = batch.modes[name] = self.mode(training)
        return mode

    def mode(self, training: bool) -> Mode:
        """The mode of a forward pass that starts now.

        Passes without gradients in training mode (rollouts, log-probabilities to compare with) count as evaluation.
        """
        if self.updates_off():
            return "dense"
        if self.forward != "auto":
            return self.forward
        if not training or not (torch.is_grad_enabled() or self.surroundings.recomputed_without_gradients()):
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
        batch = self._classify(model, inputs)
        padded = any(of_stack.padding for of_stack in batch.stacks.values())
        sharded = self.sharded or is_fsdp(type(model))  # then other ranks would have to come along
        tries = not sharded and not _continues(inputs) and (model.training or self.forward in ("exact", "sparse"))
        if padded and self.skips_padding is None and tries:
            self.try_skipping_padding(model, inputs)
        if batch.labelled_padding:
            attend_as_before(model)
        self.passes.begin(batch)

    def sees(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Called within a forward pass if the model runs on other inputs than it was called with."""
        if not self._trying:
            self.passes.replace(self._classify(model, inputs))

    def end(self) -> None:
        """Called at the end of each forward pass of the model, also after an error."""
        if not self._trying:
            self.passes.end()

    def _classify(self, model: nn.Module, inputs: Mapping[str, Any]) -> BatchClasses:
        return classify(model, inputs, whole_rows=self.whole_rows or _continues(inputs))

    def try_skipping_padding(self, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Test whether padding can be skipped in this model, if the batch has padding, and return whether it has."""
        classes = self._classify(model, inputs)
        if not any(of_stack.padding for of_stack in classes.stacks.values()):
            return False
        self.skips_padding = self._padding_is_out_of_reach(model, inputs, classes)
        if self.skips_padding:
            with self._set_aside("dense"), preserve_mode_and_rng(model):
                skip_padding_in_attention(model, inputs)
        if self.skips_padding is None:  # the test failed, or no MLP saw this batch's tokens (prompt tuning adds some)
            self._vain_tries += 1
            self.skips_padding = None if self._vain_tries < _VAIN_TRIES else False
        elif not self.skips_padding:
            logger.warning(
                f"the loss of {type(model).__name__} depends on padding tokens (does it pool without the attention "
                "mask?), so padding is computed like all other tokens"
            )
        return True

    def classes_of(self, name: str, x: Tensor) -> TokenClasses | None:
        """Classes of the tokens x [..., d] that an MLP sees; None if unknown, or if padding may not be skipped."""
        return self.classes_in(self.passes.of(name, x), name, x)

    def classes_in(self, batch: BatchClasses, name: str, x: Tensor) -> TokenClasses | None:
        """`classes_of`, in a given pass."""
        classes = batch.of(name, x)
        if classes is not None and classes.padding:
            if not self.skips_padding:
                return None
            self._skipped = True
        return classes

    def watch_padding(self, y: Tensor, classes: TokenClasses) -> None:
        """Check, in the backward pass, that no gradient reaches what an MLP returned [N, d] for padding."""

        def check(gradient: Tensor) -> None:
            found = _reaches_padding(gradient, classes)
            self._reached = found if self._reached is None else self._reached.to(found.device) | found

        if y.requires_grad and not self._trying:
            y.register_hook(check)

    def check_padding(self, model: nn.Module) -> None:
        """After a backward pass: compute padding from now on, if the loss depended on it."""
        reached, self._reached = self._reached, None
        if reached is not None and bool(reached):
            self.skips_padding = False
            attend_as_before(model)
            logger.warning(
                f"the loss of this step of {type(model).__name__} depends on tokens that were skipped as padding (does "
                "it read outputs at tokens that the mask or the labels leave out?), so its gradient is not exact; from "
                "now on they are computed like all other tokens"
            )

    def latest_classes_of(self, name: str) -> TokenClasses | None:
        """Classes of the tokens that an MLP saw last; None if unknown, or if padding may not be skipped."""
        classes = self.passes.latest.of_stack(name) if self.passes.latest else None
        return None if classes is None or (classes.padding and not self.skips_padding) else classes

    @property
    def latest_classes(self) -> Mapping[Any, TokenClasses]:
        """Classes of the latest forward, by stack."""
        return self.passes.latest.stacks if self.passes.latest else {}

    def _padding_is_out_of_reach(
        self, model: nn.Module, inputs: Mapping[str, Any], classes: BatchClasses
    ) -> bool | None:
        """Whether the model's loss is unchanged if MLPs return extreme values for padding; None if the test was
        inconclusive."""
        try:
            with self._set_aside("exact"), preserve_mode_and_rng(model):
                self.passes.begin(classes)
                self._skipped = False
                self.elsewhere, self.skips_padding = _FAR, True
                poisoned = loss_of(model(**inputs))
                self.elsewhere = 0.0
                plain = loss_of(model(**inputs))
        except Exception as error:  # a model that trains need not run in evaluation mode
            logger.warning(f"padding is computed like other tokens: testing whether it can be skipped failed ({error})")
            return None
        if not self._skipped:
            return None
        if poisoned is None or plain is None or plain.dim():
            return False
        if not plain.isfinite():  # no token of the batch has a label
            return None
        # The same products of the same shapes: a loss that does not depend on padding is the same to the bit.
        return bool((poisoned - plain).abs() <= _SAME * plain.abs().clamp_min(1.0))

    @contextmanager
    def _set_aside(self, forward: Forward) -> Iterator[None]:
        """Context manager: inside, the model can be tried in a mode, and what is known of batches stays as it is."""
        before, held = (self.forward, self.elsewhere, self.skips_padding), self.passes.copy()
        self.forward, self._trying = forward, True
        try:
            yield
        finally:
            (self.forward, self.elsewhere, self.skips_padding), self._trying = before, False
            self.passes = held

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "passes": Passes(), "_reached": None}


def _continues(inputs: Mapping[str, Any]) -> bool:
    """Whether a call goes on from a cache or fills one, which other passes would change."""
    return inputs.get("past_key_values") is not None or inputs.get("use_cache") is True


def _reaches_padding(gradient: Tensor, classes: TokenClasses) -> Tensor:
    """Whether a gradient [N, d] is more than rounding at padding, and finite: a bool on its device."""
    norms = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.promote_types(gradient.dtype, torch.float32))
    found = norms.index_fill(0, classes.predicted, 0).index_fill_(0, classes.context, 0).amax()
    return found.isfinite() & (found > _SAME * norms.amax())


def loss_of(outputs: Any) -> Tensor | None:
    """The loss in a model's outputs, which may be a dictionary; None if there is none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    return loss if isinstance(loss, Tensor) else None
