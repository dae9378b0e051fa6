"""A patched head while a model is planned: the same plan at less cost, and what it saves is counted in."""

import dataclasses
from collections import UserDict
from typing import Any

import pytest
import torch
from helpers.models import WIDTH, llama, tokens
from helpers.planning import (
    PLANNED,
    neurons_of,
    set_times,
    t5,
    taking,
    text_batches,
    text_model,
    trained_head,
)
from torch import Tensor, nn

from hf_subquad import calibrate, patch_head, patch_model, sparse_mlps, unpatch_head
from hf_subquad.planning import measured_mlp, measured_token_class, step_timing
from hf_subquad.planning.measured_token_class import MLPCall


@pytest.fixture(autouse=True)
def _times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse is always faster, the more so the fewer neurons; tests choose other times."""
    set_times(monkeypatch)
    trained_head(monkeypatch)


def test_what_is_saved_outside_of_the_mlps_is_counted_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense step takes 1,000 ms, one with the plan 250."""
    monkeypatch.setattr(step_timing, "timed", taking(1000.0, 250.0))
    model = patch_model(llama(vocab_size=20_000), PLANNED)
    texts = text_batches(0, 1, shape=(8, 25), prompt=23)
    plan = calibrate(patch_head(model), texts)
    in_mlps = sum(layer.dense_ms - layer.sparse_ms for layer in plan.layers)
    assert in_mlps > 0 and plan.saved_elsewhere_ms == pytest.approx(750 - in_mlps)
    assert "on logits without a label" in plan.table()
    assert plan.step_speedup_over_dense > dataclasses.replace(plan, saved_elsewhere_ms=0.0).step_speedup_over_dense
    assert calibrate(model, [{"input_ids": tokens(0, (3, 5))}]).saved_elsewhere_ms == 0  # without labels there is none
    assert calibrate(unpatch_head(model), texts).saved_elsewhere_ms == 0


@pytest.mark.parametrize("family", ["llama", "t5", "masked"])
def test_a_plan_with_a_patched_head_is_the_same_and_computes_fewer_logits(family: str) -> None:
    """Only the step that is timed and the trials of what may be skipped compute all logits."""
    plans, rows = [], []
    for change in (lambda model: model, patch_head):
        torch.manual_seed(0)
        if family == "llama":
            model, batches = llama(), text_batches(0, 1, 2, shape=(4, 9))
        else:
            model, batches = t5("t5") if family == "t5" else text_model("bert")
        for batch in batches:
            batch["labels"][:, :4] = -100
        head, seen = model.get_output_embeddings(), []

        def forward(hidden: Tensor, head: nn.Module = head, seen: list[int] = seen) -> Tensor:
            seen.append(hidden[..., 0].numel())
            return nn.functional.linear(hidden, head.weight, head.bias)

        head.forward = forward
        model = change(patch_model(model, PLANNED))
        seen.clear()
        plans.append(calibrate(model, batches, tolerance=0.003))
        rows.append(seen)
    stock, patched = plans
    assert neurons_of(patched) == neurons_of(stock)
    for ours, theirs in zip(patched.layers, stock.layers, strict=True):
        assert (ours.error, ours.context_error) == pytest.approx((theirs.error, theirs.context_error), rel=1e-3)
    assert patched.loss_increase == pytest.approx(stock.loss_increase, rel=1e-3, abs=1e-6)
    assert patched.gradient_cosine == pytest.approx(stock.gradient_cosine, abs=1e-5)
    assert (patched.padding_share, patched.context_share) == (stock.padding_share, stock.context_share)
    everywhere = batches[0]["labels"].numel()
    assert set(rows[0]) == {everywhere}
    assert rows[1].count(everywhere) < 0.4 * len(rows[0])


def padded_batches() -> list[dict[str, Tensor]]:
    """Rows of 9, 6, 7 and 8 tokens."""
    batches = text_batches(0, 1, 2, shape=(4, 9))
    for batch in batches:
        batch["attention_mask"] = (torch.arange(9) < torch.tensor([[9], [6], [7], [8]])).long()
        batch["labels"][batch["attention_mask"] == 0] = -100
    return batches


def test_what_a_patched_head_tries_first_is_no_calibration_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the model takes a row without padding, which is tried on tokens that are not the data's."""
    seen = []

    def tokens_by_class(calls: list[MLPCall]) -> dict[Any, Tensor]:
        seen.append([tuple(call.x.shape) for call in calls])
        return measured_token_class.tokens_by_class(calls)

    monkeypatch.setattr(measured_mlp, "tokens_by_class", tokens_by_class)
    batches = padded_batches()
    model = patch_head(patch_model(llama(), PLANNED))
    calibrate(model, batches)
    assert seen == [[(1, 30, WIDTH)] * 2] * len(sparse_mlps(model))


