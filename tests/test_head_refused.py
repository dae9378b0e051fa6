"""Heads that cannot be limited to labelled positions are refused by name, or the limit ends when that shows."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from helpers.labelled_head import (
    CHANGED_LOGITS,
    CHUNKED,
    EPS,
    IGNORED,
    INLINE,
    distance,
    focal,
    labelled_batch,
    largest,
    loss_and_gradients,
    model_of,
)
from helpers.models import _LLAMA, assert_same, build, snapshot
from helpers.tiny_models import LARGEST, NotBuiltError, _filled, tiny_config
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from hf_subquad import UnsupportedModuleError, patch_head
from hf_subquad.head import head_on_labelled_rows
from hf_subquad.head.patch_head import labelled_forward


def _other_loss() -> nn.Module:
    model = model_of("llama")
    model.loss_function = focal
    return model


def _hooked() -> nn.Module:
    model = model_of("llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    return model


def _liger() -> nn.Module:
    model = model_of("llama")

    def fused(*args: Any, **kwargs: Any) -> Any:
        return type(model).forward(model, *args, **kwargs)

    fused.__module__ = "liger_kernel.transformers.model.llama"
    model.forward = fused
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: build("vit"), "no output embeddings"),
        (lambda: nn.Linear(2, 2), "contains no transformers model"),
        (_other_loss, "loss"),
        (_hooked, "hooks"),
        (_liger, "Liger"),
        (lambda: build("whisper"), "main input"),
    ],
)
def test_refused_by_name(make: Callable[[], nn.Module], reason: str) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(UnsupportedModuleError, match=reason):
        patch_head(model)
    assert_same(before, snapshot(model))


def test_wrong_rows_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = head_on_labelled_rows.labelled_positions
    wrong = lambda labels, shifted: right(labels, not shifted)  # noqa: E731
    monkeypatch.setattr(head_on_labelled_rows, "labelled_positions", wrong)
    for family in ("llama", "gemma2", "bert"):
        with pytest.raises(UnsupportedModuleError, match="do not reproduce its loss"):
            patch_head(model_of(family))


class ShiftsInside(transformers.LlamaForCausalLM):
    """The loss as modelling code on the Hub has it."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **_: Any) -> Any:
        logits = self.lm_head(self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state).float()
        loss = None if labels is None else self.loss_of(logits[:, :-1], labels[:, 1:])
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class CountsRows(ShiftsInside):
    """Each sequence counts the same, whatever the number of its labels."""

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        each = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return (each.sum(1) / (labels != IGNORED).sum(1).clamp_min(1)).mean()


@pytest.mark.parametrize("kind", [ShiftsInside, CountsRows])
@pytest.mark.parametrize("scale", [0.02, 0.3])
def test_other_losses_are_noticed_in_low_precision(kind: type[transformers.LlamaForCausalLM], scale: float) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(**{**_LLAMA, "hidden_size": 32, "initializer_range": scale})
        with pytest.raises(UnsupportedModuleError, match="do not reproduce its loss"):
            patch_head(kind(config).to(torch.bfloat16).train())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [*CHUNKED, *CHANGED_LOGITS, *INLINE])
def test_right_losses_are_recognised_in_low_precision(family: str, dtype: torch.dtype) -> None:
    assert labelled_forward(patch_head(model_of(family, dtype))) is not None


class WithTerm(transformers.LlamaForCausalLM):
    """Its loss has a term of its own in training, of the logits."""

    always = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        if self.training or self.always:
            outputs.loss = outputs.loss + 0.01 * outputs.logits.logsumexp(-1).square().mean()
        return outputs


def with_term(dtype: torch.dtype = torch.float64) -> nn.Module:
    model = model_of("llama", dtype)
    model.__class__ = WithTerm
    return model


def test_a_term_of_the_loss_in_training_ends_it(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = with_term(), labelled_batch()
    expected_loss, expected = loss_and_gradients(model, inputs)
    patch_head(model)
    logging.enable_propagation()
    for _ in range(2):
        loss, gradients = loss_and_gradients(model, inputs)
        assert torch.equal(loss, expected_loss) and distance(gradients, expected) == 0
    logging.disable_propagation()
    assert "computes on the logits beside its loss function" in caplog.text
    assert model(**inputs).logits is not None


def test_a_term_of_the_loss_is_noticed_in_low_precision() -> None:
    """Labelled rows alone give nearly the same."""
    model = with_term(torch.bfloat16)
    model.always = True
    with pytest.raises(UnsupportedModuleError, match="beside its loss function"):
        patch_head(model)


SWEPT = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}


@pytest.mark.slow
@pytest.mark.parametrize(("task", "model_type"), [(task, name) for task, names in SWEPT.items() for name in names])
def test_every_model_type_is_right_or_refused(task: str, model_type: str) -> None:
    name = SWEPT[task][model_type]
    model_class = getattr(transformers, name if isinstance(name, str) else name[0])
    try:
        config = tiny_config(model_type)
        config._experts_implementation = "eager"  # the grouped one has no float64
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(config).parameters())
        if size > LARGEST:
            pytest.skip(f"{size} parameters")
        torch.manual_seed(0)
        model = _filled(model_class(config).double()).train()
        inputs = labelled_batch()
        inputs = {name: inputs[name] + (10 if name == "input_ids" else 0) for name in ("input_ids", "labels")}
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        torch.manual_seed(0)
        expected_loss, expected = loss_and_gradients(model, inputs)
        if not math.isfinite(largest(expected)):
            raise NotBuiltError("its gradients are not finite")
    except Exception as error:
        pytest.skip(f"no tiny model of it: {type(error).__name__}: {str(error)[:100]}")
    try:
        patch_head(model, 1)
    except UnsupportedModuleError as reason:
        assert (task, model_type) in REFUSED, str(reason)
        return
    assert (task, model_type) not in REFUSED
    torch.manual_seed(0)
    loss, gradients = loss_and_gradients(model, inputs)
    assert labelled_forward(model).method is not None
    assert (loss - expected_loss).abs() <= 16 * EPS * expected_loss
    # Logits' gradients are rounded to float32 on both sides; deep recurrent bodies sum many of them.
    assert distance(gradients, expected) <= 256 * EPS * largest(expected)


# Losses over shifted n-grams, merged sequences of a sound tower, heads that are no linear layer, bodies in two parts.
REFUSED = {
    ("causal", "prophetnet"), ("seq2seq", "prophetnet"), ("masked", "mobilebert"), ("seq2seq", "encoder-decoder"),
    ("seq2seq", "granite_speech"), ("seq2seq", "granite_speech_plus"), ("seq2seq", "qwen2_audio"),
}  # fmt: skip
