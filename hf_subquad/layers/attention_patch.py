"""Lets the attention of a model skip padding and other sequences of a packed row, and undoes that."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ..ops.attention import MAY_SKIP, sequence_attention
from .peft_and_checkpointing import language_model

_OURS, _STOCK = "subquad_sdpa", "sdpa"  # names of attention functions
# Wherever a patched model is unpickled, this module is imported.
AttentionInterface.register(_OURS, sequence_attention)
AttentionMaskInterface.register(_OURS, sdpa_mask)

_SAME = 1e-4  # relative difference of the losses that rounding may cause, at least


def skip_padding_in_attention(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """`use_sequence_attention`, if the loss of these inputs, a few rows, stays the same up to rounding.

    A model may look at the name of its attention function, and do something else.
    """
    if not use_sequence_attention(model):
        return
    try:
        ours = model(**inputs).loss
        with stock_attention(model):
            stock = model(**inputs).loss
        tolerance = max(_SAME, 8 * torch.finfo(next(model.parameters()).dtype).eps)
        same = bool((ours - stock).abs() <= tolerance * stock.abs().clamp_min(1.0))
    except Exception:  # of whatever kind: a few rows need not run by themselves
        same = False
    if not same:
        restore_attention(model)


def use_sequence_attention(model: nn.Module) -> bool:
    """Replace PyTorch's attention, on the CPU, by `sequence_attention`; returns whether the model used it.

    Only for models whose loss does not depend on padding. It is not saved with the model.
    """
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type != "cpu":
        return False
    _rename(model, _STOCK, _OURS)
    if not _using(model, _OURS):
        return False
    for module in model.modules():
        setattr(module, MAY_SKIP, True)
    return True


def uses_sequence_attention(model: nn.Module) -> bool:
    """Whether `use_sequence_attention` is in effect for the text."""
    root = language_model(model)  # runs in every step, so not all modules are asked
    if root is None or MAY_SKIP not in vars(root):
        return False
    return root.config.get_text_config(decoder=True)._attn_implementation == _OURS


def restore_attention(model: nn.Module) -> bool:
    """Undo `use_sequence_attention`; returns whether there was something to undo."""
    root = language_model(model)  # runs in every step of a loss of one's own, so not all modules are asked
    if root is not None and MAY_SKIP not in vars(root):
        return False
    for module in model.modules():
        vars(module).pop(MAY_SKIP, None)
    return _rename(model, _OURS, _STOCK)


@contextmanager
def stock_attention(model: nn.Module) -> Iterator[None]:
    """Context manager: inside, attention is that of the unpatched model."""
    changed = restore_attention(model)
    try:
        yield
    finally:
        if changed:
            use_sequence_attention(model)


def _using(model: nn.Module, attention: str) -> list[Any]:
    """The configs in a model that name this attention function; other models may have them, too."""
    configs: dict[int, Any] = {id(config): config for m in model.modules() if (config := getattr(m, "config", None))}
    return [config for config in configs.values() if getattr(config, "_attn_implementation", None) == attention]


def _rename(model: nn.Module, before: str, after: str) -> bool:
    found = _using(model, before)
    for config in found:
        config._attn_implementation = {"": after}  # not of the configs inside, which may have others
    return bool(found)
