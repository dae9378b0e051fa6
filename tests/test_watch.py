"""Do budgets follow the live tokens: the sketch first, then more neurons, then dense, and back in small steps?"""

import math
from typing import Any

import pytest
import torch
from helpers.mlps import patched, single
from helpers.models import NEURONS, opt, tokens
from helpers.planning import budgets_of, hand_plan, text_batches
from helpers.training import TRAIN
from torch import Tensor, nn

from hf_subquad import BudgetChange, LayerPlan, SubquadConfig, apply_plan, patch_model, sparse_mlps, sync_model
from hf_subquad.index.selection_quality import evaluate_selection
from hf_subquad.layers.budget import Budget, TokenClass
from hf_subquad.layers.compensation import Compensation
from hf_subquad.layers.patched_mlps import runtime_of
from hf_subquad.layers.sparse_mlp import SparseMLP
from hf_subquad.planning.measured_token_class import neuron_counts
from hf_subquad.training.budget_control import Audit, audit, audit_live, review

D, M, TILES, SIZE = 12, 128, 3, 16
REAL = 4 / 5  # of the tokens of a row of five: at the last one nothing is predicted, and nothing sees it
STEPS = neuron_counts(M)  # 8, 16, 32, 48, 64, 96


def mlp_with(k: int, sketch_rank: int = D) -> SparseMLP:
    """An MLP that kept some tiles of its last batch, with what it chose there."""
    mlp = patched("plain", D, M, dtype=torch.float32, sketch_rank=sketch_rank)[1]
    mlp.index.refresh()
    mlp.set_budget(Budget(k, k))
    keep(mlp)
    return mlp


def keep(mlp: SparseMLP) -> None:
    x = torch.randn(TILES, SIZE, D, generator=torch.Generator().manual_seed(8))
    mlp.audited = {"predicted": (x, mlp.index.choose(x, mlp.k))}


def live(mlp: SparseMLP) -> Audit:
    return audit_live(mlp)["predicted"]


def reviewed(mlp: SparseMLP, plan: LayerPlan, seen: Audit) -> BudgetChange | None:
    return review(mlp, plan, "predicted", seen)


def error_at(mlp: SparseMLP, k: int, token_class: TokenClass = "predicted") -> float:
    tokens_, _ = mlp.audited[token_class]
    return audit(mlp, token_class, tokens_, mlp.index.choose(tokens_, k)).error


def planned(error: float, context_error: float = 0.5) -> LayerPlan:
    return LayerPlan("mlp", M, 16, 16, 1.0, error, context_error, full_ms=3.0, dense_ms=2.0, sparse_ms=1.0)


# One audit


def test_an_audit_by_hand() -> None:
    mlp = mlp_with(24)
    x, chosen = mlp.audited["predicted"]
    up, down = mlp.projections
    hidden = torch.nn.functional.gelu(x @ up.merged_rows().t() + up.bias.detach())
    mask = torch.zeros(TILES, 1, M).scatter_(2, chosen[:, None], 1)
    whole, missed = hidden @ down.merged_rows(), (hidden * (1 - mask)) @ down.merged_rows()
    found = audit(mlp, "predicted", x, chosen)
    assert found.error == pytest.approx((missed.norm() / whole.norm()).item(), rel=1e-4)
    assert found.recall == evaluate_selection(mlp.index, x, chosen).recall > 0.5
    assert audit_live(mlp) == {"predicted": found}

    mlp.corrections["predicted"] = made = Compensation(
        mlp.index.sketch.basis, torch.randn(D, D) * 0.01, torch.randn(D) * 0.01
    )
    corrected = audit(mlp, "predicted", x, chosen)
    assert corrected.error == pytest.approx(((missed - made(x)).norm() / whole.norm()).item(), rel=1e-4)
    assert corrected.recall == found.recall
    assert audit(mlp, "context", x, chosen) == found  # which has no correction


def test_nothing_kept_is_no_audit() -> None:
    mlp = mlp_with(24)
    mlp.audited = {}
    assert audit_live(mlp) == {}


def test_outputs_that_are_all_zero() -> None:
    mlp = mlp_with(24)
    with torch.no_grad():
        mlp.output.weight.zero_()
    mlp.output.update.restart()
    assert live(mlp).error == 0.0


def test_an_audit_of_a_linear_mlp() -> None:
    """Its activation hands back the very tensor that it gets."""
    module = single("plain", D, M, dtype=torch.float32)
    module.act = nn.Identity()
    patch_model(module, SubquadConfig(rank=2, sketch_rank=D, layers_to_transform="all"))
    mlp = sparse_mlps(module)[0]
    x = torch.randn(TILES, SIZE, D, generator=torch.Generator().manual_seed(8))
    truth = evaluate_selection(mlp.index, x, mlp.index.choose(x, 24))
    with torch.no_grad():
        torch.testing.assert_close(truth.whole, module.eval()(x) - module.fc2.bias, rtol=1e-4, atol=1e-4)


