"""Finds a method by which a model can run on labelled rows, by comparing losses with the stock forward."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from ..layers.autograd_graph import leaves_behind
from ..layers.preserve_mode_and_rng import preserve_mode_and_rng
from .head_on_labelled_rows import IGNORED, Method, NotHereError, ReadsLogitsError, run_on_labelled_rows

_LENGTH, _TARGETS = 12, 8


def choose_method(model: PreTrainedModel, stock: Callable[..., Any]) -> Method:
    """The cheapest method that reproduces the model's own loss on a few tokens, in evaluation mode.

    Raises:
        NotHereError: there is none; the message says why.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise NotHereError("it has no output embeddings")
    own_forward = model.__dict__.get("forward")
    if (getattr(own_forward, "__module__", None) or "").startswith("liger_kernel"):
        raise NotHereError("Liger's fused loss is in use, which already avoids logits")
    if hooked := [name or "head" for name, m in head.named_modules() if m._forward_hooks or m._forward_pre_hooks]:
        raise NotHereError(f"hooks on its head ({', '.join(hooked)}) would see the labelled rows only")
    if model.main_input_name != "input_ids":
        raise NotHereError(f"its main input is {model.main_input_name}, not input_ids")
    reasons = []
    with preserve_mode_and_rng(model), torch.autocast(model.device.type, enabled=False):
        try:
            checks = _checks(model, stock)
        except Exception as error:
            raise NotHereError(f"it does not run on a few test tokens ({type(error).__name__}: {error})") from error
        known_loss = model.loss_function in (ForCausalLMLoss, ForMaskedLMLoss)
        methods: tuple[Method, ...] = ("chunks", "rows") if known_loss else ()
        for method in (*methods, "labels"):
            try:
                if method == "chunks":
                    _check_parameters(model, head)
                for inputs, expected in checks:
                    loss = run_on_labelled_rows(model, stock, inputs, method, 1).loss
                    if not same_loss(loss, expected, model.dtype):
                        raise NotHereError(f"a loss of {loss.item():.6g} instead of {expected.item():.6g}")
                return method
            except ReadsLogitsError:
                raise
            except NotHereError as reason:
                reasons.append(f"{method}: {reason}")
            except Exception as error:
                reasons.append(f"{method}: {type(error).__name__}: {error}")
    raise NotHereError("labelled rows alone do not reproduce its loss (" + "; ".join(reasons) + ")")


def _checks(model: PreTrainedModel, stock: Callable[..., Any]) -> list[tuple[dict[str, Any], Tensor]]:
    """A few batches, and the losses of the stock forward, which a method must reproduce."""
    inputs = few_tokens(model)
    outputs = stock(**inputs)
    others = _telling_labels(inputs["labels"], getattr(outputs, "logits", None), vocabulary_of(model))
    if model.config.is_encoder_decoder:  # its logits are other ones with other labels
        others = [_one_and_five(inputs["labels"], inputs["labels"])]
    batches = [{**inputs, "labels": labels} for labels in others]
    return [(inputs, outputs.loss), *((batch, stock(**batch).loss) for batch in batches)]


def _telling_labels(labels: Tensor, logits: Tensor | None, vocabulary: int) -> list[Tensor]:
    """Labels by whose loss wrong methods show in any dtype, for models that predict the next token and for others.

    A model's most likely tokens have a much smaller loss than others, so the loss changes by much more than rounding if
    a label is compared with another position; and if rows count instead of labels, where the second row has its least
    likely tokens.
    """
    if not isinstance(logits, Tensor) or logits.shape[:-1] != labels.shape:
        return [_one_and_five(labels, labels)]
    logits = logits[..., :vocabulary].float()
    most = logits.argmax(-1)
    # Some models set the logits of tokens that they never predict to the least value that there is.
    least = logits.masked_fill(logits < torch.finfo(logits.dtype).min / 1e6, torch.inf).argmin(-1)
    values = (most, torch.stack([most[0], least[1]]))
    return [_one_and_five(labels, each.roll(shift, 1)) for each in values for shift in (0, 1)]


def _one_and_five(labels: Tensor, values: Tensor) -> Tensor:
    """A label in the first row and five in the second, or as many as there is space for; none beside another."""
    chosen = torch.full_like(labels, IGNORED)
    chosen[0, 3] = values[0, 3]
    chosen[1, 2:11:2] = values[1, 2:11:2]
    return chosen


def vocabulary_of(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return min(embeddings.weight.shape[0], model.config.get_text_config(decoder=True).vocab_size)


def few_tokens(model: PreTrainedModel) -> dict[str, Any]:
    vocabulary = vocabulary_of(model)
    generator = torch.Generator().manual_seed(0)
    length = _TARGETS if model.config.is_encoder_decoder else _LENGTH
    ids = torch.randint(vocabulary, (2, _LENGTH), generator=generator, device="cpu").to(model.device)
    labels = torch.randint(vocabulary, (2, length), generator=generator, device="cpu").to(model.device)
    labels[:, : length // 3] = IGNORED
    labels[1, -2:] = IGNORED
    inputs: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if "attention_mask" in signature(model.forward).parameters:
        inputs["attention_mask"] = torch.ones_like(ids)
    return inputs


def _check_parameters(model: PreTrainedModel, head: nn.Module) -> None:
    """Chunks collect gradients for the head's own parameters, so its output must not depend on any others."""
    width = getattr(head, "in_features", None)
    if not isinstance(width, int):
        raise NotHereError(f"the head is a {type(head).__name__}, not a linear layer")
    with torch.enable_grad():
        hidden = torch.zeros(1, width, dtype=model.dtype, device=model.device, requires_grad=True)
        found = leaves_behind([head.forward(hidden)])
    if found - {id(parameter) for parameter in head.parameters()} - {id(hidden)}:
        raise NotHereError("the head depends on trainable parameters that are not its own")


def same_loss(loss: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """A wrong row or label changes a loss of a few tokens by much more than a rounding of its logits. A loss that is
    not computed in float32 at least is rounded in several places."""
    roundings = 128 * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps, 4 * torch.finfo(expected.dtype).eps
    return bool((loss - expected).abs() <= max(roundings) * max(1.0, expected.abs().item()))
