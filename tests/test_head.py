"""Does the head on labelled positions give the whole one's loss and gradients, and is it gone without a trace?"""

import copy
import inspect
import pickle
from pathlib import Path
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
    assert_as_good_as_stock,
    distance,
    exact_loss_and_gradients,
    focal,
    four_rows_a_chunk,
    labelled_batch,
    largest,
    loss_and_gradients,
    model_of,
)
from helpers.models import VOCABULARY, assert_same, build, checkpoint_activations, snapshot
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hf_subquad import AlreadyPatchedError, ConfigError, NotPatchedError, patch_head, unpatch_head
from hf_subquad.head import chunked_loss
from hf_subquad.head.head_on_labelled_rows import labelled_positions
from hf_subquad.head.patch_head import labelled_forward


@pytest.fixture
def four_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    four_rows_a_chunk(monkeypatch)


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


@pytest.mark.parametrize("family", ["llama", "gemma2", "t5"])  # in chunks, of all labelled rows, inside the forward
def test_logits_can_be_kept_without_a_change_of_method(family: str, four_rows: None) -> None:
    model, inputs = model_of(family), labelled_batch()
    stock = model(**inputs)
    expected, _ = loss_and_gradients(patch_head(model), inputs)
    forward = labelled_forward(model)
    assert forward is not None
    with forward.as_in_training(keep_logits=True):
        outputs = model.eval()(**inputs)
    shifted = family != "t5"
    positions, _ = labelled_positions(inputs["labels"], shifted)
    torch.testing.assert_close(outputs.logits, stock.logits.flatten(0, 1)[positions].unsqueeze(0))
    assert torch.equal(outputs.loss, expected)


def test_what_is_not_trained_gets_no_gradients(four_rows: None) -> None:
    """Passes without gradients, as in planning, cost the same whether the head is trained or not."""
    model, inputs = patch_head(model_of("llama"), 1), labelled_batch()
    forward = labelled_forward(model)
    assert forward is not None
    counts = []
    for trained in (True, False):
        model.lm_head.requires_grad_(trained)
        with forward.as_in_training(), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**inputs)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


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
    model.loss_function = focal
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
