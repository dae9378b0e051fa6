"""Is a padded batch as one row the same training step, and is a batch or a model left alone where it would not be?"""

import math
from typing import Any

import pytest
import torch
from helpers.models import CONFIG, VOCABULARY, build, tokens
from torch import Tensor, nn

from hf_subquad import SubquadConfig, patch_head, patch_model, sparse_mlps
from hf_subquad.head.padding_free import without_padding
from hf_subquad.head.patch_head import labelled_forward
from hf_subquad.layers.attention_patch import stock_attention
from hf_subquad.layers.budget import Budget

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
    row = without_padding({**inputs, "num_items_in_batch": 3})
    assert row is not None
    assert row["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert row["labels"].tolist() == [[-100, -100, 7, -100, 9]]  # the 7 does not predict the 8
    assert row["num_items_in_batch"] == 3 and row["use_cache"] is False and "attention_mask" not in row
    assert without_padding(inputs, longest=4) is None


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
    "attentions": lambda: {**padded(), "output_attentions": True},
    "embeddings": lambda: {**padded(), "input_ids": None, "inputs_embeds": torch.zeros(3, 11, 4)},
    "hardly_any": lambda: {**padded(), "attention_mask": torch.ones(3, 11, dtype=torch.long)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_batches_stay_as_they_are(name: str) -> None:
    assert without_padding(OTHERS[name]()) is None


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


def assert_equal_steps(model: nn.Module, inputs: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """As one row, and padded. Returns the shapes of the batches that an MLP saw, in this order."""
    seen: list[tuple[int, ...]] = []
    sparse_mlps(model)[1].opens.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:-1])))
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
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_equal_steps(model, padded())


def test_a_model_that_mixes_the_sequences_of_a_row_gets_padding() -> None:
    """OPT's mask does not look at positions."""
    model = patched("opt", Budget())
    seen = assert_equal_steps(model, padded())
    forward = labelled_forward(model)
    assert math.prod(seen[0]) == len(LENGTHS) * max(LENGTHS) and forward is not None and forward.takes_rows is False


def test_windows_limit_the_row() -> None:
    for window, shape in ((sum(LENGTHS) - 1, (3, 11)), (sum(LENGTHS), (1, sum(LENGTHS)))):
        seen = assert_equal_steps(patched("mistral", Budget(), sliding_window=window), padded())
        assert seen[0] == shape


def test_evaluation_keeps_its_logits() -> None:
    model = patched("llama", Budget()).eval()
    assert model(**padded()).logits.shape == (3, 11, VOCABULARY)
