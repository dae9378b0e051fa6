"""Does a plan keep its promise, and is what cannot be planned refused?"""

import dataclasses
import logging
import random
from typing import Any

import pytest
import torch
import transformers
from helpers.mlps import Plain
from helpers.models import (
    LAYERS,
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
from helpers.planning import (
    PLANNED,
    STEP_MS,
    bert_classifier,
    budgets_of,
    is_dense,
    neurons_of,
    set_times,
    t5,
    text_batches,
    text_model,
    trained_head,
)
from torch import Tensor, nn

from hf_subquad import (
    CalibrationError,
    ConfigError,
    NoMatchError,
    Plan,
    SubquadConfig,
    apply_plan,
    calibrate,
    dense_forward,
    patch_model,
    sparse_forward,
    sparse_mlps,
)
from hf_subquad.layers.budget import Budget
from hf_subquad.layers.patched_mlps import runtime_of
from hf_subquad.layers.preserve_mode_and_rng import preserve_mode_and_rng
from hf_subquad.planning import choose_budgets
from hf_subquad.planning.choose_budgets import EXACT
from hf_subquad.planning.fidelity import DenseReference, Fidelity
from hf_subquad.planning.make_plan import plan_and_fit
from hf_subquad.planning.measured_mlp import measure_mlps
from hf_subquad.planning.measured_token_class import neuron_counts

TEXTS = text_batches(0, 1, 2)


def vit() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    pixels = [torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    return build("vit"), [{"pixel_values": values, "labels": torch.arange(9) % 7} for values in pixels]


MODELS = {
    "opt": lambda: text_model("opt"),
    "phi3": lambda: text_model("phi3"),
    "masked": lambda: text_model("bert"),
    "classifier": lambda: bert_classifier(3),
    "regression": lambda: bert_classifier(1),
    "t5_gated": lambda: t5("t5_gated"),
    "vit": vit,
}


@pytest.fixture(autouse=True)
def _times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse is always faster, the more so the fewer neurons; tests choose other times."""
    set_times(monkeypatch)
    trained_head(monkeypatch)


def faithful(plan: Plan) -> bool:
    """What a plan promises: a tenth of what may be lost is the tolerance."""
    return 0 <= plan.loss_increase <= 10 * plan.tolerance and plan.gradient_cosine >= 1 - 10 * plan.tolerance


# What a plan says


@pytest.mark.parametrize("name", MODELS)
def test_plans_keep_to_the_tolerance(name: str) -> None:
    """Also in the model that `plan_and_fit` leaves, for budgets from none to all skipped."""
    model, batches = MODELS[name]()
    patch_model(model, PLANNED)
    fill_updates(model, size=0.1)
    least = neuron_counts(NEURONS)[0]
    most = calibrate(model, batches, tolerance=1e9)
    assert all(layer.context in (0, least) for layer in most.layers)
    # Nothing is predicted at the tokens of an encoder that feeds a decoder.
    assert all(layer.predicted == (NEURONS if "encoder" in layer.name and name == "t5_gated" else least)
               for layer in most.layers)  # fmt: skip
    assert most.loss_increase > 1e-7 and most.gradient_cosine < 0.999
    tolerance = 0.02 * max(most.loss_increase, 1 - most.gradient_cosine)
    plan = calibrate(model, batches, tolerance=tolerance)
    assert faithful(plan) and plan.tolerance == tolerance
    assert neurons_of(plan) != neurons_of(most)
    assert plan.mlp_speedup_over_dense <= most.mlp_speedup_over_dense


@pytest.mark.parametrize(("saved", "approximates"), [(0.01, False), (0.05, True)])
def test_what_hardly_saves_time_is_not_approximated(
    saved: float, approximates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense takes 2 m; the fewest neurons save a little of it, any others nothing."""
    least = neuron_counts(NEURONS)[0]
    set_times(monkeypatch, overhead=2 * (1 - saved) - least / NEURONS)
    plan = calibrate(opt(), TEXTS, PLANNED, tolerance=1e9)
    assert [layer.predicted for layer in plan.layers] == [least if approximates else NEURONS] * 2
    assert (plan.loss_increase > 0) == (plan.gradient_cosine < 1) == approximates
    assert [layer.why_all for layer in plan.layers] == ["" if approximates else "little gained"] * 2


@pytest.mark.parametrize(("saved", "stops"), [(0.015, True), (0.5, False)])
def test_no_more_rounds_than_can_gain_something(
    saved: float, stops: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At this tolerance the search goes on to its last round, unless plans beyond it are hardly faster."""
    set_times(monkeypatch, overhead=2 * (1 - saved) - neuron_counts(NEURONS)[0] / NEURONS)
    following, rounds = choose_budgets._next_allowance, []
    monkeypatch.setattr(choose_budgets, "_next_allowance", lambda *args: rounds.append(args) or following(*args))
    with caplog.at_level(logging.INFO, "hf_subquad"):
        calibrate(opt(), TEXTS, PLANNED, tolerance=0.002)
    assert (len(rounds) < 5) == stops
    assert "exceed the tolerance" in caplog.text


@pytest.mark.parametrize(
    ("tolerance", "why"), [(1e-6, {"too inexact"}), (0.0025, {"", "others gain more"}), (1e9, {""})]
)
def test_the_plan_says_why_all_neurons_are_computed(tolerance: float, why: set[str]) -> None:
    assert {layer.why_all for layer in calibrate(llama(), TEXTS, PLANNED, tolerance).layers} == why


def test_a_tolerance_below_rounding_gives_the_exact_plan() -> None:
    assert all(map(is_dense, calibrate(opt(), TEXTS, PLANNED, tolerance=1e-30).layers))


@pytest.mark.parametrize("judged", ["beyond rounding", "with it"])
def test_in_low_precision_rounding_is_not_held_against_budgets(judged: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here rounding alone is as large as the tolerance allows, and budgets change ten times less than it."""
    rounding = Fidelity(0.01, 0.99, 0.1)
    monkeypatch.setattr(DenseReference, "rounding", lambda *_: rounding if judged == "beyond rounding" else EXACT)
    monkeypatch.setattr(DenseReference, "fidelity", lambda _: Fidelity(0.011, 0.989, 0.105))
    plan = calibrate(build("opt", torch.bfloat16), TEXTS, PLANNED, tolerance=0.001)
    assert all(map(is_dense, plan.layers)) == (judged == "with it")
    assert plan.loss_increase == pytest.approx(0.001 if judged == "beyond rounding" else 0.0)


def test_what_is_promised_is_what_the_fitted_model_does() -> None:
    """On the batch that judged, by its own forward and backward."""
    model = patch_model(opt(), dataclasses.replace(PLANNED, tolerance=0.003)).eval()
    fill_updates(model, size=0.1)
    batches = text_batches(0, 1, 2, shape=(6, 9), prompt=4)
    plan = plan_and_fit(model, batches)
    assert faithful(plan) and not all(map(is_dense, plan.layers)) and runtime_of(model).plan is plan
    with dense_forward(model):
        reference = DenseReference(model, batches[-1])
    with sparse_forward(model):
        found = reference.fidelity()
    assert found.divergence == pytest.approx(plan.loss_increase, rel=1e-3, abs=1e-8)
    assert found.cosine == pytest.approx(plan.gradient_cosine, abs=1e-6)
    for mlp in sparse_mlps(model):
        mlp.corrections = {}
    with sparse_forward(model):
        assert reference.fidelity().gradient_error > found.gradient_error


def test_the_plan_is_that_of_the_model_and_the_batches() -> None:
    batches = text_batches(0, 1, 2, shape=(6, 9), prompt=4)
    plan = calibrate(opt(), batches, PLANNED)
    mlps = sparse_mlps(patch_model(opt(), PLANNED))
    assert [layer.name for layer in plan.layers] == [mlp.name for mlp in mlps]
    assert (plan.tokens, plan.dtype, plan.device) == (54, "float32", "cpu")
    assert (plan.tile_size, plan.tile_order, plan.tolerance) == (5, "similar", PLANNED.tolerance)
    # The labels of the last five tokens of nine are predicted one place before; nothing sees the last token.
    assert (plan.padding_share, plan.context_share) == (pytest.approx(1 / 9), pytest.approx(3 / 9))
    assert plan.step_ms == STEP_MS and plan.planning_seconds == STEP_MS / 1000
    for layer in plan.layers:
        assert layer.neurons == NEURONS and (layer.full_ms, layer.dense_ms) == (3 * NEURONS, 2 * NEURONS)
        predicted, context = (
            2 * NEURONS if k == NEURONS else 0.2 * NEURONS + k if k else 0.1 * NEURONS
            for k in (layer.predicted, layer.context)
        )
        assert layer.sparse_ms == pytest.approx((5 * predicted + 3 * context) / 9)
        assert (layer.error == 0) == (layer.predicted == NEURONS) and 0 <= layer.error < 1
        assert (layer.context_error == 0) == (layer.context == NEURONS) and 0 <= layer.context_error < 1
    assert Plan.from_dict(plan.to_dict()) == plan
    apply_plan(patch_model(opt(), PLANNED), plan)


def test_the_tolerance_is_the_configs_unless_given() -> None:
    config = dataclasses.replace(PLANNED, tolerance=0.125)
    assert calibrate(opt(), TEXTS, config).tolerance == 0.125
    assert calibrate(opt(), TEXTS, config, tolerance=0.25).tolerance == 0.25


@pytest.mark.parametrize("tolerance", [1e-6, 1e-4, 0.003, 0.1])
def test_predictions_and_gradient_are_judged_together(tolerance: float) -> None:
    """On a batch to which nothing was fitted."""
    assert faithful(calibrate(llama(), text_batches(0, 1, 2, shape=(4, 9), prompt=4), PLANNED, tolerance))


def test_plans_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    for _ in range(2):
        set_times(monkeypatch, backward=0.5)
        random.random(), torch.rand(1)
        plans.append(calibrate(opt(), text_batches(0, 1, 2, shape=(4, 9), prompt=4), PLANNED))
    assert plans[0] == plans[1] and not all(map(is_dense, plans[0].layers))
    set_times(monkeypatch, backward=0.5)
    assert calibrate(opt(), text_batches(3, 4, 5, shape=(4, 9), prompt=4), PLANNED) != plans[0]


@pytest.mark.parametrize("tolerance", [1e-5, 1e9])
def test_where_sparse_is_slower_mlps_stay_exact(monkeypatch: pytest.MonkeyPatch, tolerance: float) -> None:
    """And the table says in one line that nothing is gained."""
    set_times(monkeypatch, overhead=2.5, idle=2.5)
    plan = calibrate(llama(), text_batches(0, 1, 2, shape=(4, 9), prompt=4), PLANNED, tolerance)
    assert all(is_dense(layer) and layer.error == layer.context_error == 0 for layer in plan.layers)
    assert plan.loss_increase < 1e-6 and plan.gradient_cosine == pytest.approx(1, abs=1e-6)  # up to rounding
    assert plan.step_speedup_over_dense == pytest.approx(
        STEP_MS / (STEP_MS - 2 * 2 * NEURONS / 9)
    )  # padding is skipped
    assert {layer.why_all for layer in plan.layers} == {"not faster"}
    lines = [line for line in plan.table().splitlines() if "Nothing is gained" in line]
    assert len(lines) == (plan.step_speedup_over_dense < 1.02)
    packed = calibrate(build("bert"), TEXTS, PLANNED, tolerance)
    assert (
        packed.step_speedup_over_dense == pytest.approx(1)
        and "Nothing is gained here" in packed.table().splitlines()[-1]
    )


def test_only_those_where_it_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder's MLPs, which see more tokens than the decoder's."""
    slow = lambda call: 3.0 if len(call.tokens) == 4 * 11 else 0.2  # noqa: E731
    set_times(monkeypatch, overhead=slow, idle=3.0)
    model, batches = t5("t5")
    plan = calibrate(model, batches, PLANNED, tolerance=1e9)
    assert [is_dense(layer) for layer in plan.layers] == [layer.name.startswith("encoder") for layer in plan.layers]
    assert {is_dense(layer) for layer in plan.layers} == {True, False}


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


@pytest.mark.parametrize("count", [12, 40])
def test_a_loss_that_is_zero_at_one_budget_is_not_zero_at_all(count: int) -> None:
    """Where 40 of 256 neurons fire, skipping the others costs nothing; skipping half of the 40 does."""
    model, batches = few_firing(count)
    config = SubquadConfig(rank=2, tile_size=16, sketch_rank=WIDTH, layers_to_transform="all")
    plan = calibrate(model, batches, config, tolerance=1e-3)
    assert faithful(plan)
    assert min(count, 16) <= plan.layers[0].predicted < 256


def test_batches_differ_in_size_and_can_be_iterated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(opt(), PLANNED)
    several = [*text_batches(0, 1, shape=(2, 9)), *text_batches(2)]
    plan = calibrate(model, iter(several))
    set_times(monkeypatch)
    assert calibrate(model, several) == plan and plan.tokens == 15


def test_one_batch_will_do() -> None:
    assert faithful(calibrate(opt(), TEXTS[:1], PLANNED))


def test_half_precision_and_autocast() -> None:
    assert calibrate(llama(torch.bfloat16), TEXTS, PLANNED).dtype == "bfloat16"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plan = calibrate(llama(), TEXTS, PLANNED)
    assert plan.dtype == "bfloat16" and faithful(plan)


# Classes


def test_context_gets_a_budget_of_its_own() -> None:
    """Long prompts: context gives up more than predicted tokens, down to the low-rank map alone, and it is reported."""
    model = patch_model(opt(), dataclasses.replace(PLANNED, tolerance=1e-3))
    plan = plan_and_fit(model, text_batches(0, 1, 2, shape=(6, 12), prompt=9))
    assert faithful(plan) and plan.context_share == pytest.approx(8 / 12)
    assert all(layer.context < layer.predicted for layer in plan.layers)
    last, mlp = plan.layers[-1], sparse_mlps(model)[-1]
    assert last.context == mlp.budget.context == 0  # exact: nothing sees the last layer's context
    assert mlp.corrections["context"].weight.any() and 0 < last.context_error < 1
    row = next(line for line in plan.table().splitlines() if line.startswith(last.name))
    assert row.split()[3] == "0"


def test_the_last_layers_context_is_given_up_for_nothing() -> None:
    """At a tolerance that allows no other change, though more than float32 rounds a cosine to."""
    plan = calibrate(llama(), text_batches(0, 1, 2, shape=(6, 12), prompt=9), PLANNED, tolerance=1e-6)
    assert neurons_of(plan)[-1] == (NEURONS, 0)
    assert plan.gradient_cosine == pytest.approx(1, abs=1e-6) and plan.loss_increase < 1e-9


def test_one_class_where_classes_are_not_known() -> None:
    """Images: the same neurons for all tokens, no context."""
    model, batches = vit()
    plan = calibrate(model, batches, PLANNED, tolerance=0.01)
    assert (plan.padding_share, plan.context_share) == (0, 0)
    assert all(layer.context == layer.predicted for layer in plan.layers)
    assert {layer.predicted for layer in plan.layers} != {NEURONS}


def test_padding_is_reported() -> None:
    model, batches = bert_classifier(3)
    plan = calibrate(model, batches, PLANNED)
    assert plan.padding_share == pytest.approx(8 / (9 * 11))
    assert plan.context_share == pytest.approx((9 * 11 - 8 - 18) / (9 * 11))  # heads read first and last tokens


# Rows that pass gradients


def test_gradient_rows_are_left_out_where_that_saves_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sparse neurons do not. Predictions and the gradient's expectation stay exact."""
    set_times(monkeypatch, overhead=3.0, idle=3.0, backward=0.6)
    batches = text_batches(0, 1, 2, shape=(6, 12), prompt=9)
    plan = calibrate(opt(), batches, PLANNED, tolerance=0.05)
    assert plan.loss_increase == 0 and plan.gradient_cosine == pytest.approx(1, abs=1e-6) and plan.gradient_noise > 0
    assert all(layer.predicted == layer.context == NEURONS for layer in plan.layers)
    assert any(layer.gradient < 1 and layer.sparse_ms < layer.dense_ms for layer in plan.layers)


@pytest.mark.parametrize("tolerance", [1e-7, 1e-4, 2e-3])
def test_the_noise_of_sampled_rows_stays_within_the_tolerance(
    monkeypatch: pytest.MonkeyPatch, tolerance: float
) -> None:
    """All MLPs that sample do it alike. The noise was measured with one draw, which few rows make rough here."""
    set_times(monkeypatch, overhead=2.5, idle=2.5, backward=0.6)
    model = patch_model(opt(), PLANNED)
    batches = text_batches(0, 1, 2, shape=(16, 12), prompt=9)
    plan = calibrate(model, batches, tolerance=tolerance)
    assert 0 <= plan.gradient_noise <= 50 * tolerance
    shares = {layer.gradient for layer in plan.layers} - {1.0}
    assert len(shares) == (plan.gradient_noise > 0) == (tolerance > 1e-7)
    if not shares:
        return
    apply_plan(model, plan)
    with dense_forward(model):
        reference = DenseReference(model.train(), batches[-1])
    torch.manual_seed(0)
    with sparse_forward(model):
        drawn = [reference.fidelity().gradient_error ** 2 for _ in range(20)]
    assert plan.gradient_noise / 3 < sum(drawn) / len(drawn) < plan.gradient_noise * 3
    assert f"noise of {plan.gradient_noise:.1%} of the squared gradient" in plan.table()


def test_rows_of_a_class_that_is_sparse_save_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their products are of whole tiles, or none: predicted times are those that the clock gives."""
    set_times(monkeypatch, backward=0.6)
    model = patch_model(opt(), PLANNED)
    batches = text_batches(0, 1, 2, shape=(6, 12), prompt=9)
    with preserve_mode_and_rng(model):
        (one, _), *_ = measure_mlps(model, batches)
    exact, none = (one.ms(Budget(context=k)) for k in (None, 0))
    assert none == pytest.approx(exact - 8 / 12 * (2 - 0.1) * NEURONS)
    for share in (0.99, 0.95, 0.9):
        dropped = {name: shares[share] for name, shares in one.dropped.items()}
        saved = 0.6 * 11 / 12 * 2 * NEURONS  # of all rows but padding
        assert one.ms(Budget(gradient=share)) == pytest.approx(exact - saved * sum(dropped.values()), abs=1e-3)
        expected = none - saved * dropped["predicted"]
        assert one.ms(Budget(context=0, gradient=share)) == pytest.approx(expected, abs=1e-3)
        assert one.ms(Budget(8, 0, share)) == pytest.approx(one.ms(Budget(8, 0)))


# Layers


def test_the_first_layer_is_planned_like_the_others() -> None:
    """With default settings but for sizes."""
    config = SubquadConfig(rank=3, tile_size=5, sketch_rank=12)
    plan = calibrate(opt(), text_batches(0, 1, 2, shape=(6, 12), prompt=9), config)
    assert [layer.name for layer in plan.layers] == [f"model.decoder.layers.{n}" for n in range(LAYERS)]
    assert faithful(plan)


def test_one_shared_layer_is_planned() -> None:
    """ALBERT's, which runs several times a pass."""
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY, embedding_size=10, hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    model = transformers.AlbertForSequenceClassification(config)
    batches = [{"input_ids": tokens(seed, (9, 7)), "labels": torch.arange(9) % 3} for seed in range(3)]
    plan = calibrate(model, batches, SubquadConfig(rank=3, tile_size=5, sketch_rank=12))
    assert len(plan.layers) == 1 and faithful(plan)


# Errors


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
    assert budgets_of(model) == active and not any(mlp.corrections for mlp in sparse_mlps(model))
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

    with pytest.raises(CalibrationError, match=r"no token .* reached layers\.2"):
        calibrate(Model(), [{"x": torch.randn(9, WIDTH)}], PLANNED)
