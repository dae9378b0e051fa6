"""Times that plans are made from, of which only what does not depend on the machine is asserted."""

import math
from typing import Any

import pytest
import torch
from helpers.models import WIDTH, build, fill_updates, opt
from helpers.planning import PLANNED, text_batches
from torch import Tensor

from hf_subquad import calibrate, patch_model, sparse_mlps
from hf_subquad.layers.budget import Budget
from hf_subquad.layers.classify_tokens import TokenClasses
from hf_subquad.layers.sparse_mlp import SparseMLP
from hf_subquad.planning import mlp_timing
from hf_subquad.planning.measured_token_class import MLPCall


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["opt", "phi3"])
def test_real_times(name: str, dtype: torch.dtype) -> None:
    model = patch_model(build(name, dtype), PLANNED)
    fill_updates(model)
    plan = calibrate(model, text_batches(0, 1, 2, prompt=2))
    times = [getattr(layer, name) for layer in plan.layers for name in ("full_ms", "dense_ms", "sparse_ms")]
    assert all(0 < ms < math.inf for ms in (*times, plan.step_ms, plan.step_speedup, plan.mlp_speedup_over_dense))
    assert len({layer.full_ms for layer in plan.layers}) == 1  # one shape is timed once
    assert plan.planning_seconds > plan.step_ms / 1000
    assert all(p.grad is None for p in model.parameters())


def test_budgets_are_timed_on_the_classes_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs around the MLP from which it could learn them."""
    mlp = sparse_mlps(patch_model(opt(), PLANNED))[0]
    mlp.runtime.padding.may_skip = True
    open_call, seen = SparseMLP._open, {}

    def noted(self: SparseMLP, x: Tensor, training: bool) -> Any:
        call = open_call(self, x, training)
        if call.parts is not None:
            seen[self.budget] = [(part.tokens, part.idle) for part in call.parts]
        return call

    monkeypatch.setattr(SparseMLP, "_open", noted)
    classes = TokenClasses((3, 5), torch.arange(4), torch.arange(4, 10))
    call = MLPCall(torch.randn(3, 5, WIDTH), classes, torch.rand(15))
    mlp_timing.time_mlp(mlp, call, [Budget(), Budget(context=0)])
    assert seen == {Budget(): [(10, False)], Budget(context=0): [(4, False), (6, True)]}
    assert mlp.runtime.passes.latest is None


def test_copies_of_weights_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in training, where they are kept from step to step; a timed budget that needs none must not drop them."""
    model = patch_model(opt(), PLANNED)
    mlp = sparse_mlps(model)[0]
    seen: list[int] = []
    timed = mlp_timing.timed

    def noted(work: Any, device: torch.device) -> float:
        seconds = timed(work, device)
        held = mlp.output._copied_rows
        seen.append(held[1].data_ptr() if held else 0)
        return seconds

    monkeypatch.setattr(mlp_timing, "timed", noted)
    call = MLPCall(torch.randn(15, WIDTH), None, torch.rand(15))
    mlp_timing.time_mlp(mlp, call, [Budget(), Budget(8, 8)])
    after_the_first_round = seen[4:]
    assert len(after_the_first_round) == 12 and len(set(after_the_first_round)) == 1 and all(after_the_first_round)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, 4), (0.04, 2)])
def test_long_rounds_of_timing_are_few(monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int) -> None:
    """The least time counts; the first round's is seldom that. Two digits of it are kept."""
    calls: list[Any] = []

    def timed(work: Any, device: torch.device) -> float:
        calls.append(work)
        return 1.001 * seconds * (3 if len(calls) <= 4 else 1)

    monkeypatch.setattr(mlp_timing, "timed", timed)
    (mlp, _) = sparse_mlps(patch_model(opt(), PLANNED))
    budgets = [Budget(8, 8), Budget(None, 0, 0.9)]
    found = mlp_timing.time_mlp(mlp, MLPCall(torch.randn(15, WIDTH), None, torch.rand(15)), budgets)
    assert len(calls) == 4 * rounds
    assert found == mlp_timing.MLPTiming(1000 * seconds, 1000 * seconds, dict.fromkeys(budgets, 1000 * seconds))


def test_padding_is_timed_where_it_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the patch and with all neurons; the call may be of a row without it."""
    (mlp, _) = sparse_mlps(patch_model(opt(), PLANNED))
    seen: list[tuple[str, int]] = []
    for name in ("_full", "_patched"):

        def noted(mlp: SparseMLP, x: Tensor, gradient: Tensor, *budget: Budget | None, name: str = name) -> None:
            assert gradient.shape == x.shape and x.requires_grad
            kind = "budget" if budget and budget[0] is not None else name
            seen.append((kind, x[..., 0].numel()))

        monkeypatch.setattr(mlp_timing, name, noted)
    mlp_timing.time_mlp(mlp, MLPCall(torch.randn(1, 15, WIDTH), None, torch.rand(15)), [Budget(8, 8)], padding=6)
    assert set(seen) == {("_full", 21), ("_patched", 21), ("budget", 15)}