# One review


@pytest.mark.parametrize("share", [0.75, 1.0, 1.3])
def test_in_the_corridor_nothing_happens(share: float) -> None:
    mlp = mlp_with(48)
    seen = live(mlp)
    assert reviewed(mlp, planned(seen.error / share), seen) is None
    assert mlp.k == 48 and not mlp.dense


@pytest.mark.parametrize("enough", [64, 96])
def test_past_the_plan_the_least_budget_that_serves(enough: int) -> None:
    mlp = mlp_with(24)
    aim = error_at(mlp, enough)
    seen = live(mlp)
    change = reviewed(mlp, planned(aim * 1.0001), seen)
    assert mlp.k == enough
    assert all(error_at(mlp, k) > aim * 1.0001 for k in STEPS if 24 < k < enough)
    assert (change.name, change.before, change.after) == (mlp.name, 24, enough)
    for part in (f"{seen.error:.3f}", f"{aim:.3f}", f"{enough} neurons"):
        assert part in change.reason
    assert str(change) == f"{mlp.name}: 24 -> {enough} neurons for predicted tokens: {change.reason}"


def test_what_no_budget_mends_is_dense() -> None:
    mlp = mlp_with(24)
    mlp.corrections["predicted"] = Compensation(mlp.index.sketch.basis, torch.ones(D, D), torch.ones(D))  # hopeless
    change = reviewed(mlp, planned(0.1), live(mlp))
    assert mlp.dense and mlp.k == change.after == M and change.before == 24
    assert "only all neurons bring it back" in change.reason
    assert reviewed(mlp, planned(0.1), Audit(1.0, 9.0)) is None and mlp.dense


def test_well_within_the_plan_one_step_less() -> None:
    mlp = mlp_with(72)
    seen = live(mlp)
    less = max(k for k in STEPS if k < 72)
    change = reviewed(mlp, planned(2 * seen.error), seen)
    assert mlp.k == less and (change.before, change.after) == (72, less)
    for part in (f"{seen.error:.3f}", f"{2 * seen.error:.3f}", f"{less} neurons bring {error_at(mlp, less):.3f}"):
        assert part in change.reason


def test_no_step_less_that_would_leave_the_plan() -> None:
    mlp = mlp_with(STEPS[1])
    seen, next_error = live(mlp), error_at(mlp, STEPS[0])
    assert reviewed(mlp, planned((seen.error + next_error) / 2 * 1.0), Audit(1.0, 0.0)) is None
    assert mlp.k == STEPS[1]


def test_the_least_budget_is_the_end() -> None:
    mlp = mlp_with(STEPS[0])
    assert reviewed(mlp, planned(9.0), live(mlp)) is None


def test_budgets_between_the_usual_steps() -> None:
    """Such as m^0.8, or a plan's by hand."""
    mlp = mlp_with(50)
    change = reviewed(mlp, planned(9.0), live(mlp))
    assert change.after == max(k for k in STEPS if k < 50)
    mlp = mlp_with(50)
    aim = error_at(mlp, 96)
    assert reviewed(mlp, planned(aim * 1.0001), live(mlp)).after == 96


# One review, by class


def two_classes(predicted: int, context: int) -> SparseMLP:
    """An MLP with a budget for each class, that kept tiles of both."""
    mlp = mlp_with(predicted)
    mlp.set_budget(Budget(predicted, context))
    for number, (name, k) in enumerate({"predicted": predicted, "context": context}.items()):
        x = torch.randn(TILES, SIZE, D, generator=torch.Generator().manual_seed(8 + number))
        if 0 < k < M:
            mlp.audited[name] = x, mlp.index.choose(x, k)
    return mlp


def test_each_class_is_audited_with_its_own_tiles_and_correction() -> None:
    mlp = two_classes(64, 16)
    mlp.corrections["context"] = Compensation(mlp.index.sketch.basis, torch.randn(D, D) * 0.01, torch.randn(D) * 0.01)
    found = audit_live(mlp)
    assert set(found) == {"predicted", "context"}
    assert all(found[name] == audit(mlp, name, *mlp.audited[name]) for name in found)
    assert found["context"].error > found["predicted"].error > 0


