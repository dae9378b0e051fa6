"""Does the head on labelled positions give the whole one's loss and gradients, and is it gone without a trace?"""

import copy
import inspect
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.models import _LLAMA, VOCABULARY, assert_same, build, checkpoint_activations, snapshot, tokens
from helpers.tiny_models import LARGEST, NotBuiltError, _filled, tiny_config
from helpers.training import TRAIN, Texts, arguments, losses
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from hf_subquad import (
    AlreadyPatchedError,
    ConfigError,
    NotPatchedError,
    SubquadCallback,
    SubquadConfig,
    UnsupportedModuleError,
    calibrate,
    patch_head,
    patch_model,
    unpatch_head,
    unpatch_model,
)
from hf_subquad.head import chunked_loss, head_on_labelled_rows
from hf_subquad.head.patch_head import labelled_forward

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


@pytest.fixture
def four_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A megabyte holds four rows of logits in float32, so that there are several chunks, and a last one that is
    smaller."""
    monkeypatch.setattr(chunked_loss, "MEGABYTE", 4 * 8 * VOCABULARY)
    return iter(())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", [*CHUNKED, *CHANGED_LOGITS])
def test_loss_and_gradients_are_the_stock_ones(family: str, dtype: torch.dtype, four_rows: None) -> None:
    model = model_of(family, dtype)
    assert_as_good_as_stock(model, lambda m: patch_head(m, 1), labelled_batch())
    assert labelled_forward(model).method == ("rows" if family in CHANGED_LOGITS else "chunks")


@pytest.mark.parametrize("family", INLINE)
def test_losses_inside_the_forward_are_the_stock_ones(family: str) -> None:
    model = model_of(family)
    inputs = labelled_batch()
    if family in ("t5", "bart"):
        inputs["labels"] = inputs["labels"][:, :6].contiguous()  # targets are not as long as the source
    stock_loss, stock = loss_and_gradients(model, inputs)
    patch_head(model)
    loss, gradients = loss_and_gradients(model, inputs)
    assert labelled_forward(model).method == "labels"
    eps = torch.finfo(torch.float64).eps  # sums over 61 words and up to 24 rows in another order
    assert (loss - stock_loss).abs() <= 64 * eps * stock_loss
    assert distance(gradients, stock) <= 64 * eps * largest(stock)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bf16_autocast_is_as_good_as_stock(family: str, four_rows: None) -> None:
    model, inputs = model_of(family, torch.float32), labelled_batch()

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    exact_loss, exact = exact_loss_and_gradients(model, inputs)
    stock_loss, stock = run()
    patch_head(model, 1)
    loss, gradients = run()
    eps = torch.finfo(torch.bfloat16).eps
    assert (loss - exact_loss).abs() <= 3 * (stock_loss - exact_loss).abs() + eps
    assert distance(gradients, exact) <= 3 * distance(stock, exact)


def test_float16_keeps_the_loss_scale() -> None:
    """Chunks would lose gradients below 6e-8, which the scale of the loss is there for; rows come before it."""
    model, inputs = model_of("llama", torch.float32), labelled_batch()
    scale = 2.0**16

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.float16):
            outputs = model(**inputs, num_items_in_batch=10**6)
        (outputs.loss * scale).backward()
        return {name: p.grad / scale for name, p in model.named_parameters()}

    _, exact = exact_loss_and_gradients(model, inputs)
    count = (inputs["labels"][:, 1:] != IGNORED).sum() / 10**6
    exact = {name: gradient * count for name, gradient in exact.items()}
    stock = run()
    patch_head(model)
    assert distance(run(), exact) <= 3 * distance(stock, exact)


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.0},
                                      {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
                                      {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
                                      {"target_modules": ["q_proj"]}])  # fmt: skip
@pytest.mark.parametrize("first", ["peft", "patch"])
def test_beside_peft(settings: dict[str, Any], first: str, four_rows: None) -> None:
    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **settings)).train()
        return model

    stock = adapted(model_of("llama"))
    model = adapted(patch_head(model_of("llama"), 1)) if first == "patch" else patch_head(adapted(model_of("llama")), 1)
    inputs = labelled_batch()
    expected_loss, expected = loss_and_gradients(stock, inputs)
    loss, gradients = loss_and_gradients(model, inputs)
    assert model(**inputs).logits is None
    assert (loss - expected_loss).abs() <= 4 * EPS * expected_loss
    assert distance(gradients, expected) <= 16 * EPS * largest(expected)  # both round logits' gradients to float32


def test_a_head_that_reads_parameters_of_others_is_not_run_in_chunks() -> None:
    """Which would have no gradients for them."""
    model, inputs = model_of("llama"), labelled_batch()
    gain, head = model.model.norm.weight, model.lm_head
    head.forward = lambda hidden: nn.functional.linear(hidden * gain, head.weight)
    _, expected = loss_and_gradients(model, inputs)
    _, gradients = loss_and_gradients(patch_head(model), inputs)
    assert labelled_forward(model).method == "rows"
    assert distance(gradients, expected) <= 16 * EPS * largest(expected)


def test_head_trained_beside_frozen_body(four_rows: None) -> None:
    model = model_of("llama")
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    _, expected = loss_and_gradients(model, labelled_batch())
    _, gradients = loss_and_gradients(patch_head(model, 1), labelled_batch())
    assert distance(gradients, expected) <= 16 * EPS * largest(expected)


def test_items_of_the_whole_step_normalise(four_rows: None) -> None:
    for items in (37, torch.tensor(37)):
        for family in ("llama", "gemma2"):
            model, inputs = model_of(family), {**labelled_batch(), "num_items_in_batch": items}
            expected_loss, expected = loss_and_gradients(model, inputs)
            loss, gradients = loss_and_gradients(patch_head(model, 1), inputs)
            assert (loss - expected_loss).abs() <= 4 * EPS * expected_loss
            assert distance(gradients, expected) <= 16 * EPS * largest(expected)


def test_chunks_are_as_large_as_the_bound_allows() -> None:
    head, hidden = nn.Linear(8, 1000), torch.randn(700, 8, requires_grad=True)
    seen: list[int] = []

    def spy(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return head(rows)

    labels = torch.arange(700)
    loss = chunked_loss.chunked_cross_entropy(spy, list(head.parameters()), hidden, labels, 700, 1000, 2)
    assert seen == [262, 262, 176]  # 2 MB / (1000 words * 8 bytes)
    expected = nn.functional.cross_entropy(head(hidden), labels)
    assert (loss - expected).abs() <= 16 * EPS * expected
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="unpatch_head"):
        loss.backward()


def test_logits_are_hidden_in_training_only() -> None:
    model, inputs = model_of("llama"), labelled_batch()
    whole = model(**inputs).logits
    expected = model.eval().generate(inputs["input_ids"], max_new_tokens=3, do_sample=False)
    patch_head(model)
    assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False), expected)
    assert torch.equal(model(**inputs).logits, whole)
    model.train()
    assert model(**inputs).logits is None
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, whole)
    assert torch.equal(model(inputs["input_ids"]).logits, whole)
    assert model(**inputs, return_dict=False)[1].shape == whole.shape
    assert model(**inputs, logits_to_keep=9).logits.shape == whole.shape
    assert model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"]).logits is None


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_no_labels_give_what_stock_gives(family: str) -> None:
    model, inputs = model_of(family), labelled_batch()
    inputs["labels"] = torch.full_like(inputs["labels"], IGNORED)
    kinds: list[dict[str, Any]] = [{}] if family == "bert" else [{}, {"num_items_in_batch": 5}]
    for more in kinds:
        expected_loss, expected = loss_and_gradients(model, {**inputs, **more})
        loss, gradients = loss_and_gradients(patch_head(model), {**inputs, **more})
        assert torch.equal(loss, expected_loss) or (loss.isnan() and expected_loss.isnan())
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert torch.equal(gradient.nan_to_num(), expected[name].nan_to_num())
        unpatch_head(model)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
@pytest.mark.parametrize("label", [VOCABULARY, -1])
def test_labels_outside_the_vocabulary_raise_the_stock_error(family: str, label: int) -> None:
    model, inputs = model_of(family), labelled_batch()
    inputs["labels"][2, 4] = label
    with pytest.raises(IndexError) as stock:
        model(**inputs)
    with pytest.raises(IndexError) as ours:
        patch_head(model)(**inputs)
    assert str(ours.value) == str(stock.value)
    unpatch_head(model)
    assert "_loss_function" not in vars(model)
    assert "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5", "bert"])
def test_undo_leaves_no_trace(family: str) -> None:
    model = model_of(family)
    before, attributes = snapshot(model), set(vars(model))
    loss_and_gradients(patch_head(model), labelled_batch())
    model.zero_grad()
    unpatch_head(model)
    assert_same(before, snapshot(model))
    assert set(vars(model)) == attributes
    with pytest.raises(NotPatchedError, match="patch_head"):
        unpatch_head(model)


def test_undo_gives_an_attribute_back_that_was_there() -> None:
    model = model_of("llama")
    own = model.forward = model.forward
    patch_head(model)
    assert model.forward is not own
    unpatch_head(model)
    assert vars(model)["forward"] is own


def test_copies_are_patched_by_themselves() -> None:
    model, inputs = patch_head(model_of("llama"), 3), labelled_batch()
    model(**inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        forward = labelled_forward(twin)
        assert forward.model is twin
        assert forward.megabytes == 3
        with torch.no_grad():
            twin.lm_head.weight.mul_(2)
        assert twin(**inputs).logits is None
        assert not torch.equal(twin(**inputs).loss, model(**inputs).loss)
        unpatch_head(twin)
        assert "forward" not in vars(twin)
    assert labelled_forward(model).model is model


def test_signature_is_the_models() -> None:
    model = model_of("llama")
    before = inspect.signature(model.forward)
    assert inspect.signature(patch_head(model).forward) == before


def test_patched_once() -> None:
    with pytest.raises(AlreadyPatchedError, match="unpatch_head"):
        patch_head(patch_head(model_of("llama")))


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "64", None])
def test_megabytes_out_of_range(value: Any) -> None:
    model = model_of("llama")
    with pytest.raises(ConfigError, match="megabytes"):
        patch_head(model, value)
    assert "forward" not in vars(model)


def _focal(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    shifted = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    each = nn.functional.cross_entropy(logits.transpose(1, 2), shifted, reduction="none")
    return (each * torch.arange(logits.shape[1])).mean()


def _other_loss() -> nn.Module:
    model = model_of("llama")
    model.loss_function = _focal
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


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_caches_are_filled_once(family: str) -> None:
    model, inputs = patch_head(model_of(family)), labelled_batch()
    outputs = model(**inputs, use_cache=True)
    assert outputs.logits is not None and outputs.past_key_values.get_seq_length() == inputs["labels"].shape[1]
    cache = transformers.DynamicCache(config=model.config)
    assert model(**inputs, past_key_values=cache).logits is not None
    assert cache.get_seq_length() == inputs["labels"].shape[1]


def test_loss_function_of_the_users_own_ends_it() -> None:
    model, inputs = patch_head(model_of("llama")), labelled_batch()
    model.loss_function = _focal
    assert model(**inputs).logits is not None
    del model._loss_function
    assert model(**inputs).logits is None


def test_resized_head_is_found(four_rows: None) -> None:
    model, inputs = patch_head(model_of("llama"), 1), labelled_batch()
    model.resize_token_embeddings(VOCABULARY + 6, mean_resizing=False)
    loss, gradients = loss_and_gradients(model, inputs)
    assert gradients["lm_head.weight"].shape[0] == VOCABULARY + 6
    assert model(**inputs).logits is None
    expected_loss, _ = loss_and_gradients(unpatch_head(model), inputs)
    assert (loss - expected_loss).abs() <= 4 * EPS * expected_loss


def test_compiled_model_is_left_whole() -> None:
    model, inputs = patch_head(build("llama", num_hidden_layers=1)), labelled_batch()
    compiled = torch.compile(model, backend="eager")
    assert compiled(**inputs).logits is not None
    assert model(**inputs).logits is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, four_rows: None) -> None:
    model, inputs = model_of("llama"), labelled_batch()
    _, expected = loss_and_gradients(model, inputs)
    checkpoint_activations(model, reentrant)
    model.enable_input_require_grads()
    _, gradients = loss_and_gradients(patch_head(model, 1), inputs)
    assert distance(gradients, expected) <= 16 * EPS * largest(expected)


def test_a_checkpoint_around_the_model_and_its_loss(four_rows: None) -> None:
    model, inputs = model_of("llama"), labelled_batch()
    _, expected = loss_and_gradients(model, inputs)
    patch_head(model, 1)
    loss = checkpoint(lambda: model(**inputs).loss, use_reentrant=False)
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert distance(gradients, expected) <= 16 * EPS * largest(expected)


class Answers(Texts):
    """Texts with a prompt that has no labels, of another length in each row, and a column that no model knows."""

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids = tokens(seed=row, shape=(7,))
        labels = ids.clone()
        labels[: 1 + row % 5] = IGNORED
        return {"input_ids": ids, "labels": labels, "question": torch.tensor(row)}


class Watched(transformers.TrainerCallback):
    """Notes whether the model's forward is ours during steps, and evaluates in between."""

    def __init__(self) -> None:
        self.during: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.during.append(labelled_forward(model) is not None)


