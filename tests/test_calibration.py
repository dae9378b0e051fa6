"""Does a plan keep its promise, does measuring leave no trace, and is what cannot be planned refused?"""

import dataclasses
import math
import random
from typing import Any

import numpy
import pytest
import torch
import transformers
from helpers.mlps import Plain
from helpers.models import (
    CONFIG,
    LENGTH,
    NEURONS,
    VOCABULARY,
    WIDTH,
    assert_same,
    build,
    fill_updates,
    llama,
    opt,
    snapshot,
    tokens,
)
from helpers.planning import STEP_MS, budgets_of, hand_plan, set_times, text_batches, trained_head
from torch import Tensor, nn

from hf_subquad import (
    CalibrationError,
    ConfigError,
    NoMatchError,
    Plan,
    SubquadConfig,
    apply_plan,
    calibrate,
    compensate,
    dense_forward,
    patch_model,
    sparse_forward,
    sparse_mlps,
)
from hf_subquad.layers.lookup import runtime_of
from hf_subquad.planning.allocation import budgets
from hf_subquad.planning.predictions import Predictions

PLANNED = SubquadConfig(**{**CONFIG.to_dict(), "active": None})
TEXTS = text_batches(0, 1, 2)


def text_model(family: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    return build(family), text_batches(0, 1, 2, shape=(8, 25))


def bert_classifier(num_labels: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Padded rows; labels are classes, or numbers for a regression."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=3, num_labels=num_labels,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.8 / parameter.shape[-1] ** 0.5)
    mask = torch.ones(9, 23, dtype=torch.long)
    mask[1, 3:] = 0
    labels = torch.linspace(-1, 2, 9) if num_labels == 1 else torch.arange(9) % num_labels
    return model, [{"input_ids": tokens(seed, (9, 23)), "attention_mask": mask, "labels": labels} for seed in range(3)]


def t5(family: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Fewer tokens in the decoder than in the encoder."""
    return build(family), [{"input_ids": tokens(s, (7, 29)), "labels": tokens(s + 9, (7, 17))} for s in range(3)]


def vit() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    pixels = [torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    return build("vit"), [{"pixel_values": values, "labels": torch.arange(40) % 7} for values in pixels]


MODELS = {
    "opt": lambda: text_model("opt"),
    "llama": lambda: text_model("llama"),
    "gpt2": lambda: text_model("gpt2"),
    "phi3": lambda: text_model("phi3"),
    "masked": lambda: text_model("bert"),
    "classifier": lambda: bert_classifier(3),
    "regression": lambda: bert_classifier(1),
    "t5": lambda: t5("t5"),
    "t5_gated": lambda: t5("t5_gated"),
    "vit": vit,
}


@pytest.fixture(autouse=True)
def _times(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Sparse is always faster, the more so the fewer neurons; tests choose other times."""
    set_times(monkeypatch)
    if "untrained" not in request.node.name:
        trained_head(monkeypatch)


def divergence(model: nn.Module, plan: Plan, batches: list[dict[str, Tensor]]) -> float:
    """What a plan costs on the last batch, by stock operations, with compensations fitted to the others."""
    model.eval()
    apply_plan(model, plan)
    compensate(model, batches[:-1])
    with torch.no_grad():
        with dense_forward(model):
            before = model(**batches[-1]).logits
        with sparse_forward(model):
            after = model(**batches[-1]).logits
    if before.shape[-1] == 1:
        return (after - before).square().mean().item() / 2
    return nn.functional.kl_div(
        after.log_softmax(-1).flatten(0, -2), before.log_softmax(-1).flatten(0, -2), reduction="batchmean",
        log_target=True,
    ).item()  # fmt: skip


# What a plan says


@pytest.mark.parametrize("name", MODELS)
def test_plans_keep_to_the_tolerance(name: str) -> None:
    """Also on the real forward pass, for budgets from none to all skipped."""
    model, batches = MODELS[name]()
    patch_model(model, PLANNED)
    fill_updates(model, size=0.1)
    most = calibrate(model, batches, tolerance=1e9)
    fastest = [budgets(NEURONS)[0]] * len(most.layers)
    assert [layer.active for layer in most.layers] == fastest and most.loss_increase > 1e-6
    measured = [most]
    for share in (0.5, 0.1):
        plan = calibrate(model, batches, tolerance=share * most.loss_increase)
        assert plan.loss_increase <= plan.tolerance == share * most.loss_increase
        assert [layer.active for layer in plan.layers] != fastest
        measured.append(plan)
    # Compensations of a plan lie between measured ones, those of `compensate` are fitted to its budgets.
    for plan in measured[:2]:
        # Fitted to the judged batch too, and to few tokens, the compensation does better than planned, or as well.
        assert 0 < divergence(model, plan, batches) <= 1.4 * plan.loss_increase
    assert divergence(model, measured[2], batches) <= 1.4 * measured[2].tolerance
    spent = [plan.loss_increase for plan in measured]
    speeds = [plan.mlp_speedup for plan in measured]
    assert spent == sorted(spent, reverse=True) and speeds == sorted(speeds, reverse=True)
    assert speeds[1] > 1.5  # dense everywhere would be 1.5 times as fast as full


def test_the_plan_is_that_of_the_model_and_the_batches() -> None:
    plan = calibrate(opt(), TEXTS, PLANNED)
    mlps = sparse_mlps(patch_model(opt(), PLANNED))
    assert [layer.name for layer in plan.layers] == [mlp.name for mlp in mlps]
    assert (plan.tokens, plan.dtype, plan.device) == (3 * LENGTH, "float32", "cpu")
    assert (plan.tile_size, plan.tile_order, plan.tolerance) == (5, "similar", PLANNED.tolerance)
    assert plan.step_ms == STEP_MS
    for layer in plan.layers:
        assert layer.neurons == NEURONS and (layer.full_ms, layer.dense_ms) == (3 * NEURONS, 2 * NEURONS)
        assert layer.sparse_ms == pytest.approx(0.2 * NEURONS + layer.active)
        assert layer.break_even == NEURONS
        assert layer.sensitivity > 0 and 0 < layer.error < 1
    assert Plan.from_dict(plan.to_dict()) == plan
    apply_plan(patch_model(opt(), PLANNED), plan)


def test_the_tolerance_is_the_configs_unless_given() -> None:
    config = dataclasses.replace(PLANNED, tolerance=0.125)
    assert calibrate(opt(), TEXTS, config).tolerance == 0.125
    assert calibrate(opt(), TEXTS, config, tolerance=0.25).tolerance == 0.25


def test_errors_and_sensitivities_are_those_of_each_mlp_alone() -> None:
    model = patch_model(llama(), PLANNED)
    plan = calibrate(model, TEXTS, tolerance=1e9)
    alone = [plan.with_active([k if i == j else NEURONS for j, k in enumerate(budgets_of_plan(plan))]) for i in (0, 1)]
    for layer, single in zip(plan.layers, alone, strict=True):
        expected = layer.sensitivity * layer.error**2
        assert divergence(model, single, TEXTS) == pytest.approx(expected, rel=0.6)


def budgets_of_plan(plan: Plan) -> list[int]:
    return [layer.active for layer in plan.layers]


@pytest.mark.parametrize("tolerance", [1e-5, 0.01, 1e9])
def test_where_sparse_is_slower_mlps_stay_dense(monkeypatch: pytest.MonkeyPatch, tolerance: float) -> None:
    set_times(monkeypatch, overhead=2.5)
    plan = calibrate(llama(), TEXTS, PLANNED, tolerance)
    assert all(layer.dense and layer.error == 0 and layer.sparse_ms == layer.dense_ms for layer in plan.layers)
    assert plan.loss_increase == 0 and plan.step_speedup == pytest.approx((STEP_MS + 2 * NEURONS) / STEP_MS)
    assert all(layer.break_even == budgets(NEURONS)[0] for layer in plan.layers)


def test_only_those_where_it_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder's MLPs, which see more tokens than the decoder's."""
    set_times(monkeypatch, overhead=lambda x: 3.0 if len(x) == 7 * 29 else 0.2)
    model, batches = t5("t5")
    plan = calibrate(model, batches, PLANNED, tolerance=1e9)
    assert [layer.dense for layer in plan.layers] == [layer.name.startswith("encoder") for layer in plan.layers]
    assert {layer.dense for layer in plan.layers} == {True, False}


def test_no_budget_beyond_break_even(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch, overhead=1.5)
    for tolerance in (1e-6, 1e-3, 0.01, 0.1):
        plan = calibrate(llama(), TEXTS, PLANNED, tolerance)
        for layer in plan.layers:
            assert layer.break_even == 32  # 1.5 m + 32 is the first budget past 2 m
            assert layer.active < 32 or layer.dense


def few_firing(count: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A ReLU model in which `count` neurons of a layer fire, now and then, and all others never."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Plain(WIDTH, 256, True)])
            self.layers[0].act = nn.ReLU()
            self.head = nn.Linear(WIDTH, 9)

        def forward(self, x: Tensor) -> Any:
            return transformers.utils.ModelOutput(logits=self.head(self.layers[0](x)))

    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        model.layers[0].fc1.bias[count:] = -1000.0
        model.layers[0].fc1.bias[:count] = 0.0
    return model, [{"x": torch.randn(64, WIDTH)} for _ in range(3)]


@pytest.mark.parametrize("count", [12, 32, 40])
def test_a_loss_that_is_zero_at_one_budget_is_not_zero_at_all(count: int) -> None:
    """Where 32 of 256 neurons fire, skipping the others costs nothing; skipping half of the 32 does."""
    model, batches = few_firing(count)
    config = SubquadConfig(rank=2, tile_size=16, sketch_rank=WIDTH, layers_to_transform="all")
    plan = calibrate(model, batches, config, tolerance=1e-3)
    patch_model(model, config)
    assert divergence(model, plan, batches) <= 2 * plan.tolerance
    assert plan.loss_increase <= plan.tolerance
    assert plan.layers[0].active >= min(count, 16)


def test_batches_differ_in_size_and_can_be_iterated_once() -> None:
    model = patch_model(opt(), PLANNED)
    several = [*text_batches(0, 1, shape=(2, 9)), *text_batches(2)]
    assert calibrate(model, iter(several)) == calibrate(model, several)
    assert calibrate(model, several).tokens == 15


def test_one_batch_will_do() -> None:
    plan = calibrate(opt(), TEXTS[:1], PLANNED)
    assert plan.loss_increase <= plan.tolerance


def test_half_precision_and_autocast() -> None:
    assert calibrate(llama(torch.bfloat16), TEXTS, PLANNED).dtype == "bfloat16"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = calibrate(llama(), TEXTS, PLANNED)
    assert plan.dtype == "bfloat16" and plan.loss_increase <= plan.tolerance


# Real times, of which only what does not hang on the machine is asserted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["opt", "phi3", "gpt2", "llama"])
def test_real_times(monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype) -> None:
    from hf_subquad.planning import calibration, measurements, mlp_timing

    monkeypatch.setattr(measurements, "time_mlp", mlp_timing.time_mlp)
    monkeypatch.setattr(calibration, "timed", mlp_timing.timed)
    model = patch_model(build(name, dtype), PLANNED)
    fill_updates(model)
    plan = calibrate(model, TEXTS)
    times = [getattr(layer, name) for layer in plan.layers for name in ("full_ms", "dense_ms", "sparse_ms")]
    assert all(0 < ms < math.inf for ms in (*times, plan.step_ms, plan.step_speedup, plan.mlp_speedup))
    assert len({layer.full_ms for layer in plan.layers}) == 1  # one shape is timed once
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("seconds", "rounds"), [(0.001, 4), (0.04, 2)])
def test_long_rounds_of_timing_are_few(monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int) -> None:
    """The least time counts; the first round's is seldom that."""
    from hf_subquad.planning import mlp_timing

    calls: list[Any] = []

    def timed(work: Any, device: torch.device) -> float:
        calls.append(work)
        return seconds * (3 if len(calls) <= 4 else 1)

    monkeypatch.setattr(mlp_timing, "timed", timed)
    (mlp, _) = sparse_mlps(patch_model(opt(), PLANNED))
    found = mlp_timing.time_mlp(mlp, torch.randn(15, WIDTH), [4, 8])
    assert len(calls) == 4 * rounds
    assert found == mlp_timing.MLPTiming(1000 * seconds, 1000 * seconds, dict.fromkeys([4, 8], 1000 * seconds))


# What measuring leaves behind


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
    with pytest.raises(CalibrationError):
        calibrate(model, [], PLANNED)
    assert_same(before, snapshot(model))


def test_a_patched_model_is_left_as_it_was() -> None:
    model = noisy(patch_model(opt(dropout=0.5), PLANNED))
    fill_updates(model)
    compensate(model, TEXTS[:1])
    first, second = sparse_mlps(model)
    first.set_active(NEURONS)
    second.set_active(24)
    runtime_of(model).plan = plan = hand_plan(model, [NEURONS, 24])
    model.get_submodule("model.decoder.layers.1").eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    attributes = ("k", "dense", "compensation", "auditing", "audited", "forced", "calls")
    kept = [[getattr(mlp, name) for name in attributes] for mlp in (first, second)]
    before, states, grads = snapshot(model), random_states(), gradients(model)
    calibrate(model, TEXTS)
    assert_same(before, snapshot(model))
    assert random_states() == states
    assert [[getattr(mlp, name) for name in attributes] for mlp in (first, second)] == kept
    assert runtime_of(model).plan is plan and runtime_of(model).forward == "auto"
    assert all(
        (value is None) == (grads[name] is None) and (value is None or torch.equal(value, grads[name]))
        for name, value in gradients(model).items()
    )


def test_budgets_before_do_not_matter() -> None:
    """Nor do compensations, nor dropout, nor the mode."""
    plain = patch_model(opt(dropout=0.5), PLANNED)
    other = patch_model(opt(dropout=0.5), PLANNED)
    compensate(other, TEXTS[:1])
    for mlp, k in zip(sparse_mlps(other), (NEURONS, 8), strict=True):
        mlp.set_active(k)
    assert calibrate(plain, TEXTS) == calibrate(other.eval(), TEXTS)


def test_an_unpatched_model_gets_the_plan_of_a_patched_one() -> None:
    assert calibrate(llama(), TEXTS, PLANNED) == calibrate(patch_model(llama(), PLANNED), TEXTS)


# Which predictions count


def perturbed(model: nn.Module, positions: list[int]) -> Any:
    """Shift one class at these positions of the logits."""

    def shift(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, positions, 7] += 3.0
        return output

    return model.get_output_embeddings().register_forward_hook(shift)


def moved(model: nn.Module, batch: dict[str, Tensor], positions: list[int]) -> float:
    with torch.no_grad():
        predictions = Predictions(model.eval(), batch)
        handle = perturbed(model, positions)
        found = predictions.divergence()
    handle.remove()
    return found


def test_divergence_is_that_of_kullback_and_leibler() -> None:
    model, batch = opt().eval(), TEXTS[0]
    with torch.no_grad():
        predictions = Predictions(model, batch)
        assert predictions.divergence() == 0
        before = model(**batch).logits.log_softmax(-1)
        handle = perturbed(model, list(range(LENGTH)))
        after = model(**batch).logits.log_softmax(-1)
        found = predictions.divergence()
    handle.remove()
    by_token = (before.exp() * (before - after)).sum(-1)
    assert found == pytest.approx(by_token[:, :-1].mean().item(), rel=0.2) and found > 0.01


def test_masked_labels_are_left_out() -> None:
    """A masked language model predicts the token in its own place."""
    batch = {"input_ids": tokens(0), "labels": torch.full((3, LENGTH), -100)}
    batch["labels"][:, 2] = 9
    assert moved(build("bert"), batch, [0, 1, 3, 4]) == 0
    assert moved(build("bert"), batch, [2]) > 0.01


def test_a_causal_model_predicts_the_next_token() -> None:
    """The label in place 3 is predicted in place 2."""
    batch = {"input_ids": tokens(0), "labels": torch.full((3, LENGTH), -100)}
    batch["labels"][:, 3] = 9
    assert moved(opt(), batch, [2]) > 0.01
    assert moved(opt(), batch, [0, 1, 3, 4]) == 0


def test_padding_is_left_out_if_there_are_no_labels() -> None:
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[:, 3:] = 0
    batch = {"input_ids": tokens(0), "attention_mask": mask}
    assert moved(build("bert"), batch, [3, 4]) == 0
    assert moved(build("bert"), batch, [1]) > 0.01


def test_regression_counts_squares() -> None:
    model, batches = bert_classifier(1)
    with torch.no_grad():
        predictions = Predictions(model.eval(), batches[0])
        model.classifier.bias += 3.0
        assert predictions.divergence() == pytest.approx(4.5, rel=1e-4)


# Rows that are enough to judge


def some_rows(batch: dict[str, Any]) -> Any:
    with torch.no_grad():
        return Predictions(opt().eval(), batch).some_rows()


def test_of_many_predictions_some_rows_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have predictions, spread evenly."""
    monkeypatch.setattr("hf_subquad.planning.predictions._JUDGED", 12)
    batch = text_batches(0, shape=(9, 5))[0] | {"use_cache": False}
    found = some_rows(batch)  # 36 predictions
    assert torch.equal(found["input_ids"], batch["input_ids"][[0, 3, 6]]) and found["use_cache"] is False
    batch["labels"][[0, 3, 6]] = -100
    found = some_rows(batch)  # 24
    assert torch.equal(found["labels"], batch["labels"][[1, 4, 7]])


@pytest.mark.parametrize("other", [{}, {"a": torch.zeros(())}, {"a": torch.zeros(2, 9)}, {"a": [0] * 9}])
def test_rows_are_not_taken_out_of_what_has_none(monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]) -> None:
    """Nor where all are needed."""
    monkeypatch.setattr("hf_subquad.planning.predictions._JUDGED", 12 if other else 36)
    monkeypatch.setattr("hf_subquad.planning.predictions.logits_of", lambda model, batch: torch.zeros(9, 5, VOCABULARY))
    assert some_rows(text_batches(0, shape=(9, 5))[0] | other) is None


@pytest.mark.parametrize("family", ["opt", "t5"])
def test_sensitivities_on_some_rows_are_about_those_of_all(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    model, batches = t5("t5") if family == "t5" else (opt(), text_batches(0, 1, 2, shape=(32, 25)))
    whole = calibrate(model, batches, PLANNED, tolerance=1e9)
    monkeypatch.setattr("hf_subquad.planning.predictions._JUDGED", 50 if family == "t5" else 300)
    part = calibrate(model, batches, PLANNED, tolerance=1e9)
    assert [layer.error for layer in part.layers] == [layer.error for layer in whole.layers]
    for mine, theirs in zip(part.layers, whole.layers, strict=True):
        assert mine.sensitivity != theirs.sensitivity
        assert mine.sensitivity == pytest.approx(theirs.sensitivity, rel=0.5)


# Errors


def test_no_batches() -> None:
    with pytest.raises(CalibrationError, match="at least one batch"):
        calibrate(opt(), [], PLANNED)


def test_a_model_without_a_head() -> None:
    model = opt().model
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=r"OPTModel returns no logits.*last_hidden_state"):
        calibrate(model, [{"input_ids": tokens()}], PLANNED)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("place", [0, 2], ids=["fitted", "judged"])
def test_inputs_that_are_not_finite(place: int) -> None:
    model = patch_model(opt(), PLANNED)
    batches = [{"inputs_embeds": torch.randn(3, LENGTH, WIDTH), "labels": tokens()} for _ in range(3)]
    batches[place]["inputs_embeds"][0, 1, 2] = float("nan")
    before, active = snapshot(model), budgets_of(model)
    with pytest.raises(CalibrationError, match=r"layers\.1.*NaN"):
        calibrate(model, batches)
    assert_same(before, snapshot(model))
    assert budgets_of(model) == active and all(mlp.compensation is None for mlp in sparse_mlps(model))
    assert runtime_of(model).forward == "auto"


def test_outputs_that_are_too_large_are_no_errors_of_zero() -> None:
    """Layer norms bring them back, so predictions are finite; their squares leave float32."""
    model = opt()
    with torch.no_grad():
        model.model.decoder.layers[1].fc2.weight.mul_(1e25)
    if not model.eval()(tokens()).logits.isfinite().all():
        pytest.skip("the layer norms of this torch leave float32 as well, in the plain model too")
    patch_model(model, PLANNED)
    assert model(tokens()).logits.isfinite().all()
    with pytest.raises(CalibrationError, match="too large"):
        calibrate(model, [{"input_ids": tokens(seed), "labels": tokens(seed)} for seed in range(3)])


@pytest.mark.parametrize("where", ["model.decoder.layers.0.fc1.weight", "model.decoder.final_layer_norm.weight"])
def test_weights_that_are_not_finite(where: str) -> None:
    """Before the patched MLPs, or after them."""
    model = patch_model(opt(), PLANNED)
    with torch.no_grad():
        model.get_parameter(where).view(-1)[3] = float("nan")
    with pytest.raises(CalibrationError, match="NaN"):
        calibrate(model, TEXTS)


def test_settings_for_a_model_that_has_some() -> None:
    model = patch_model(opt(), PLANNED)
    with pytest.raises(ConfigError, match="leave config out"):
        calibrate(model, TEXTS, PLANNED)
    assert sparse_mlps(model)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan")])
def test_impossible_tolerances(tolerance: float) -> None:
    model = opt()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="tolerance"):
        calibrate(model, TEXTS, PLANNED, tolerance=tolerance)
    assert_same(before, snapshot(model))


def test_no_label_counts() -> None:
    batch = {"input_ids": tokens(), "labels": torch.full((3, LENGTH), -100)}
    with pytest.raises(CalibrationError, match="-100"):
        calibrate(opt(), [batch], PLANNED)


def test_a_model_without_mlps() -> None:
    with pytest.raises(NoMatchError):
        calibrate(nn.Linear(3, 3), [{"input": torch.ones(2, 3)}], PLANNED)


def test_an_mlp_that_does_not_run() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Plain(WIDTH, NEURONS, True) for _ in range(3)])

        def forward(self, x: Tensor) -> Any:
            return transformers.utils.ModelOutput(logits=self.layers[1](self.layers[0](x)))

    with pytest.raises(CalibrationError, match=r"did not run layers\.2"):
        calibrate(Model(), [{"x": torch.randn(9, WIDTH)}], PLANNED)


@pytest.mark.parametrize("kind", ["classes", "value"])
def test_an_untrained_head_does_not_hide_what_is_skipped(kind: str) -> None:
    """A hundredth of the head, a ten thousandth of the divergence: the plan must not take that for harmless."""
    from types import SimpleNamespace

    class Head(nn.Module):
        size, moved = 1.0, 0.0

        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=self.size * (x + self.moved * x.roll(1, 0)))

    torch.manual_seed(0)
    batch, model = {"x": torch.randn(300, 7 if kind == "classes" else 1)}, Head()

    def divergence(size: float) -> float:
        model.size, model.moved = size, 0.0
        predictions = Predictions(model, batch)
        model.moved = 0.1
        return predictions.divergence()

    small, smaller = divergence(0.3), divergence(0.03)
    assert smaller == pytest.approx(small, rel=0.15)
    assert small > 1e-3
    well_told = divergence(5.0)
    model.size, model.moved = 5.0, 0.0
    before = model(**batch).logits
    model.moved = 0.1
    after = model(**batch).logits
    if kind == "classes":
        p, q = before.log_softmax(-1), after.log_softmax(-1)
        assert well_told == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    else:
        assert well_told == pytest.approx((after - before).square().mean().item() / 2, rel=1e-4)
