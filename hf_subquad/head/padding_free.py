"""Turns a padded batch into a single row of sequences without padding, for models that keep sequences of a row apart.

So padding costs nothing anywhere in the model. Positions start anew with each sequence, by which transformers' models
know that it is a new one.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..layers.batch_hook import BatchHook
from ..layers.preserve_mode_and_rng import preserve_mode_and_rng
from .choose_method import few_tokens, same_loss
from .head_on_labelled_rows import IGNORED

_WORTHWHILE = 0.95  # real tokens among all
_USED = ("input_ids", "attention_mask", "labels")
_KEPT = ("num_items_in_batch", "return_dict", "use_cache")


def without_padding(inputs: dict[str, Any], longest: float = math.inf) -> dict[str, Any] | None:
    """The inputs of a causal language model as one row; None unless they are a batch that is padded at the end.

    Args:
        inputs: `input_ids`, `attention_mask` and `labels`, each [B, S].
        longest: row that may be made.

    Returns:
        input_ids, position_ids and labels [1, T], with T the number of real tokens, and no mask.
    """
    ids, mask, labels = (inputs.get(name) for name in _USED)
    if not (isinstance(ids, Tensor) and isinstance(mask, Tensor) and isinstance(labels, Tensor)):
        return None
    others = {name for name, value in inputs.items() if value is not None and value is not False}
    if ids.dim() != 2 or not ids.shape == mask.shape == labels.shape or others - {*_USED, *_KEPT}:
        return None
    real = mask != 0
    padded_at_the_end = bool(real[:, 0].all()) and not bool((real[:, 1:] & ~real[:, :-1]).any())
    tokens = int(real.sum())
    if not padded_at_the_end or bool((labels[~real] != IGNORED).any()):
        return None
    if tokens > min(longest, _WORTHWHILE * real.numel()):
        return None
    labels = torch.cat([torch.full_like(labels[:, :1], IGNORED), labels[:, 1:]], 1)  # the row before predicts no token
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    flat = {"input_ids": ids[real], "position_ids": positions[real], "labels": labels[real]}
    kept = {name: value for name, value in inputs.items() if name not in _USED}
    return {**kept, **{name: values.unsqueeze(0) for name, values in flat.items()}, "use_cache": False}


def longest_row(model: PreTrainedModel) -> float:
    """Tokens that a row may have: with more, a sliding window would take PyTorch's attention over the whole row."""
    config = model.config.get_text_config(decoder=True)
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((window for window in windows if isinstance(window, int)), default=math.inf)


def announce(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Tell sparse MLPs of the batch that they will see."""
    for hook in list(model._forward_pre_hooks.values()):
        if isinstance(hook, BatchHook):
            hook.runtime.sees(model, inputs)


def keeps_sequences_apart(model: PreTrainedModel, stock: Callable[..., Any]) -> bool:
    """Whether a few padded sequences have the same loss as one row."""
    inputs = few_tokens(model)
    lengths = torch.tensor([inputs["input_ids"].shape[1] - 5, inputs["input_ids"].shape[1]])
    real = torch.arange(inputs["input_ids"].shape[1]) < lengths.unsqueeze(1)
    inputs["attention_mask"] = real.long().to(model.device)
    inputs["labels"] = inputs["labels"].masked_fill(~real.to(model.device), IGNORED)
    row = without_padding(inputs)
    try:
        with preserve_mode_and_rng(model), torch.autocast(model.device.type, enabled=False):
            return row is not None and same_loss(stock(**row).loss, stock(**inputs).loss, model.dtype)
    except Exception:  # of whatever kind: it does not take such a row
        return False