def run(model: nn.Module, folder: Path, kind: type[Trainer] = Trainer, more: Any = None, **settings: Any) -> Trainer:
    watch = Watched()
    trainer = kind(
        model=model, args=arguments(folder, **{"eval_strategy": "steps", "eval_steps": 3, **settings}),
        train_dataset=Answers(), eval_dataset=Answers(), callbacks=[SubquadCallback(), watch], **(more or {}),
    )  # fmt: skip
    trainer.train()
    trainer.watch = watch
    return trainer


def subquad(**values: Any) -> nn.Module:
    return patch_model(model_of("opt", torch.float32), SubquadConfig(**{**TRAIN.to_dict(), **values}))


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 3}, {"bf16": True}, {"max_grad_norm": 0.1}])
def test_training_is_the_same_and_on_by_default(
    settings: dict[str, Any], tmp_path: Path, four_rows: None, caplog: pytest.LogCaptureFixture
) -> None:
    logging.enable_propagation()
    off = run(subquad(head_megabytes=0), tmp_path / "off", **settings)
    assert not any(off.watch.during)
    assert "labelled positions" not in caplog.text
    on = run(subquad(head_megabytes=1), tmp_path / "on", **settings)
    logging.disable_propagation()
    assert on.watch.during == [True] * 6
    assert caplog.text.count("logits are computed at labelled positions only") == 1
    assert labelled_forward(on.model) is None
    # Six steps of AdamW with 0.01 carry roundings of gradients into weights; bf16 rounds to 2^-8.
    tolerance = 0.02 if settings.get("bf16") else 1e-4
    assert losses(on) == pytest.approx(losses(off), rel=tolerance)
    evaluated = [[entry["eval_loss"] for entry in r.state.log_history if "eval_loss" in entry] for r in (on, off)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=tolerance)


