"""Is skipping what does not count exact, in every kind of model and of call?"""

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from helpers.models import CONFIG, WIDTH, build, checkpoint_activations, fill_updates, tokens
from torch import Tensor, nn

from hf_subquad import SubquadConfig, dense_forward, patch_model, sparse_mlps, sync_model, unpatch_model
from hf_subquad.layers.attention_patch import stock_attention
from hf_subquad.layers.batch_hook import unwatch_batches, watch_batches
from hf_subquad.layers.budget import Budget
from hf_subquad.layers.forward_passes import Passes
from hf_subquad.layers.patched_mlps import runtime_of

PAD, BOS, IGNORED = 2, 1, -100
Batch = dict[str, Tensor]


def padded(side: str, rows: int = 3, length: int = 9, seed: int = 0, bos: bool = False) -> Batch:
    """Rows of several lengths; two prompt tokens each, and behind the last label of every other row two more tokens."""
    ids, labels = tokens(seed, (rows, length)), torch.full((rows, length), IGNORED)
    mask = torch.zeros(rows, length, dtype=torch.long)
    for row in range(rows):
        size = length - (3 * row + seed) % (length - 4)
        real = slice(0, size) if side == "right" else slice(length - size, length)
        mask[row, real] = 1
        if bos:
            ids[row, real.start] = BOS
        labels[row, real.start + 2 : real.stop - 2 * (row % 2)] = ids[row, real.start + 2 : real.stop - 2 * (row % 2)]
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask, "labels": labels}


def by_token(side: str, **how: Any) -> Batch:
    batch = padded(side, **how)
    return {**batch, "labels": batch["labels"].where(batch["labels"] == IGNORED, batch["labels"] % 2)}


def by_row(side: str, **how: Any) -> Batch:
    batch = padded(side, **how)
    return {**batch, "labels": torch.arange(len(batch["labels"])) % 2}


def to_text(side: str, **how: Any) -> Batch:
    batch, targets = padded(side, **how), tokens(9, (how.get("rows", 3), 7))
    for row in range(len(targets)):
        targets[row, 5 - row % 4 :] = IGNORED
    return {**batch, "labels": targets}


Inputs = Callable[..., Batch]
MODELS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "llama": (lambda: build("llama", torch.float64), padded),
    "gpt2": (lambda: build("gpt2", torch.float64), padded),
    "opt": (lambda: build("opt", torch.float64), padded),
    "phi3": (lambda: build("phi3", torch.float64), padded),
    "t5": (lambda: build("t5", torch.float64), to_text),
    "bart": (lambda: build("bart", torch.float64), to_text),
    "bert": (lambda: build("bert", torch.float64), padded),
    "bert, tokens": (lambda: transformers.BertForTokenClassification(build("bert").config).double(), by_token),
    "bert, rows": (lambda: transformers.BertForSequenceClassification(build("bert").config).double(), by_row),
    "llama, rows": (lambda: transformers.LlamaForSequenceClassification(build("llama").config).double(), by_row),
}


def real_tokens(name: str, batch: Batch) -> dict[bool, int]:
    """How many are not padding, for MLPs of decoders (True) and of others."""
    labels = batch["labels"]
    if name in ("t5", "bart"):
        return {True: int((labels != IGNORED).sum()), False: int(batch["attention_mask"].sum())}
    counted = 0
    for row in range(len(labels)):
        real = batch["attention_mask"][row].bool().tolist()
        if name in ("llama", "gpt2", "opt", "phi3"):
            last = max(place for place, label in enumerate(labels[row].tolist()) if label != IGNORED)
            real = real[:last]  # the label in place t is predicted in place t - 1
        counted += sum(real)
    return {True: counted, False: counted}


def made(name: str, **settings: Any) -> nn.Module:
    """Patched, with all neurons for every token unless told otherwise."""
    make, _ = MODELS[name]
    torch.manual_seed(0)
    model = patch_model(make(), SubquadConfig(**{**CONFIG.to_dict(), "active": 1.0, **settings})).train()
    fill_updates(model)
    return model


