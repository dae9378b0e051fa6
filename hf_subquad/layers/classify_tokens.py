"""Classifies the tokens of a batch: padding, context, or predicted (the loss is computed at them).

Classes are determined once per forward of the model, from its inputs. Where that is impossible, there is one class.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

Stack = Literal["encoder", "decoder", "only"]

_IGNORED = -100  # the label of tokens that a loss leaves out
# In the names of MLPs that see something else than the text.
_OTHER_INPUTS = ("vision", "visual", "image", "audio", "speech", "experts")
_SAMPLED = 64
_CALLS = 64  # of an MLP in a pass, of which samples are kept
_STRIDE = 2654435761  # prime, so that samples are of many tokens and features whatever the shape


@dataclass(frozen=True)
class TokenClasses:
    """The tokens of a batch of B rows and S columns, by class. Those in neither list are padding.

    Attributes:
        shape: (B, S).
        predicted: int64, flat positions of tokens at which the loss is computed, ascending.
        context: int64, flat positions of the other real tokens, ascending.
    """

    shape: tuple[int, int]
    predicted: Tensor
    context: Tensor

    @classmethod
    def of(cls, predicted: Tensor, real: Tensor) -> "TokenClasses":
        """From two masks, bool [B, S]; predicted tokens must be real."""
        flat, real = predicted.reshape(-1), real.reshape(-1)
        rows, columns = predicted.shape
        return cls((rows, columns), (flat & real).nonzero().squeeze(1), (~flat & real).nonzero().squeeze(1))

    @property
    def tokens(self) -> int:
        """N = B S."""
        return self.shape[0] * self.shape[1]

    @property
    def padding(self) -> int:
        """Number of padding tokens."""
        return self.tokens - len(self.predicted) - len(self.context)

    @cached_property
    def real(self) -> Tensor | None:
        """int64, positions of all tokens but padding, ascending; None if there is no padding."""
        return torch.cat([self.predicted, self.context]).sort().values if self.padding else None

    def shares(self) -> tuple[float, float, float]:
        """Shares of padding, context and predicted tokens."""
        return self.padding / self.tokens, len(self.context) / self.tokens, len(self.predicted) / self.tokens


@dataclass
class BatchClasses:
    """The token classes of one forward of the model, by stack, and samples of its MLPs' inputs to recognise it by.

    Attributes:
        labelled_padding: the loss is computed at padding, so that nothing is skipped.
        whole: the classes that the model was called with, if it runs on the same tokens without padding.
        may_repeat: gradient checkpointing may compute the forward again.
        modes: how its MLPs ran, by name.
        repeated: MLPs that gradient checkpointing has computed again.
    """

    stacks: Mapping[Stack, TokenClasses]
    labelled_padding: bool = False
    whole: "BatchClasses | None" = None
    may_repeat: bool = False
    modes: dict[str, Any] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)
    _seen: dict[str, deque[Tensor]] = field(default_factory=dict)

    def of(self, name: str, x: Tensor) -> TokenClasses | None:
        """The classes of the tokens x [..., d] of an MLP, by its name in the model; None if it sees other tokens."""
        classes = self.of_stack(name)
        leading = tuple(x.shape[:-1])
        return classes if classes is not None and leading in (classes.shape, (classes.tokens,)) else None

    def of_stack(self, name: str) -> TokenClasses | None:
        """The classes of the tokens that the stack of an MLP sees."""
        if any(word in name for word in _OTHER_INPUTS):
            return None
        stack: Stack = "decoder" if any(part.endswith("decoder") for part in name.split(".")) else "encoder"
        return self.stacks.get("only", self.stacks.get(stack))

    def note(self, mlp: str, x: Tensor) -> None:
        """Remember an MLP's input, to recognise this forward when gradient checkpointing recomputes it."""
        self._seen.setdefault(mlp, deque(maxlen=_CALLS)).append(_sample(x))

    @staticmethod
    def nearest(batches: "Sequence[BatchClasses]", mlp: str, x: Tensor) -> "BatchClasses":
        """The batch in which the MLP saw what is most like x; the last of `batches` if it saw nothing in any.

        Even for the same inputs the difference need not be zero: with gradients, attention may run another kernel.
        """
        seen = [(batch, sample) for batch in reversed(batches) for sample in batch._seen.get(mlp, [])]
        if not seen:
            return batches[-1]
        known, now = torch.stack([sample for _, sample in seen]), _sample(x)
        distances = (known.float().nan_to_num_() - now.float().nan_to_num_()).abs().amax(1)
        alike = [seen[i][0] for i in (distances == distances.min()).nonzero().flatten().tolist()]
        # Of passes with equal inputs, a backward pass comes to the latest one first.
        found = next((batch for batch in alike if mlp not in batch.repeated), alike[0])
        found.repeated.add(mlp)
        return found


