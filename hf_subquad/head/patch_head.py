"""Limits a model's head to the labelled positions, and undoes that."""

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from torch import nn

from ..errors import AlreadyPatchedError, ConfigError, NotPatchedError, UnsupportedModuleError
from ..layers.patched_mlps import runtime_of
from ..layers.peft_and_checkpointing import language_model
from .head_on_labelled_rows import NotHereError
from .labelled_forward import ATTRIBUTE, LabelledForward

ModelT = TypeVar("ModelT", bound=nn.Module)


def patch_head(model: ModelT, megabytes: int = 256) -> ModelT:
    """Patch a model, in place, to compute logits and loss in training only at labelled positions, in chunks of rows.

    Loss and gradients equal those of the stock forward up to rounding. `outputs.logits` is None, so do not use this if
    your code reads logits in training. Calls without labels, in evaluation mode, without gradients or under
    `torch.compile`, and batches without any label, run the stock forward.

    It does not need sparse MLPs, and works before or after `get_peft_model`.

    Args:
        model: a causal or masked language model, or an encoder-decoder; also wrapped by PEFT or DDP.
        megabytes: limit on the memory for the logits of a chunk and their gradient, if the model's loss follows its
            head directly. Otherwise (soft-capped or scaled logits) the logits of all labelled rows exist at once.

    Returns:
        The same model.

    Raises:
        AlreadyPatchedError: the head is patched.
        UnsupportedModuleError: the model's loss cannot be computed on labelled rows; the message says why.
        ConfigError: `megabytes` is out of range.
        In each case the model is unchanged.
    """
    if type(megabytes) is not int or megabytes < 1:
        raise ConfigError(f"megabytes must be an integer of at least 1, got {megabytes!r}")
    if labelled_forward(model) is not None:
        raise AlreadyPatchedError("the head is patched already: call unpatch_head(model) first to patch it again")
    root = language_model(model)
    if root is None:
        raise UnsupportedModuleError(f"{type(model).__name__} contains no transformers model")
    forward = LabelledForward(root, megabytes)
    wrapped = vars(root).get(ATTRIBUTE)  # an earlier one, by something that calls whichever is there
    if wrapped is not None:
        forward.replaced = wrapped.replaced
    try:
        forward.choose_method()
    except NotHereError as reason:
        raise UnsupportedModuleError(
            f"the head of {type(root).__name__} cannot be limited to labelled positions: {reason}"
        ) from reason
    setattr(root, ATTRIBUTE, forward)
    if wrapped is None:
        root.forward = forward
    return model


def unpatch_head(model: ModelT) -> ModelT:
    """Undo `patch_head`, in place: restore the model's forward.

    Raises:
        NotPatchedError: the head is not patched.
    """
    forward = labelled_forward(model)
    if forward is None:
        raise NotPatchedError(f"the head of {type(model).__name__} is not patched: call patch_head(model) first")
    forward.active = False  # if something wraps it by now, it hands calls through
    attributes, before = vars(forward.model), forward.replaced
    current = attributes.get("forward")
    if current is forward or getattr(current, "__func__", None) is forward.__func__:
        del attributes[ATTRIBUTE], attributes["forward"]
        if before is not None:
            attributes["forward"] = before
    return model


def unpatch_automatic_head(model: nn.Module) -> None:
    """`unpatch_head`, if `SubquadCallback` patched it, and not the user."""
    forward = labelled_forward(model)
    if forward is not None and forward.automatic:
        unpatch_head(model)


def labelled_forward(model: nn.Module) -> LabelledForward | None:
    """The forward that `patch_head` installed in a model, or None."""
    root = language_model(model)
    if root is None:
        return None
    found = vars(root).get(ATTRIBUTE)
    return found if found is not None and found.active else None


def head_as_in_training(model: nn.Module, keep_logits: bool = False) -> AbstractContextManager[None]:
    """Context manager: `LabelledForward.as_in_training` of a model with sparse MLPs; does nothing if its head is not
    patched, or training will not use the patch."""
    forward = head_in_training(model)
    return nullcontext() if forward is None else forward.as_in_training(keep_logits)


def head_in_training(model: nn.Module) -> LabelledForward | None:
    """`labelled_forward` of a model with sparse MLPs; None if it will be trained without labels in the call."""
    return None if runtime_of(model).without_labels else labelled_forward(model)