def gradients(model: nn.Module, *batches: Batch) -> dict[str, Tensor]:
    """The loss of some batches, weighted, and its gradients, after all forwards came before the one backward."""
    model.zero_grad()
    loss = sum((1 + number) * model(**batch).loss for number, batch in enumerate(batches))
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def dense_gradients(model: nn.Module, *batches: Batch) -> dict[str, Tensor]:
    with dense_forward(model):
        return gradients(model, *batches)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To rounding in float64, through a few layers; gradients of the biases of keys are nothing else."""
    assert found.keys() == expected.keys() and sum(".update." in name for name in found) >= 4
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 1e-4)
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-11 * scale, msg=lambda m, n=name: f"{n}: {m}")


def differ(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return max((found[name] - value).abs().max().item() for name, value in expected.items()) > 1e-3


@contextmanager
def computed_tokens(model: nn.Module) -> Iterator[dict[str, list[int]]]:
    """By MLP, tokens for which each pass computes neurons, if all of them."""
    counts: dict[str, list[int]] = {mlp.name: [] for mlp in sparse_mlps(model)}
    handles = [
        mlp.output.register_forward_pre_hook(
            lambda module, args, mlp=mlp: counts[mlp.name].append(args[0].numel() // mlp.index.neurons)
        )
        for mlp in sparse_mlps(model)
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_skipping_padding_is_exact(name: str, side: str) -> None:
    model = made(name)
    batch = MODELS[name][1](side)
    expected = dense_gradients(model, batch)
    assert_equal(gradients(model, batch), expected)
    if name == "bert, rows" and side == "left":  # BERT reads the first token, be it padding
        assert runtime_of(model).padding.may_skip is False
        return
    assert runtime_of(model).padding.may_skip
    with computed_tokens(model) as counts:
        assert_equal(gradients(model, batch), expected)
    real = real_tokens(name, batch)
    for mlp, found in counts.items():
        assert found == [real["decoder" in mlp.split(".")]]
    assert all(count < batch["input_ids"].numel() for count in real.values())
    assert all(mlp.calls == 0 for mlp in sparse_mlps(model))  # of these that skip neurons


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_context_in_the_last_layer_is_exact(name: str) -> None:
    """No prediction hangs on what its MLP adds there; in the layers before it does."""
    model, batch = made(name), padded("right")
    expected = dense_gradients(model, batch)
    sparse_mlps(model)[-1].set_budget(Budget(None, 0))
    with computed_tokens(model) as counts:
        gradients(model, batch)
        assert_equal(gradients(model, batch), expected)
    assert counts[sparse_mlps(model)[-1].name][-1] == int((batch["labels"] != IGNORED).sum())
    sparse_mlps(model)[0].set_budget(Budget(None, 0))
    assert differ(gradients(model, batch), expected)


def test_dense_steps_skip_padding_too() -> None:
    model, batch = made("llama", active=0.4, dense_share=1.0), padded("right")
    expected = dense_gradients(model, batch)
    assert differ(gradients(model, batch), expected)
    calls = [mlp.calls for mlp in sparse_mlps(model)]
    sync_model(model, 0)
    with computed_tokens(model) as counts:
        assert_equal(gradients(model, batch), expected)
    assert {tuple(found) for found in counts.values()} == {(real_tokens("llama", batch)[True],)}
    assert calls == [mlp.calls for mlp in sparse_mlps(model)] and all(calls)


def test_batches_without_padding_or_labels() -> None:
    model = made("llama")
    ids = tokens(0, (3, 9))
    batch = {"input_ids": ids, "labels": ids}
    assert_equal(gradients(model, batch), dense_gradients(model, batch))
    model.zero_grad()
    with computed_tokens(model) as counts:
        model(input_ids=ids, attention_mask=padded("right")["attention_mask"]).logits.sum().backward()
    assert {tuple(found) for found in counts.values()} == {(27,)}


def test_positional_inputs() -> None:
    model, batch = made("llama"), padded("right")
    gradients(model, batch)
    with computed_tokens(model) as counts:
        loss = model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(loss.detach(), dense_gradients(model, batch)["loss"])
    assert {tuple(found) for found in counts.values()} == {(real_tokens("llama", batch)[True],)}


def test_a_batch_whose_labels_are_all_ignored() -> None:
    model = made("bert")
    batch = padded("right")
    gradients(model, batch)
    loss = model(**{**batch, "labels": torch.full_like(batch["labels"], IGNORED)}).logits.sum()
    loss.backward()
    assert all(p.grad is not None for mlp in sparse_mlps(model) for q in mlp.projections for p in q.update.parameters())


# Models that look at padding


class MeanPooled(nn.Module):
    """A classifier that averages over all tokens, padding included."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = build("llama").model, nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.inner(input_ids, attention_mask).last_hidden_state.mean(1))
        return transformers.utils.ModelOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def test_pooling_over_padding_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = patch_model(MeanPooled().double(), SubquadConfig(**{**CONFIG.to_dict(), "active": 1.0})).train()
    fill_updates(model)
    state = torch.random.get_rng_state()
    for seed in range(3):
        batch = by_row("right", seed=seed)
        assert_equal(gradients(model, batch), dense_gradients(model, batch))
    assert runtime_of(model).padding.may_skip is False
    assert sum("MeanPooled depends on padding" in record.message for record in caplog.records) == 1
    assert torch.equal(state, torch.random.get_rng_state())
    with computed_tokens(model) as counts:
        gradients(model, batch)
    assert {tuple(found) for found in counts.values()} == {(batch["input_ids"].numel(),)}


