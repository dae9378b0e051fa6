"""Is a padded batch as one row the same training step, and is a batch or a model left alone where it would not be?"""

import itertools
import math
from typing import Any

import pytest
import torch
from comparison.mlp_time import MlpTimer
from helpers.models import _LLAMA, CONFIG, VOCABULARY, build, checkpoint_activations, tokens
from helpers.training import listening
from torch import Tensor, nn
from transformers import Lfm2Config, Lfm2ForCausalLM
from transformers.integrations.neftune import neftune_post_forward_hook

from hf_subquad import SubquadConfig, patch_head, patch_model, sparse_mlps
from hf_subquad.head.patch_head import labelled_forward
from hf_subquad.head.remove_padding import as_one_row, longest_row
from hf_subquad.layers.attention_patch import stock_attention
from hf_subquad.layers.budget import Budget
from hf_subquad.layers.forward_passes import _REMEMBERED
from hf_subquad.layers.sparse_mlp import SparseMLP

LENGTHS = (4, 11, 7)


def padded(side: str = "right") -> dict[str, Tensor]:
    """Rows of prompts and answers; positions after an answer are padding."""
    ids, size = tokens(0, (len(LENGTHS), max(LENGTHS))), max(LENGTHS)
    mask = (torch.arange(size) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return inputs if side == "right" else {name: values.flip(1) for name, values in inputs.items()}


def test_by_hand() -> None:
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]),
        "labels": torch.tensor([[5, -100, 7, -100], [8, 9, -100, -100]]),
    }
    row = as_one_row({**inputs, "num_items_in_batch": 3})
    assert row is not None
    assert row["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert row["labels"].tolist() == [[-100, -100, 7, -100, 9]]  # the 7 does not predict the 8
    assert row["num_items_in_batch"] == 3 and row["use_cache"] is False and "attention_mask" not in row
    assert as_one_row(inputs, longest=4) is None


def with_labelled_padding(inputs: dict[str, Tensor]) -> dict[str, Any]:
    labels = inputs["labels"].clone()
    labels[0, -1] = 5
    return {**inputs, "labels": labels}


def with_hole(inputs: dict[str, Tensor]) -> dict[str, Any]:
    mask = inputs["attention_mask"].clone()
    mask[1, 5] = 0
    return {**inputs, "attention_mask": mask, "labels": inputs["labels"].masked_fill(mask == 0, -100)}


OTHERS = {
    "left": lambda: padded("left"),
    "labelled_padding": lambda: with_labelled_padding(padded()),
    "hole": lambda: with_hole(padded()),
    "no_mask": lambda: {**padded(), "attention_mask": None},
    "4d_mask": lambda: {**padded(), "attention_mask": torch.ones(3, 1, 11, 11)},
    "positions": lambda: {**padded(), "position_ids": torch.arange(11).expand(3, -1)},
    "cache": lambda: {**padded(), "use_cache": True},
    "attentions": lambda: {**padded(), "output_attentions": True},
    "embeddings": lambda: {**padded(), "input_ids": None, "inputs_embeds": torch.zeros(3, 11, 4)},
    "hardly_any": lambda: {**padded(), "attention_mask": torch.ones(3, 11, dtype=torch.long)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_batches_stay_as_they_are(name: str) -> None:
    assert as_one_row(OTHERS[name]()) is None


def patched(family: str, budget: Budget, **settings: Any) -> nn.Module:
    config = SubquadConfig(**{**CONFIG.to_dict(), "active": 1.0, "layers_to_transform": "all"})
    model = patch_head(patch_model(build(family, torch.float64, **settings), config))
    for mlp in sparse_mlps(model):
        mlp.set_budget(budget)
        for projection in mlp.projections:
            torch.nn.init.normal_(projection.update.U, std=0.3, generator=torch.Generator().manual_seed(1))
            torch.nn.init.normal_(projection.update.V, std=0.3, generator=torch.Generator().manual_seed(2))
    model(**padded())  # in which it finds out what it can skip
    return model


def step(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    loss = model(**inputs).loss
    torch.manual_seed(0)  # which rows are sampled
    loss.backward()
    grads = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return loss.detach(), torch.cat(grads)


def shapes_seen(model: nn.Module) -> list[tuple[int, ...]]:
    """The list of shapes that an MLP will see; without a hook, which would keep the padding."""
    seen: list[tuple[int, ...]] = []
    opens = sparse_mlps(model)[1].opens
    forward = opens.forward
    opens.forward = lambda hidden: seen.append(tuple(hidden.shape[:-1])) or forward(hidden)
    return seen


def assert_equal_steps(model: nn.Module, inputs: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """As one row, and padded. Returns the shapes of the batches that an MLP saw, in this order."""
    seen = shapes_seen(model)
    loss, gradient = step(model, inputs)
    with stock_attention(model):  # which rows need
        wanted, wanted_gradient = step(model, inputs)
    eps = 64 * torch.finfo(torch.float32).eps  # the head's loss is float32
    torch.testing.assert_close(loss, wanted, rtol=eps, atol=eps)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=eps, atol=eps * wanted_gradient.abs().amax().item())
    return seen


@pytest.mark.parametrize("budget", [Budget(), Budget(context=0), Budget(gradient=0.9)], ids=["all", "none", "rows"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
def test_a_row_is_the_same_step(family: str, budget: Budget) -> None:
    """The same tokens are context, and the same rows pass gradients."""
    seen = assert_equal_steps(patched(family, budget), padded())
    assert [math.prod(shape) for shape in seen] == [sum(LENGTHS), len(LENGTHS) * max(LENGTHS)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_gradient_checkpointing(reentrant: bool) -> None:
    model = patched("llama", Budget(context=0))
    checkpoint_activations(model, reentrant)
    model.enable_input_require_grads()  # a hook of transformers', with which rows are the same
    seen = assert_equal_steps(model, padded())
    assert seen[0] == (1, sum(LENGTHS))


def test_as_many_passes_before_a_backward_as_are_remembered() -> None:
    """A row and the batch that it is made of are one pass."""
    model = patched("llama", Budget(context=0))
    checkpoint_activations(model, False)
    model.enable_input_require_grads()
    batches = []
    for seed in range(_REMEMBERED):
        batch = padded()
        batch["input_ids"] = tokens(seed, batch["input_ids"].shape)
        batch["labels"][0, seed % 2 + 2] = -100  # another number of predicted tokens
        batches.append(batch)
    model.zero_grad()
    sum(model(**batch).loss for batch in batches).backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    for batch in batches:
        model(**batch).loss.backward()
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().amax().item())


def test_a_model_that_mixes_the_sequences_of_a_row_gets_padding() -> None:
    """OPT's mask does not look at positions."""
    model = patched("opt", Budget())
    seen = assert_equal_steps(model, padded())
    forward = labelled_forward(model)
    assert math.prod(seen[0]) == len(LENGTHS) * max(LENGTHS) and forward is not None and forward.takes_rows is False


def shape_in_a_step(model: nn.Module) -> tuple[int, ...]:
    seen = shapes_seen(model)
    model(**padded())
    return seen[0]


@pytest.mark.parametrize("hook", ["forward", "pre"])
def test_hooks_see_the_batch_as_it_is(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings = listening(monkeypatch, "head.labelled_forward")
    model, shapes = patched("llama", Budget()), []
    look = lambda _, inputs, *outputs: shapes.append(inputs[0].shape[:2])  # noqa: E731
    embeddings = model.get_input_embeddings()
    handle = (embeddings.register_forward_hook if hook == "forward" else embeddings.register_forward_pre_hook)(look)
    assert shape_in_a_step(model) == (len(LENGTHS), max(LENGTHS))
    assert shapes == [(len(LENGTHS), max(LENGTHS))]
    (warning,) = warnings
    assert "test_hooks_see_the_batch_as_it_is" in warning and "on model.embed_tokens" in warning
    handle.remove()
    assert shape_in_a_step(model) == (1, sum(LENGTHS)) and len(warnings) == 1


def test_a_step_whose_mlps_are_timed_is_like_others() -> None:
    model = patched("llama", Budget())
    projections = {mlp.name: [f"{mlp.name}.{path}" for path in mlp.sources] for mlp in sparse_mlps(model)}
    timer, seen = MlpTimer(model, projections, itertools.count().__next__), shapes_seen(model)
    for _ in range(2):
        timer.restart()
        step(model, padded())
        assert timer.seconds == 2 * len(projections)  # spans of one tick each, forward and backward
    assert seen == [(1, sum(LENGTHS))] * 2


def test_noise_on_embeddings_is_that_of_the_padded_batch() -> None:
    """NEFTune's is divided by the root of the length."""
    model = patched("llama", Budget())
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    embeddings.register_forward_hook(neftune_post_forward_hook)
    assert shape_in_a_step(model) == (len(LENGTHS), max(LENGTHS))


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_outputs_by_token_have_the_shape_of_the_batch(name: str) -> None:
    model = patched("llama", Budget())
    if name == "output_attentions":
        model.set_attn_implementation("eager")
    setattr(model.config, name, True)
    values = getattr(model(**padded()), name.removeprefix("output_"))
    assert len(values[-1]) == len(LENGTHS)
    setattr(model.config, name, False)
    if name == "output_hidden_states":  # the hooks that collected them stay, and do nothing
        assert shape_in_a_step(model) == (1, sum(LENGTHS))


def mixing(family: str, dtype: torch.dtype, scale: float) -> nn.Module:
    if family == "opt":
        model = build("opt", dtype)
    else:
        config = Lfm2Config(
            **{**_LLAMA, "num_hidden_layers": 4}, layer_types=["conv", "full_attention"] * 2,
            block_auto_adjust_ff_dim=False,
        )  # fmt: skip
        torch.manual_seed(0)
        model = Lfm2ForCausalLM(config).to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=scale)
    return model


@pytest.mark.parametrize("scale", [0.02, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["opt", "lfm2", "llama"])
def test_only_models_that_keep_sequences_apart_take_rows(family: str, dtype: torch.dtype, scale: float) -> None:
    """OPT's mask does not look at positions, and LFM2's convolutions go on from one sequence to the next."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = build("llama", dtype) if family == "llama" else mixing(family, dtype, scale)
        patch_head(patch_model(model, SubquadConfig(**{**CONFIG.to_dict(), "active": 1.0})))
        model(**padded())
        model(**padded())
        assert labelled_forward(model).takes_rows is (family == "llama")


def test_windows_limit_the_row() -> None:
    for window, shape in ((sum(LENGTHS) - 1, (3, 11)), (sum(LENGTHS), (1, sum(LENGTHS)))):
        seen = assert_equal_steps(patched("mistral", Budget(), sliding_window=window), padded())
        assert seen[0] == shape


def test_attention_dropout_leaves_the_batch_padded() -> None:
    model = build("llama", attention_dropout=0.1)
    assert longest_row(model) == 0 and longest_row(build("llama")) > 1000


def test_a_call_that_runs_padded_after_all_skips_padding_in_mlps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tuple of outputs needs the stock forward, which is found out after the row was made."""
    model = patched("llama", Budget())
    open_call, tokens_of = SparseMLP._open, []

    def noted(self: SparseMLP, x: Tensor, training: bool) -> Any:
        call = open_call(self, x, training)
        tokens_of.append((tuple(x.shape[:-1]), sum(part.tokens for part in call.parts)))
        return call

    monkeypatch.setattr(SparseMLP, "_open", noted)
    loss, logits, *_ = model(**padded(), return_dict=False)
    assert logits.shape[:2] == (3, 11)
    assert set(tokens_of) == {((3, 11), sum(LENGTHS) - len(LENGTHS))}  # the last token of a row predicts nothing
    loss.backward()


def test_evaluation_keeps_its_logits() -> None:
    model = patched("llama", Budget()).eval()
    assert model(**padded()).logits.shape == (3, 11, VOCABULARY)
