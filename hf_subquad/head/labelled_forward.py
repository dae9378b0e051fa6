"""Replaces a model's forward in training: logits at the labelled positions only, and no padding."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..layers.attention_patch import uses_sequence_attention
from .choose_head_method import choose_method
from .head_on_labelled_rows import Method, NotHereError, run_on_labelled_rows
from .remove_padding import announce, as_one_row, keeps_sequences_apart, longest_row, seen_by

logger = logging.get_logger(__name__)


ATTRIBUTE = "_labelled_forward"  # of the model


class LabelledForward:
    """Replaces `model.forward` on this model instance only; survives `deepcopy` and `pickle`.

    It is also an attribute of the model, where what wraps the forward finds that of a copy of the model.

    Attributes:
        model: the model whose forward it is.
        megabytes: limit on the logits of a chunk of rows.
        automatic: whether the callback asked for it, and so removes it.
        replaced: the model's earlier instance attribute `forward`, if any.
        active: False once it was removed, perhaps while something still wraps it.
        method: how the labelled rows reach the loss; None: the stock forward runs.
        takes_rows: whether the model takes a batch as one row without padding; None: not tried yet.
    """

    _always = _keeps_logits = False  # of the class, for models that were pickled without them

    def __init__(self, model: PreTrainedModel, megabytes: int) -> None:
        self.model, self.megabytes = model, megabytes
        self.automatic = False
        self.replaced = model.__dict__.get("forward")
        self.active = True
        self.method: Method | None = None
        self.takes_rows: bool | None = None
        self._found_for: tuple[Any, Any] | None = None  # the head and the loss function that `method` was found for

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that this one replaces."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)

    @property
    def __func__(self) -> Any:
        """By which accelerate knows a method: it wraps this function, and binds it to the model again."""
        kind: Any = type(self.model)
        return _as_function(kind)

    @property
    def __signature__(self) -> inspect.Signature:  # by which the Trainer chooses columns of the data
        return inspect.signature(self.replaced or MethodType(type(self.model).forward, self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trains = self._always or (self.model.training and torch.is_grad_enabled())
        if torch.compiler.is_compiling() or not self.active or not trains:
            return self.stock(*args, **kwargs)
        inputs = {**dict(zip(self.__signature__.parameters, args, strict=False)), **kwargs}
        row = inputs
        try:
            method = self.choose_method()
            if method is not None:
                row = self._as_one_row(inputs)
                return run_on_labelled_rows(self.model, self.stock, row, method, self.megabytes, self._keeps_logits)
        except NotHereError as reason:
            self._give_up(reason)
            if row is not inputs:  # of which MLPs were told
                announce(self.model, inputs)
        return self.stock(*args, **kwargs)

    @contextmanager
    def as_in_training(self, keep_logits: bool = False) -> Iterator[None]:
        """Context manager: inside, calls in evaluation mode or without gradients are like those in training.

        Args:
            keep_logits: outputs hold the logits of the labelled rows, [1, n, vocabulary].
        """
        self._settle()
        before = self._always, self._keeps_logits
        self._always, self._keeps_logits = True, keep_logits
        try:
            yield
        finally:
            self._always, self._keeps_logits = before

    def _settle(self) -> None:
        """Try now what the first call would try, so that hooks which record calls do not see the trials."""
        try:
            if self.choose_method() is not None and uses_sequence_attention(self.model) and not seen_by(self.model):
                self._try_rows()
        except NotHereError as reason:
            self._give_up(reason)

    def _try_rows(self) -> bool:
        if self.takes_rows is None:
            self.takes_rows = keeps_sequences_apart(self.model, self.stock)
        return self.takes_rows

    def _give_up(self, reason: NotHereError) -> None:
        if str(reason):
            self.method = None
            logger.warning_once(f"{type(self.model).__name__} computes the logits of all positions: {reason}")

    def _as_one_row(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs as one row without padding, if they are padded, the model can have them so, nobody sees it, and
        attention goes by sequence: else a long row would be slow."""
        if self.takes_rows is False or not uses_sequence_attention(self.model):
            return inputs
        row = as_one_row(inputs, longest_row(self.model))
        if row is None:
            return inputs
        if seen := seen_by(self.model):
            logger.warning_once(f"batches keep their padding outside of the MLPs, as {seen} would see the difference")
            return inputs
        if not self._try_rows():
            return inputs
        announce(self.model, row)
        return row

    def choose_method(self) -> Method | None:
        """The method to run on labelled rows; found again if the head or the loss function is replaced (by PEFT, say).

        Raises:
            NotHereError: there is none. Raised the first time only.
        """
        now = (self.model.get_output_embeddings(), self.model.loss_function)
        if self._found_for is None or any(a is not b for a, b in zip(now, self._found_for, strict=True)):
            self._found_for, self.method = now, None
            self.method = choose_method(self.model, self.stock)
        return self.method


@lru_cache(maxsize=64)
def _as_function(kind: type[PreTrainedModel]) -> Any:
    """A forward of models of this class that calls their `LabelledForward`."""

    def forward(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return vars(model)[ATTRIBUTE](*args, **kwargs)

    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    return forward
