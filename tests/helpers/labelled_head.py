"""Models, batches and comparisons for tests of the head on labelled positions."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_subquad.head import chunked_loss

from .models import _LLAMA, VOCABULARY, build, tokens
from .tiny_models import _filled

EPS = torch.finfo(torch.float32).eps
IGNORED = -100
CHUNKED = ("llama", "opt", "gpt2", "qwen2", "gemma", "phi")  # gemma and opt tie their heads, phi's has a bias
CHANGED_LOGITS = ("gemma2", "granite", "cohere")  # soft-capped, divided, multiplied
INLINE = ("bert", "roberta", "t5", "bart")


def model_of(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    if name == "phi":
        return build(name, dtype, partial_rotary_factor=0.4)
    if name in ("granite", "cohere"):
        scale = {"granite": {"logits_scaling": 3.0}, "cohere": {"logit_scale": 0.4}}[name]
        config = getattr(transformers, f"{name.title()}Config")(**{**_LLAMA, **scale})
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return _filled(getattr(transformers, f"{name.title()}ForCausalLM")(config)).to(dtype).train()
    return build(name, dtype)


def labelled_batch(seed: int = 1) -> dict[str, Tensor]:
    """Rows with a prompt, with padding, with neither, and a single label in the middle."""
    ids, labels = tokens(seed, (4, 9)), tokens(seed + 1, (4, 9))
    labels[0, :5] = labels[1, -3:] = labels[3, :4] = labels[3, 5:] = IGNORED
    return {"input_ids": ids, "labels": labels, "attention_mask": (labels != 3).long() | 1}


def loss_and_gradients(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def exact_loss_and_gradients(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The definition, in float64 (transformers computes losses in float32 whatever the model)."""
    model = copy.deepcopy(model).double()
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max((found[name].double() - wanted[name].double()).abs().max().item() for name in wanted)


def largest(gradients: dict[str, Tensor]) -> float:
    return torch.stack([gradient.abs().max() for gradient in gradients.values()]).max().item()  # NaN if there is one


def assert_as_good_as_stock(model: nn.Module, patch: Callable[[nn.Module], Any], inputs: dict[str, Any]) -> None:
    """Errors against float64 at most three times those of the stock forward, or a few roundings of float32."""
    exact_loss, exact = exact_loss_and_gradients(model, inputs)
    stock_loss, stock = loss_and_gradients(model, inputs)
    patch(model)
    loss, gradients = loss_and_gradients(model, inputs)
    assert (loss - exact_loss).abs() <= 3 * (stock_loss - exact_loss).abs() + 4 * EPS * exact_loss
    assert distance(gradients, exact) <= 3 * distance(stock, exact) + 4 * EPS * largest(exact)


def focal(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    shifted = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    each = nn.functional.cross_entropy(logits.transpose(1, 2), shifted, reduction="none")
    return (each * torch.arange(logits.shape[1])).mean()


def four_rows_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte holds four rows of logits in float32: there are several chunks, and a last one that is smaller."""
    monkeypatch.setattr(chunked_loss, "MEGABYTE", 4 * 8 * VOCABULARY)