@pytest.mark.parametrize("token_class", ["predicted", "context"])
def test_only_the_class_that_left_its_plan_changes(token_class: TokenClass) -> None:
    """Each is held against its own error."""
    mlp = two_classes(24, 16)
    aim = error_at(mlp, 64, token_class)
    plan = planned(aim * 1.0001, 9.0) if token_class == "predicted" else planned(9.0, aim * 1.0001)
    change = review(mlp, plan, token_class, audit_live(mlp)[token_class])
    assert mlp.budget == (Budget(64, 16) if token_class == "predicted" else Budget(24, 64))
    before = {"predicted": 24, "context": 16}[token_class]
    assert (change.token_class, change.before, change.after) == (token_class, before, 64)
    assert f"neurons for {token_class} tokens" in str(change)


@pytest.mark.parametrize("context", [0, M])
def test_a_class_that_computes_none_or_all_is_not_audited(context: int) -> None:
    mlp = two_classes(24, context)
    assert set(audit_live(mlp)) == {"predicted"}
    budget = mlp.budget
    assert review(mlp, planned(0.1, 0.1), "context", Audit(0.1, 9.0)) is None and mlp.budget == budget


def test_classes_that_share_their_tiles_go_on_to_share_them() -> None:
    """And the share of the gradient stays what it is."""
    mlp = mlp_with(24)
    mlp.set_budget(Budget(24, 24, 0.95))
    change = reviewed(mlp, planned(error_at(mlp, 64) * 1.0001), live(mlp))
    assert mlp.budget == Budget(64, 64, 0.95) and change.after == 64


def test_dense_mlps_stay() -> None:
    mlp = mlp_with(24)
    mlp.set_budget(Budget())
    assert reviewed(mlp, planned(0.1), Audit(1.0, 0.0)) is None
    assert reviewed(mlp, planned(0.1), Audit(0.1, 9.0)) is None
    assert mlp.dense


def test_a_budget_that_was_to_miss_nothing_is_watched_too() -> None:
    """As of ReLU neurons that never fired while it was planned."""
    mlp = mlp_with(24)
    assert live(mlp).error > 0.1
    assert reviewed(mlp, planned(0.0), live(mlp)) is not None


# Through sync_model


def trained_one_step(active: list[Any], refresh_steps: int = 1, prompt: int = 0, **of_layers: Any) -> nn.Module:
    """A planned model after the first step of a loop; what it computed then is kept where that is due."""
    config = SubquadConfig(**{**TRAIN.to_dict(), "active": None, "refresh_steps": refresh_steps})
    model = patch_model(opt(), config)
    apply_plan(model, hand_plan(model, active, **of_layers))
    sync_model(model, 0)
    model(**text_batches(0, shape=(3, 7) if prompt else (3, 5), prompt=prompt)[0]).loss.backward()
    return model


def planned_budgets(model: nn.Module) -> list[int]:
    return [layer.predicted for layer in runtime_of(model).plan.layers]


def test_sync_gives_more_and_says_so() -> None:
    model = trained_one_step([8, 8], error=1e-6)
    report = sync_model(model, 1)
    assert [type(change) for change in report.changes] == [BudgetChange] * 2
    assert [change.name for change in report.changes] == [mlp.name for mlp in sparse_mlps(model)]
    after = [change.after for change in report.changes]
    assert budgets_of(model) == planned_budgets(model) == after and min(after) > 32
    assert report.active_share == pytest.approx(REAL * sum(after) / (2 * NEURONS))
    assert report.error > 0.1 and 0 < report.recall <= 1
    assert report.metrics()["subquad/output_error"] == report.error


def test_sync_gives_back_one_step_a_time() -> None:
    model = trained_one_step([32, 24], error=9.0)
    assert [(c.before, c.after) for c in sync_model(model, 1).changes] == [(32, 24), (24, 16)]
    assert sync_model(model, 1).changes == ()  # what is due at a step is done once
    model(tokens(1), labels=tokens(1)).loss.backward()
    report = sync_model(model, 2)
    assert budgets_of(model) == planned_budgets(model) == [16, 8]
    assert report.active_share == pytest.approx(REAL * 24 / (2 * NEURONS))
    model(tokens(2))
    assert sync_model(model, 3).changes[-1].after == 8 and budgets_of(model) == [8, 8]


def test_sync_reviews_context_by_itself() -> None:
    """On rows that begin with a prompt: there is nothing to choose where context gets no neurons."""
    model = trained_one_step([(NEURONS, 8), (24, 0)], error=9.0, context_error=1e-6, prompt=4)
    first, second = sparse_mlps(model)
    assert set(first.audited) == {"context"} and set(second.audited) == {"predicted"}
    report = sync_model(model, 1)
    (more, less) = report.changes
    assert (more.name, more.token_class, more.before) == (first.name, "context", 8) and more.after > 8
    assert (less.name, less.token_class, less.before, less.after) == (second.name, "predicted", 24, 16)
    assert [(layer.predicted, layer.context) for layer in runtime_of(model).plan.layers] == [
        (NEURONS, more.after),
        (16, 0),
    ]
    assert [mlp.budget.counts(NEURONS) for mlp in (first, second)] == [(NEURONS, more.after), (16, 0)]


