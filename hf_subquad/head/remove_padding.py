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
from .choose_head_method import few_tokens, same_loss, vocabulary_of
from .head_on_labelled_rows import IGNORED

_LONGEST = 4096  # tokens
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")
_WORTHWHILE = 0.95  # real tokens among all
_USED = ("input_ids", "attention_mask", "labels")
_KEPT = ("num_items_in_batch", "return_dict")
_OTHER_OUTPUTS = ("output_hidden_states", "output_attentions")
# Hooks that do the same to a row: those for the gradients of embeddings beside frozen ones, and those that collect
# hidden states and attentions, which do nothing unless asked for these.
_HARMLESS = ("make_inputs_require_grads", "make_inputs_require_grad", "output_capturing_hook")


def as_one_row(inputs: dict[str, Any], longest: float = math.inf) -> dict[str, Any] | None:
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


def longest_row(model: PreTrainedModel) -> int:
    """Tokens that a row may have. Beyond a sliding window, or with dropout, PyTorch's attention would take over the
    whole row, and the mask of a row grows with the square of its length."""
    config = model.config.get_text_config(decoder=True)
    if any(getattr(config, name, None) for name in _DROPOUTS):
        return 0
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min([_LONGEST, *(window for window in windows if isinstance(window, int))])


def seen_by(model: PreTrainedModel) -> str | None:
    """What outside of the model would see that a batch is one row, in words: a hook on one of its modules, which may do
    something else with it (NEFTune's noise depends on the length of a row), or outputs for each token. None: nothing.
    """
    for config in (model.config, model.config.get_text_config(decoder=True)):
        for name in _OTHER_OUTPUTS:
            if getattr(config, name, None):
                return f"code that reads what config.{name} returns"
    for name, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not _is_harmless(hook):
                return f"the hook {getattr(hook, '__qualname__', type(hook).__name__)} on {name or 'the model'}"
    return None


def _is_harmless(hook: Any) -> bool:
    library = (getattr(hook, "__module__", None) or "").partition(".")[0]
    if library == "hf_subquad":  # they follow the tokens that the model runs on
        return True
    return library in ("transformers", "peft") and getattr(hook, "__name__", None) in _HARMLESS


def announce(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Tell sparse MLPs of the batch that they will see."""
    for hook in list(model._forward_pre_hooks.values()):
        if isinstance(hook, BatchHook):
            hook.runtime.sees(model, inputs)


def keeps_sequences_apart(model: PreTrainedModel, stock: Callable[..., Any]) -> bool:
    """Whether a model gives a row of sequences the loss that it gives the padded ones, and whether the logits of the
    second sequence are the same to the bit when the tokens of the first one change."""
    if model.config.is_encoder_decoder:  # a row would hold both of two sequences
        return False
    inputs = few_tokens(model)
    ids: Tensor = inputs["input_ids"]
    first, whole = ids.shape[1] - 5, ids.shape[1]
    real = torch.arange(whole, device=ids.device) < torch.tensor([[first], [whole]], device=ids.device)
    inputs = {**inputs, "attention_mask": real.long(), "labels": inputs["labels"].masked_fill(~real, IGNORED)}
    row = as_one_row(inputs)
    if row is None:
        return False
    try:
        with preserve_mode_and_rng(model), torch.autocast(model.device.type, enabled=False):
            outputs = stock(**row)
            if not same_loss(outputs.loss, stock(**inputs).loss, model.dtype):
                return False
            changed = _other_tokens(row["input_ids"], first, vocabulary_of(model))
            others = [stock(**{**row, "input_ids": tokens}) for tokens in changed]
            return all(torch.equal(other.logits[:, first:], outputs.logits[:, first:]) for other in others)
    except Exception:  # of whatever kind: it does not take such a row
        return False


def _other_tokens(row: Tensor, count: int, vocabulary: int) -> list[Tensor]:
    """Rows with other tokens in the first places. Several, as what one of them changes may be rounded away."""
    first, rest = row[:, :count], row[:, count:]
    return [torch.cat([(first + number * vocabulary // 7) % vocabulary, rest], 1) for number in range(1, 7)]