def test_a_first_batch_without_a_label_decides_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Its loss is NaN."""
    model, batch = made("llama"), padded("right")
    assert model(**{**batch, "labels": torch.full_like(batch["labels"], IGNORED)}).loss.isnan()
    assert_equal(gradients(model, batch), dense_gradients(model, batch))
    assert runtime_of(model).padding.may_skip and "depends on padding" not in caplog.text


@pytest.mark.parametrize("takes_few", [True, False])
def test_finding_out_takes_two_rows_or_if_these_tell_nothing_all(takes_few: bool) -> None:
    model, batch, seen = made("llama"), padded("right", rows=5), []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(len(args[0]))
        if len(args[0]) < 5 and not takes_few:
            raise ValueError("I was made for batches of 5")

    model.get_input_embeddings().register_forward_pre_hook(note)
    assert_equal(gradients(model, batch), dense_gradients(model, batch))
    assert runtime_of(model).padding.may_skip
    trial, attention = ([2, 2], [2, 2]) if takes_few else ([2, 5, 5], [2])
    assert seen[: len(trial) + len(attention) + 1] == [*trial, *attention, 5]


def test_finding_out_leaves_the_model_alone() -> None:
    """Its mode, its gradients and the random numbers of its dropout."""
    model = made("opt")
    model.config.dropout = 0.5
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.5
    batch, losses = padded("right"), []
    for tried in (False, True):
        runtime_of(model).padding.may_skip = True if tried else None
        torch.manual_seed(4)
        losses.append(model(**batch).loss)
    assert torch.equal(*losses)
    assert model.training and all(p.grad is None for p in model.parameters())


# Forwards that are computed again


@pytest.mark.parametrize(
    ("name", "reentrant", "budget"),
    [
        ("llama", True, Budget()),
        ("llama", False, Budget(24, 16, 0.9)),
        ("llama", True, Budget(None, 16)),
        ("t5", False, Budget()),
        ("t5", True, Budget(24, 16, 0.9)),
        ("t5", False, Budget(None, 16)),
    ],
    ids=str,
)
def test_gradient_checkpointing_finds_each_batch_again(name: str, reentrant: bool, budget: Budget) -> None:
    """Two forwards before a backward, with rows that all begin alike, as tokenizers that add a BOS make them."""
    model, inputs = made(name), MODELS[name][1]
    for mlp in sparse_mlps(model):
        mlp.set_budget(budget)
    batches = [inputs("right", rows=8, seed=seed, bos=True) for seed in (0, 1)]
    assert len({real_tokens(name, batch)[False] for batch in batches}) == 2
    torch.manual_seed(0)  # of the rows that are sampled
    expected = gradients(model, *batches)
    checkpoint_activations(model, reentrant)
    torch.manual_seed(0)
    with computed_tokens(model) as counts:
        assert_equal(gradients(model, *batches), expected)
    assert all(len(found) == 4 for found in counts.values())
    if budget.exact:
        assert_equal(expected, dense_gradients(model, *batches))


def test_a_first_padded_batch_after_others_forgets_none() -> None:
    """It is tried then whether padding may be skipped, while a forward before it waits for its backward."""
    model = made("llama")
    for mlp in sparse_mlps(model):
        mlp.set_budget(Budget(None, 16))
    ids = tokens(3, (3, 9))
    whole = {"input_ids": ids, "labels": ids.index_fill(1, torch.arange(4), IGNORED)}
    whole["labels"][:, -1] = ids[:, -1]
    whole = {name: torch.cat([value, value[:, -1:]], 1)[:, :9].contiguous() for name, value in whole.items()}
    full = {**whole, "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    batches = [{**full, "shift_labels": full["labels"]}, padded("right")]
    checkpoint_activations(model, True)
    found = gradients(model, *batches)  # the second one is the first that is padded
    assert runtime_of(model).padding.may_skip
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    assert_equal(found, gradients(model, *batches))


def test_accumulation() -> None:
    model = made("opt")
    batches = [padded(side, seed=seed) for side, seed in itertools.product(("right", "left"), (0, 1))]
    expected = dense_gradients(model, *batches)
    model.zero_grad()
    for number, batch in enumerate(batches):
        ((1 + number) * model(**batch).loss).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-11)


# Copies, wrappers, and the way back


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_copies_watch_their_own_batches(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, batch = made("llama"), padded("right")
    expected = gradients(model, batch)
    other = copied(model)
    assert runtime_of(other) is not runtime_of(model)
    with computed_tokens(other) as counts, computed_tokens(model) as originals:
        assert_equal(gradients(other, padded("left")), dense_gradients(other, padded("left")))
        assert_equal(gradients(other, batch), expected)
    assert not any(originals.values()) and all(len(found) >= 3 for found in counts.values())
    unpatch_model(other)
    assert not other._forward_pre_hooks and len(model._forward_pre_hooks) == 1
    assert_equal(gradients(model, batch), expected)


def test_unpatching_leaves_no_hook() -> None:
    model = build("opt")
    for _ in range(2):
        patch_model(model, CONFIG)
        watch_batches(model, runtime_of(model))
        assert len(model._forward_pre_hooks) == len(model._forward_pre_hooks_with_kwargs) == 1
        unpatch_model(model)
        for module in model.modules():
            assert not module._forward_pre_hooks and not module._forward_pre_hooks_with_kwargs


def test_a_wrapper_that_passes_hooks_by() -> None:
    """PEFT's calls the `forward` of the model that was patched; `sync_model` sees that its batches are seen."""
    peft = pytest.importorskip("peft")
    model = made("llama")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for mlp in sparse_mlps(wrapped):
        for projection in mlp.projections:
            projection.update.requires_grad_(True)
    sync_model(wrapped, 0)
    sync_model(wrapped, 1)
    batch = padded("right")
    expected = dense_gradients(wrapped, batch)
    assert_equal(gradients(wrapped, batch), expected)
    with computed_tokens(wrapped) as counts:
        assert_equal(gradients(wrapped, batch), expected)
    assert {tuple(found) for found in counts.values()} == {(real_tokens("llama", batch)[True],)}
    unpatch_model(wrapped)
    assert not wrapped._forward_pre_hooks
    assert not any(module._forward_pre_hooks for module in wrapped.modules())