def paddings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """For each MLP that is timed from now on: tokens of its call, and of the padding that the call left out."""
    set_times(monkeypatch)
    timed_with: list[tuple[int, int]] = []
    formula = measured_mlp.time_mlp

    def time_mlp(mlp: Any, call: MLPCall, budgets: Any, padding: int) -> Any:
        timed_with.append((len(call.tokens), padding))
        return formula(mlp, call, budgets, padding)

    monkeypatch.setattr(measured_mlp, "time_mlp", time_mlp)
    return timed_with


def test_padding_that_the_model_does_not_see_is_counted_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the shares, and in the time before the patch."""
    timed_with = paddings(monkeypatch)
    stock = calibrate(patch_model(llama(), PLANNED), padded_batches())
    patched = calibrate(patch_head(patch_model(llama(), PLANNED)), padded_batches())
    assert timed_with == [(36, 0), (30, 6)]
    assert patched.padding_share == stock.padding_share == pytest.approx(10 / 36)  # last tokens predict nothing
    assert (patched.context_share, patched.tokens) == (stock.context_share, 36)
    assert neurons_of(patched) == neurons_of(stock)  # the row's last tokens, which predict nothing, are no context


class Around(nn.Module):
    """Has neither a config nor a loss type, as DDP has not."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_classes_are_those_that_the_model_inside_of_another_finds(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for around in (lambda model: model, Around):
        timed_with = paddings(monkeypatch)
        model, batches = t5("t5") if family == "t5" else (llama(), padded_batches())
        plan = calibrate(around(patch_head(patch_model(model, PLANNED))), batches)
        found.append((plan.padding_share, plan.context_share, plan.tokens, list(map(sum, timed_with))))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("shape", "inputs", "halved"),
    [
        ((4, 512), {}, True),
        ((4, 512), {"output_attentions": False}, True),
        ((4, 511), {}, False),  # too little
        ((6, 512), {}, False),  # no halves with as much padding
        ((4, 512), {"position_ids": torch.zeros(4, 4, 512)}, False),  # of four dimensions, or of four rows
        ((4, 512), {"text": UserDict()}, False),
    ],
)
def test_the_least_of_a_few_steps_on_half_of_the_rows(
    shape: tuple[int, int], inputs: dict[str, Any], halved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first dense one allocates memory. Rows that cannot be told apart stay together."""
    seconds = iter([0.9, 0.6, 0.3, 0.5, 0.2] if halved else [0.9, 0.3, 0.5, 0.2])
    monkeypatch.setattr(step_timing, "timed", lambda work, device: next(seconds))
    batch = {**text_batches(0, shape=shape)[0], **inputs}
    found = step_timing.time_steps(patch_head(patch_model(llama(), PLANNED)), batch)
    assert found == pytest.approx((1.0, 0.4) if halved else (0.5, 0.2))


@pytest.mark.parametrize(("shape", "rows"), [((4, 512), 2), ((3, 6), 3)])
def test_only_dense_steps_compute_all_logits(shape: tuple[int, int], rows: int) -> None:
    model = patch_model(llama(), PLANNED).eval()
    head, seen = model.lm_head, []

    def forward(hidden: Tensor) -> Tensor:
        seen.append(hidden[..., 0].numel())
        return nn.functional.linear(hidden, head.weight, head.bias)

    head.forward = forward
    patch_head(model)
    seen.clear()
    step_timing.time_steps(model, text_batches(0, shape=shape, prompt=shape[1] - 2)[0])
    assert seen[-2:] == [rows * shape[1], rows * 2]  # earlier ones may be trials
    assert seen.count(rows * shape[1]) == (3 if rows == 2 else 2)


def test_half_of_the_rows_have_half_of_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_timing, "_ENOUGH", 8)
    model, seen = patch_model(llama(), PLANNED).eval(), []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
    batch = padded_batches()[0]  # rows of 9, 6, 7 and 8 tokens
    step_timing.time_steps(model, batch)
    assert seen[-1] == batch["input_ids"][[1, 0]].tolist()


class SharedExperts(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.shared_experts = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.shared_experts(x)


def test_shared_experts_are_timed_with_the_padding_that_they_would_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their name they could be routed experts, whose tokens have no classes; but they see all tokens."""
    timed_with = paddings(monkeypatch)
    model = llama()
    model.model.layers[0].mlp = SharedExperts(model.model.layers[0].mlp)
    calibrate(patch_head(patch_model(model, PLANNED)), padded_batches())
    assert timed_with == [(30, 6)]  # once for both layers