def test_sync_leaves_dense_ones_and_those_in_the_corridor() -> None:
    model = trained_one_step([NEURONS, 24])
    error = live(sparse_mlps(model)[1]).error
    report = sync_model(model, 1)
    assert report.error == pytest.approx(error)
    model = trained_one_step([NEURONS, 24], error=error)
    report = sync_model(model, 1)
    assert report.changes == () and budgets_of(model) == planned_budgets(model) == [NEURONS, 24]
    assert report.active_share == pytest.approx(REAL * (NEURONS + 24) / (2 * NEURONS))


def test_sync_reviews_on_schedule_only() -> None:
    model = trained_one_step([8, 8], refresh_steps=3, error=1e-6)
    assert all(not mlp.audited for mlp in sparse_mlps(model))
    for step in (1, 2):
        assert sync_model(model, step).changes == ()
        model(tokens(step))
    assert len(sync_model(model, 3).changes) == 2
    assert all(not mlp.audited for mlp in sparse_mlps(model))


def test_without_a_plan_errors_are_seen_but_budgets_kept() -> None:
    model = patch_model(opt(), TRAIN)
    sync_model(model, 0)
    model(tokens())
    before = budgets_of(model)
    report = sync_model(model, 1)
    assert report.error > 0 and report.changes == () and budgets_of(model) == before


def test_evaluation_is_not_audited() -> None:
    model = trained_one_step([24, 24])
    kept = [mlp.audited for mlp in sparse_mlps(model)]
    with torch.no_grad():
        from hf_subquad import sparse_forward

        with sparse_forward(model):
            model.eval()(tokens(5))
    assert all(mlp.audited is former for mlp, former in zip(sparse_mlps(model), kept, strict=True))


def test_the_audit_sees_what_the_forward_chose() -> None:
    """Tiles of the batch, and k neurons of each."""
    model = trained_one_step([24, 16])
    for mlp, k in zip(sparse_mlps(model), (24, 16), strict=True):
        x, chosen = mlp.audited["predicted"]
        assert x.shape == (2, 6, 20) and chosen.shape == (2, k)  # 12 tokens in tiles of about 5
        assert torch.equal(mlp.index.choose(x, k).sort().values, chosen.sort().values)


def test_half_precision_and_autocast() -> None:
    def error_of(model: nn.Module, autocast: bool = False) -> Tensor:
        sync_model(model, 0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model(tokens())
        return sync_model(model, 1).error

    expected = error_of(patch_model(opt(), TRAIN))
    assert error_of(patch_model(opt(torch.bfloat16), TRAIN)) == pytest.approx(expected, rel=0.15)
    assert error_of(patch_model(opt(), TRAIN), autocast=True) == pytest.approx(expected, rel=0.15)


# Batches that are spoiled


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e19, 1e30, 3e38], ids=str)
@pytest.mark.parametrize("tokens_spoiled", [1, 15])
def test_a_spoiled_batch_changes_no_budget(value: float, tokens_spoiled: int) -> None:
    """Nor what is logged: its MLP counts as if it had not been audited. The next batch counts again."""
    model = patch_model(opt(), SubquadConfig(**{**TRAIN.to_dict(), "active": None}))
    apply_plan(model, hand_plan(model, [24, 24]))
    mlp = sparse_mlps(model)[1]
    sync_model(model, 0)

    def spoil(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        x = args[0].clone()
        x.view(-1, x.shape[-1])[:tokens_spoiled] = value
        return x

    handle = mlp.inputs[0].register_forward_pre_hook(spoil)
    model(tokens(0), labels=tokens(0)).loss.backward()
    handle.remove()
    report = sync_model(model, 1)
    assert mlp.name not in [change.name for change in report.changes]
    assert mlp.k == 24 and not mlp.audited
    assert report.error is not None and math.isfinite(report.error) and 0 < report.recall <= 1
    model(tokens(1), labels=tokens(1))
    assert math.isfinite(live(mlp).error)


def test_what_is_too_large_to_measure_is_no_error_of_zero() -> None:
    mlp = mlp_with(24)
    x, _ = mlp.audited["predicted"]
    everything = torch.arange(M).expand(TILES, M)
    assert audit(mlp, "predicted", x, everything).error == 0
    assert math.isnan(audit(mlp, "predicted", 1e25 * x, everything).error)


def test_a_step_down_that_cannot_be_judged_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = mlp_with(STEPS[1])
    monkeypatch.setattr("hf_subquad.training.budget_control._error", lambda mlp, token_class, k: math.nan)
    assert reviewed(mlp, planned(9.0), live(mlp)) is None
    assert mlp.k == STEPS[1]
