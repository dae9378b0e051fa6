"""Whether a model's padding may be skipped: a trial before the first batch that has some, and a check of each step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .attention_patch import restore_attention
from .classify_tokens import TokenClasses

_VAIN_TRIALS = 4
_SAME = 1e-6  # relative difference of losses
_FAR = 30.0  # what MLPs return for padding in the trial

logger = logging.get_logger(__name__)


@dataclass
class Padding:
    """What is known of a model's padding.

    Attributes:
        may_skip: the loss does not depend on padding, so MLPs skip it; None: not known yet.
    """

    may_skip: bool | None = None
    _extreme: bool = False  # MLPs return extreme values for it
    _vain_trials: int = 0
    _met: bool = False  # some MLP was given classes with padding
    _reached: Tensor | None = field(default=None, repr=False)  # whether padding had gradients, on its device

    def try_skipping(self, model: nn.Module, losses: Sequence[Callable[[], Tensor | None]]) -> None:
        """Find out whether the loss of a batch with padding stays the same if MLPs return extreme values for it.

        Args:
            model: for messages.
            losses: each runs the model, with MLPs that skip padding, and returns its loss: the first on a few rows; the
                second, if that tells nothing, on the whole batch.
        """
        for loss in losses:
            try:
                failure, self.may_skip = None, self._is_out_of_reach(loss)
            except Exception as error:  # a model that trains need not run in evaluation mode
                failure = error
            if self.may_skip is not None:
                break
        if failure is not None:
            logger.warning(
                f"padding is computed like other tokens: testing whether it can be skipped failed ({failure})"
            )
        if self.may_skip is None:  # the trial failed, or no MLP saw this batch's tokens (prompt tuning adds some)
            self._vain_trials += 1
            self.may_skip = None if self._vain_trials < _VAIN_TRIALS else False
        elif not self.may_skip:
            logger.warning(
                f"the loss of {type(model).__name__} depends on padding tokens (does it pool without the attention "
                "mask?), so padding is computed like all other tokens"
            )

    def usable_classes(self, classes: TokenClasses | None) -> TokenClasses | None:
        """The classes that an MLP may use; None if they have padding, and it may not be skipped."""
        if classes is None or not classes.padding:
            return classes
        self._met = True
        return classes if self.may_skip else None

    def watch(self, y: Tensor, classes: TokenClasses) -> None:
        """Check, in the backward pass, that no gradient reaches what an MLP returned [N, d] for padding. In a trial,
        replace it by extreme values instead."""
        if self._extreme:
            real, replaced = torch.cat([classes.predicted, classes.context]), torch.full_like(y, _FAR)
            replaced[:, 1::2] = -_FAR  # so that no norm removes it
            y.copy_(replaced.index_copy_(0, real, y[real]))

        def check(gradient: Tensor) -> None:
            found = _reaches_padding(gradient, classes)
            self._reached = found if self._reached is None else self._reached.to(found.device) | found

        if y.requires_grad:
            y.register_hook(check)

    def check(self, model: nn.Module) -> None:
        """After a backward pass: compute padding from now on, if the loss depended on it."""
        reached, self._reached = self._reached, None
        if reached is not None and bool(reached):
            self.may_skip = False
            restore_attention(model)
            logger.warning(
                f"the loss of this step of {type(model).__name__} depends on tokens that were skipped as padding (does "
                "it read outputs at tokens that the mask or the labels leave out?), so its gradient is not exact; from "
                "now on they are computed like all other tokens"
            )

    def _is_out_of_reach(self, loss: Callable[[], Tensor | None]) -> bool | None:
        """Whether padding cannot change a loss; None if the trial was inconclusive."""
        try:
            self._met, self.may_skip = False, True
            self._extreme = True
            poisoned = loss()
            self._extreme = False
            plain = loss()
        finally:
            self.may_skip, self._extreme = None, False
        if not self._met:
            return None
        if poisoned is None or plain is None or plain.dim():
            return False
        if not plain.isfinite():  # no token of the batch has a label
            return None
        # The same products of the same shapes: a loss that does not depend on padding is the same to the bit.
        return bool((poisoned - plain).abs() <= _SAME * plain.abs().clamp_min(1.0))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reached": None}


def most_and_least_padded(inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The batch's rows with the most and the least padding; None without a mask by row and token."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    tokens = mask.count_nonzero(1)
    rows = torch.stack([tokens.argmin(), tokens.argmax()])

    def of_rows(value: Any) -> Any:
        by_row = isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(mask)
        return value[rows.to(value.device)] if by_row else value

    return {name: of_rows(value) for name, value in inputs.items()}


def _reaches_padding(gradient: Tensor, classes: TokenClasses) -> Tensor:
    """Whether a gradient [N, d] is more than rounding at padding, and finite: a bool on its device."""
    norms = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.promote_types(gradient.dtype, torch.float32))
    found = norms.index_fill(0, classes.predicted, 0).index_fill_(0, classes.context, 0).amax()
    return found.isfinite() & (found > _SAME * norms.amax())
