"""What planning leaves behind in a model, which is nothing, and what of the model does not change a plan."""

import functools
import random
from typing import Any

import numpy
import pytest
import torch
from helpers.models import (
    LENGTH,
    NEURONS,
    assert_same,
    build,
    checkpoint_activations,
    fill_updates,
    llama,
    opt,
    snapshot,
)
from helpers.planning import PLANNED, hand_plan, set_times, text_batches, trained_head
from torch import nn

from hf_subquad import CalibrationError, calibrate, compensate, patch_model, sparse_mlps
from hf_subquad.layers.budget import Budget
from hf_subquad.layers.patched_mlps import runtime_of
from hf_subquad.planning.make_plan import plan_and_fit

TEXTS = text_batches(0, 1, 2)


@pytest.fixture(autouse=True)
def _times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse is always faster, the more so the fewer neurons; tests choose other times."""
    set_times(monkeypatch)
    trained_head(monkeypatch)


def noisy(model: nn.Module) -> nn.Module:
    """Every forward pass draws from all random states."""

    def draw(*_: object) -> None:
        random.random(), numpy.random.rand(), torch.rand(1)

    model.register_forward_pre_hook(draw)
    return model


def random_states() -> tuple[Any, ...]:
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def gradients(model: nn.Module) -> dict[str, Any]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "phi3"])
def test_an_unpatched_model_is_left_to_the_bit(family: str) -> None:
    model = noisy(build(family))
    model.get_submodule(next(name for name, _ in model.named_modules() if name.count(".") == 2)).eval()
    model.get_input_embeddings().weight.requires_grad_(False)
    before, states = snapshot(model), random_states()
    calibrate(model, TEXTS, PLANNED)
    assert_same(before, snapshot(model))
    assert random_states() == states
    assert not sparse_mlps(model) and not any(p.grad is not None for p in model.parameters())
    with pytest.raises(CalibrationError, match="at least one batch"):
        calibrate(model, [], PLANNED)
    assert_same(before, snapshot(model))


def test_a_patched_model_is_left_as_it_was() -> None:
    model = noisy(patch_model(opt(dropout=0.5), PLANNED))
    fill_updates(model)
    compensate(model, TEXTS[:1])
    first, second = sparse_mlps(model)
    first.set_budget(Budget())
    second.set_budget(Budget(24, 0, 0.9))
    runtime_of(model).plan = plan = hand_plan(model, [NEURONS, 24])
    model.get_submodule("model.decoder.layers.1").eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    attributes = ("budget", "corrections", "auditing", "audited", "selection_override", "calls")
    kept = [[getattr(mlp, name) for name in attributes] for mlp in (first, second)]
    indices = [dict(vars(mlp.index)) for mlp in (first, second)]
    before, states, grads = snapshot(model), random_states(), gradients(model)
    calibrate(model, TEXTS)
    assert_same(before, snapshot(model))
    assert random_states() == states
    assert [[getattr(mlp, name) for name in attributes] for mlp in (first, second)] == kept
    for mlp, index in zip((first, second), indices, strict=True):
        for name in ("sketch", "summary", "output_norms"):
            assert vars(mlp.index)[name] is index[name], name
    assert runtime_of(model).plan is plan and runtime_of(model).forward == "auto"
    assert all(
        (value is None) == (grads[name] is None) and (value is None or torch.equal(value, grads[name]))
        for name, value in gradients(model).items()
    )


@pytest.mark.parametrize("padded", range(3))
def test_padding_of_any_batch_is_noticed(padded: int) -> None:
    batches = text_batches(0, 1, 2, shape=(4, 9))
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batches[padded]["attention_mask"][1, 5:] = 0
    batches[padded]["labels"][1, 5:] = -100
    model = patch_model(llama(), PLANNED)
    calibrate(model, batches)
    assert runtime_of(model).padding.may_skip is True


def test_planning_checkpoints_as_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else activations may not fit that do in training. The plan is the same."""
    batches = text_batches(0, 1, 2, shape=(6, 9), prompt=4)
    expected = calibrate(llama(), batches, PLANNED)
    model, repeated = llama(), []
    checkpoint_activations(model, reentrant=False)
    layer = model.model.layers[0]
    checkpoint = layer._gradient_checkpointing_func

    def counted(*args: Any, use_reentrant: bool) -> Any:
        repeated.append(1)
        return checkpoint(*args)

    layer._gradient_checkpointing_func = functools.partial(counted, use_reentrant=False)
    set_times(monkeypatch)
    assert calibrate(model, batches, PLANNED) == expected
    assert repeated and model.training and all(module.training for module in model.modules())


def test_budgets_before_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do corrections, a fitted index, dropout, or the mode."""
    plain = patch_model(opt(dropout=0.5), PLANNED)
    other = patch_model(opt(dropout=0.5), PLANNED)
    compensate(other, TEXTS[:1])
    for mlp, k in zip(sparse_mlps(other), (NEURONS, 8), strict=True):
        mlp.set_budget(Budget(k, k))
    plan = calibrate(plain, TEXTS)
    set_times(monkeypatch)
    assert calibrate(other.eval(), TEXTS) == plan


def test_an_unpatched_model_gets_the_plan_of_a_patched_one(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = calibrate(llama(), TEXTS, PLANNED)
    set_times(monkeypatch)
    assert calibrate(patch_model(llama(), PLANNED), TEXTS) == plan


def test_a_plan_that_fails_changes_nothing() -> None:
    """`plan_and_fit`, in the middle of it."""
    model = patch_model(opt(), PLANNED)
    compensate(model, TEXTS[:1])
    before, kept = snapshot(model), [(mlp.budget, mlp.corrections, mlp.index.sketch) for mlp in sparse_mlps(model)]
    spoiled = [*TEXTS[:2], {**TEXTS[2], "labels": torch.full((3, LENGTH), -100)}]
    with pytest.raises(CalibrationError):
        plan_and_fit(model, spoiled)
    assert_same(before, snapshot(model))
    assert runtime_of(model).plan is None and runtime_of(model).forward == "auto"
    for mlp, (budget, corrections, sketch) in zip(sparse_mlps(model), kept, strict=True):
        assert mlp.budget == budget and mlp.corrections is corrections and mlp.index.sketch is sketch