def _sample(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    return flat.index_select(0, _sampled_places(len(flat), x.device))


@lru_cache(maxsize=64)
def _sampled_places(count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(_SAMPLED, device=device) * _STRIDE % max(1, count)


def classify(model: nn.Module, inputs: Mapping[str, Any], whole_rows: bool = False) -> BatchClasses:
    """The classes of a batch, by stack; stacks whose classes cannot be determined are left out.

    Args:
        inputs: the arguments that the model is called with, by name.
        whole_rows: tokens after the last label of a row are used, by another loss than the model's, or by a later call.
    """
    labels = inputs.get("labels")
    shifted = inputs.get("shift_labels")
    if not isinstance(labels, Tensor) and not isinstance(shifted, Tensor):
        return BatchClasses({})
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return _classified(_encoder_decoder(inputs, labels), whole_rows)
    found = _one_stack(model, inputs, labels, shifted)
    return _classified({} if found is None else {"only": found}, whole_rows)


def predicts_next_token(model: nn.Module) -> bool | None:
    """Whether the label at position t is predicted at position t - 1, as in causal LMs; None if unknown."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    loss_type = getattr(model, "loss_type", None)
    if loss_type is None:
        unwrap = getattr(model, "get_base_model", None)  # PEFT's
        base = unwrap() if callable(unwrap) else model
        return True if type(base).__name__.endswith(("LMHeadModel", "ForCausalLM")) else None
    return LOSS_MAPPING.get(loss_type) is ForCausalLMLoss


class _Masks(NamedTuple):
    """Each bool [B, S].

    Attributes:
        predicted: tokens at which the loss is computed.
        real: tokens that are not padding by the attention mask.
        causal: tokens do not see those after them.
    """

    predicted: Tensor
    real: Tensor
    causal: bool


def _classified(masks: Mapping[Stack, _Masks], whole_rows: bool) -> BatchClasses:
    labelled_padding = any(bool((of_stack.predicted & ~of_stack.real).any()) for of_stack in masks.values())
    stacks: dict[Stack, TokenClasses] = {}
    for name, (predicted, real, causal) in masks.items():
        if labelled_padding:
            real = torch.ones_like(real)
        elif causal and not whole_rows:
            real = real & _up_to_last(predicted)
        stacks[name] = TokenClasses.of(predicted, real)
    return BatchClasses(stacks, labelled_padding)


def _encoder_decoder(inputs: Mapping[str, Any], labels: Tensor | None) -> dict[Stack, _Masks]:
    found: dict[Stack, _Masks] = {}
    real = _real(inputs.get("attention_mask"), _text_shape(inputs), labels)
    if real is not None:
        found["encoder"] = _Masks(torch.zeros_like(real), real, causal=False)
    if isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point():
        target = _real(inputs.get("decoder_attention_mask"), tuple(labels.shape), labels)
        if target is not None:
            found["decoder"] = _Masks(labels != _IGNORED, target, causal=True)
    return found


def _one_stack(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor | None, shifted: Tensor | None
) -> _Masks | None:
    shape = _text_shape(inputs)
    by_token = shifted if isinstance(shifted, Tensor) else labels
    real = _real(inputs.get("attention_mask"), shape, by_token)
    if real is None or by_token is None:
        return None
    if by_token.shape != shape or by_token.is_floating_point():  # one label a row, or several
        return _Masks(_first_and_last(real), real, causal=False)
    causal = predicts_next_token(model)
    if causal is None and not isinstance(shifted, Tensor):
        return None
    predicted = by_token != _IGNORED
    if causal and not isinstance(shifted, Tensor):
        predicted = torch.cat([predicted[:, 1:], torch.zeros_like(predicted[:, :1])], 1)
    return _Masks(predicted, real, bool(causal))


def _text_shape(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    for name in ("input_ids", "inputs_embeds"):
        values = inputs.get(name)
        if isinstance(values, Tensor) and values.dim() >= 2:
            return values.shape[0], values.shape[1]
    return None


def _real(mask: Any, shape: tuple[int, ...] | None, like: Tensor | None) -> Tensor | None:
    """bool [B, S]: tokens that are not padding; None if the mask has a form from which that cannot be known."""
    if shape is None or like is None:
        return None
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=like.device)
    if not isinstance(mask, Tensor):
        return None
    if tuple(mask.shape) == tuple(shape):
        return mask != 0
    if mask.dim() == 4 and (mask.shape[0], mask.shape[-1]) == tuple(shape):
        seen = mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0
        return seen.any(1).any(1)  # keys that some query attends to
    return None


def _up_to_last(predicted: Tensor) -> Tensor:
    """bool [B, S]: tokens up to the last predicted one of their row. In a causal stack later tokens affect nothing."""
    return predicted.flip(1).cumsum(1).flip(1) > 0


def _first_and_last(real: Tensor) -> Tensor:
    """bool [B, S]: the first and the last real token of each row, which heads for sequences read."""
    places = torch.arange(real.shape[1], device=real.device)
    first = real.int().argmax(1, keepdim=True)
    last = (real.int() * (places + 1)).argmax(1, keepdim=True)
    return ((places == first) | (places == last)) & real