class OwnLoss(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        assert outputs.logits.shape[:2] == inputs["input_ids"].shape
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def _by_logits(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize(
    ("kind", "more", "settings", "reason"),
    [
        (OwnLoss, {}, {}, "OwnLoss has a compute_loss of its own"),
        (Trainer, {"compute_loss_func": _by_logits}, {}, "compute_loss_func"),
        (Trainer, {}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_readers_of_logits_get_them(
    kind: type[Trainer], more: dict[str, Any], settings: dict[str, Any], reason: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    logging.enable_propagation()
    done = run(subquad(), tmp_path, kind, more, **settings)
    logging.disable_propagation()
    assert not any(done.watch.during)
    assert reason in caplog.text


def test_a_method_replaced_in_the_trainer_itself_gets_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Trainer, "compute_loss", OwnLoss.compute_loss)
    logging.enable_propagation()
    done = run(subquad(), tmp_path, eval_strategy="no")
    logging.disable_propagation()
    assert not any(done.watch.during)
    assert "Trainer has a compute_loss of its own" in caplog.text


class Around(nn.Module):
    """A module around a language model, which may read its logits, and returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model_of("opt", torch.float32)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = self.inner(input_ids=input_ids, labels=labels)
        return {"loss": outputs.loss + 1e-4 * outputs.logits.logsumexp(-1).square().mean(), "logits": outputs.logits}


def hooked_subquad() -> nn.Module:
    model = subquad()
    model.register_forward_hook(lambda _, inputs, outputs: print(outputs.logits.sum()))
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: patch_model(Around(), TRAIN), "the language model is inside a Around, which may read logits"),
        (hooked_subquad, "a forward hook on the model sees its outputs"),
    ],
)
def test_readers_around_the_model_get_logits(
    make: Callable[[], nn.Module], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.enable_propagation()
    done = run(make(), tmp_path, eval_strategy="no")
    logging.disable_propagation()
    assert not any(done.watch.during) and all(math.isfinite(loss) for loss in losses(done))
    assert reason in caplog.text


def test_inside_of_peft_the_head_is_limited(tmp_path: Path) -> None:
    model = get_peft_model(subquad(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert all(run(model, tmp_path, eval_strategy="no").watch.during)


def test_a_plan_for_a_model_that_returns_a_dictionary() -> None:
    class OnlyLoss(Around):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            outputs = self.inner(input_ids=input_ids, labels=labels)
            return {"loss": outputs.loss}

    model = patch_head(patch_model(OnlyLoss(), SubquadConfig(**{**TRAIN.to_dict(), "active": None})))
    batch = {"input_ids": tokens(0, (4, 9)), "labels": labelled_batch()["labels"]}
    assert calibrate(model, [batch, batch]).saved_elsewhere_ms >= 0


def test_what_the_user_patched_stays(tmp_path: Path) -> None:
    model = patch_head(subquad(), 5)
    run(model, tmp_path)
    assert labelled_forward(model).megabytes == 5


class Interrupted(transformers.TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt


def test_unpatching_after_a_training_that_was_interrupted(tmp_path: Path) -> None:
    model = subquad()
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=Answers(),
                      callbacks=[SubquadCallback(), Interrupted()])  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert model.train()(**labelled_batch()).logits is None
    unpatch_model(model)
    assert model(**labelled_batch()).logits is not None and labelled_forward(model) is None


def test_trainer_without_sparse_mlps(tmp_path: Path, four_rows: None) -> None:
    def trained(model: nn.Module, folder: Path) -> Trainer:
        trainer = Trainer(model=model, args=arguments(folder), train_dataset=Answers())
        trainer.train()
        return trainer

    stock = trained(model_of("llama", torch.float32), tmp_path / "stock")
    ours = trained(patch_head(model_of("llama", torch.float32), 1), tmp_path / "ours")
    assert losses(ours) == pytest.approx(losses(stock), rel=1e-4)
    assert labelled_forward(ours.model) is not None


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


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = patch_head(model_of("llama"), 1)
    whole = labelled_batch()
    part = {name: value[2 * rank : 2 * rank + 2] for name, value in whole.items()}
    parallel = nn.parallel.DistributedDataParallel(model)
    count = (whole["labels"][:, 1:] != IGNORED).sum()
    for _ in range(2):  # the second step waits for all gradients of the first
        model.zero_grad()
        outputs = parallel(**part, num_items_in_batch=count)
        assert outputs.logits is None
        (outputs.loss * 2).backward()  # the ranks' gradients are averaged
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    _, expected = loss_and_gradients(model_of("llama"), labelled_batch())
    for rank in range(2):
        assert distance(torch.load(tmp_path / f"{rank}.pt"), expected) <= 16 * EPS * largest(expected)