@pytest.mark.parametrize("peft_first", [True, False])
def test_a_wrapper_that_adds_tokens(peft_first: bool) -> None:
    """The inner model is called with them, and with labels and a mask for them."""
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    settings = SubquadConfig(**{**CONFIG.to_dict(), "active": 1.0})
    if peft_first:
        model = patch_model(peft.get_peft_model(build("llama", torch.float64), config), settings)
    else:
        model = peft.get_peft_model(patch_model(build("llama", torch.float64), settings), config)
    model.double().train()
    for mlp in sparse_mlps(model):
        for projection in mlp.projections:
            projection.update.requires_grad_(True)
    fill_updates(model)
    sync_model(model, 0)
    batch = padded("right")
    expected = dense_gradients(model, batch)
    assert_equal(gradients(model, batch), expected)
    assert runtime_of(model).padding.may_skip
    with computed_tokens(model) as counts:
        assert_equal(gradients(model, batch), expected)
    assert {tuple(found) for found in counts.values()} == {
        (real_tokens("llama", batch)[True] + 3 * len(batch["labels"]),)
    }


class ThroughAnother(nn.Module):
    """A classifier whose MLPs see other tokens than it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("llama", torch.float64)
        self.forwards = 0

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
        self.forwards += 1
        logits = self.inner(input_ids[:, 1:]).logits[:, -1, :2]
        return transformers.utils.ModelOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def test_padding_that_no_mlp_sees_is_not_tried_for_ever() -> None:
    model = patch_model(ThroughAnother(), SubquadConfig(**{**CONFIG.to_dict(), "active": 1.0})).train()
    counts = []
    for _ in range(8):
        gradients(model, by_row("right"))
        counts.append(model.forwards)
    assert counts[-1] - counts[-2] == 1 and runtime_of(model).padding.may_skip is False
    assert_equal(gradients(model, by_row("right")), dense_gradients(model, by_row("right")))


@pytest.mark.slow
def test_compiled_models_know_classes() -> None:
    torch._dynamo.reset()
    model, batch = made("llama", active=16), padded("right")
    compiled = torch.compile(model, backend="aot_eager")
    found = gradients(compiled, batch)
    sync_model(compiled, 0)
    assert not compiled._forward_pre_hooks  # it calls the model's own
    found = {name.replace("_orig_mod.", ""): value for name, value in found.items()}
    assert_equal(gradients(model, batch), found)
    unwatch_batches(model)
    runtime_of(model).passes = Passes()
    assert differ(gradients(model, batch), found)  # tiles of padding, too, are others


# What skipping could get wrong


def test_an_inner_model_that_is_called_by_itself_skips_nothing() -> None:
    """The batch of the last whole forward had the same shape, and other padding."""
    model, other = made("llama"), padded("right", seed=1)
    gradients(model, padded("right"))
    assert runtime_of(model).padding.may_skip

    def own_loss() -> Tensor:
        hidden = model.model(input_ids=other["input_ids"], attention_mask=other["attention_mask"]).last_hidden_state
        return hidden.square().mean()

    loss = own_loss()
    with dense_forward(model):
        assert torch.equal(loss, own_loss())


def test_labels_at_padding_count() -> None:
    """The first padded batch decided that padding may be skipped; in this one it counts."""
    model, batch = made("llama"), padded("right")
    gradients(model, batch)
    assert runtime_of(model).padding.may_skip and model.config._attn_implementation == "subquad_sdpa"
    for side in ("left", "right"):
        other = padded(side, seed=1)
        other["labels"] = other["input_ids"].where(other["attention_mask"] == (side == "left"), other["labels"])
        assert_equal(gradients(model, other), dense_gradients(model, other))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("read", ["after the last label", "at padding"])
def test_another_loss_that_reads_what_is_skipped_is_noticed(read: str, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = made("llama"), padded("right")
    place = {"after the last label": (1, int(batch["attention_mask"][1].sum()) - 1), "at padding": (1, -1)}[read]
    sync_model(model, 0)

    def step() -> dict[str, Tensor]:
        model.zero_grad()
        outputs = model(**batch)
        loss = outputs.loss + outputs.logits[place].logsumexp(-1)
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    step()  # in which it finds out what it may skip
    with dense_forward(model), stock_attention(model):
        expected = step()
    assert differ(step(), expected) and runtime_of(model).padding.may_skip
    sync_model(model, 1)
    assert "depends on tokens that were skipped as padding" in caplog.text and not runtime_of(model).padding.may_skip
    assert_equal(step(), expected)


def test_a_cache_in_training_is_filled_once() -> None:
    """Segments of a text, each of which sees those before it."""
    model, ids = made("llama"), tokens(3, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)

    def losses() -> list[float]:
        cache, found = transformers.DynamicCache(), []
        for start in range(0, 12, 4):
            part = slice(start, start + 4)
            outputs = model(
                input_ids=ids[:, part], attention_mask=mask[:, : start + 4], labels=labels[:, part],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            found.append(outputs.loss.item())
        assert cache.get_seq_length() == 12
        return found

    with dense_forward(model):
        expected = losses()
    assert losses() == pytest.approx(expected, rel=1e-12)
    gradients(model, padded("right"))
    assert runtime_of(model).padding.may_skip and losses() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_any_of_many_forwards(reentrant: bool) -> None:
    model = made("llama", active=16)
    batches = [padded("right", seed=seed) for seed in range(10)]
    expected = gradients(model, *batches)
    checkpoint_activations(model, reentrant)
    assert_equal(gradients(model, *batches), expected)
    model.zero_grad()
    loss = model(**batches[0]).loss
    model.eval()
    model.generate(batches[1]["input_ids"][:, :3], attention_mask=torch.ones(3, 3), max_new_tokens=10)
    with torch.no_grad():
        for _ in range(100):
            model(**batches[1])
    model.train()
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_equal({"loss": loss.detach()} | found, gradients(model, batches[0]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_the_mode_of_a_forward(reentrant: bool) -> None:
    model, batch = made("llama", active=16), padded("right")
    expected = dense_gradients(model, batch)
    checkpoint_activations(model, reentrant)
    model.zero_grad()
    with dense_forward(model):
        loss = model(**batch).loss
    loss.backward()  # outside of it
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_equal({"loss": loss.detach()} | found, expected)


@pytest.mark.parametrize("budget", [Budget(), Budget(26, 26)], ids=str)
def test_a_batch_without_any_label(budget: Budget) -> None:
    model, inputs = made("llama"), MODELS["llama"][1]
    for mlp in sparse_mlps(model):
        mlp.set_budget(budget)
    batch = inputs("right", rows=8)
    model(**batch)  # in which it finds out what it can skip
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    model(**batch).logits.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_the_same_tokens_with_other_labels(reentrant: bool) -> None:
    """A backward pass comes to the later of two forwards first."""
    model, inputs = made("llama"), MODELS["llama"][1]
    first = inputs("right", rows=8)
    second = {**first, "labels": first["labels"].clone()}
    second["labels"][:, 5:] = IGNORED
    model(**first)
    expected = gradients(model, first, second)
    checkpoint_activations(model, reentrant)
    assert_equal(gradients(model, first, second), expected)


def test_passes_without_gradients_are_dense_under_reentrant_checkpointing() -> None:
    model, inputs = made("llama"), MODELS["llama"][1]
    for mlp in sparse_mlps(model):
        mlp.set_budget(Budget(16, 0))
    checkpoint_activations(model, True)
    batch = inputs("right", rows=8)
    model.train()
    with torch.no_grad():
        found = model(**batch).logits
        with dense_forward(model):
            assert torch.equal(found, model(**batch).logits)


def test_sparse_evaluation_gives_logits_after_the_last_label() -> None:
    model = build("llama", torch.float64)
    expected = copy.deepcopy(model).eval()
    patch_model(model, SubquadConfig(**{**CONFIG.to_dict(), "active": 1.0, "sparse_eval": True}))
    batch = {"input_ids": tokens(0, (3, 9)), "labels": tokens(0, (3, 9))}
    batch["labels"][:, 4:] = -100
    model.train()
    model(**batch).loss.backward()  # it finds out that the rest may be skipped in training
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, rtol=1e-10, atol=1e-10)
