"""Is a plan kept to the bit, refused when it is damaged or foreign, and followed by the model it is for?"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import (
    CONFIG,
    NEURONS,
    TOKENS,
    assert_same,
    batch,
    fill_updates,
    llama,
    logits,
    opt,
    snapshot,
    tokens,
)
from helpers.planning import budgets_of, hand_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_subquad import (
    LayerPlan,
    NotPatchedError,
    OutputError,
    Plan,
    PlanError,
    SubquadConfig,
    apply_plan,
    dense_forward,
    patch_model,
    sparse_forward,
    sparse_mlps,
)
from hf_subquad.layers.budget import Budget
from hf_subquad.layers.patched_mlps import runtime_of

LAYERS = (
    LayerPlan("layers.1.mlp", 1000, 125, 0, 0.995, 0.0625, 0.3, full_ms=30.0, dense_ms=20.0, sparse_ms=10.0),
    LayerPlan("layers.2.mlp", 1003, 1003, 1003, 1.0, 0.0, 0.0, full_ms=12.0, dense_ms=8.0, sparse_ms=8.0),
)
PLAN = Plan(
    tolerance=0.02, loss_increase=1 / 81, gradient_cosine=0.987, step_ms=100.0, planning_seconds=7.5,
    padding_share=0.36, context_share=0.23, tokens=2048, dtype="bfloat16", device="cpu", tile_size=5,
    tile_order="similar", saved_elsewhere_ms=0.0, layers=LAYERS,
)  # fmt: skip


def changed(**values: Any) -> dict[str, Any]:
    """The plan as JSON values, with other ones; those named `layer_...` are of its first layer."""
    whole = PLAN.to_dict()
    whole.update({name: value for name, value in values.items() if not name.startswith("layer_")})
    of_layer = {name.removeprefix("layer_"): value for name, value in values.items() if name.startswith("layer_")}
    if of_layer:
        whole["layers"][0].update(of_layer)
    return whole


# By itself


def test_speedups_by_hand() -> None:
    # 100 ms of the step are with MLPs of 20 and 8 ms: before the patch they took 14 ms more, in the plan 10 ms less.
    assert PLAN.step_speedup == pytest.approx(114 / 90)
    assert PLAN.mlp_speedup_over_dense == pytest.approx((20 + 8) / (10 + 8))
    assert PLAN.step_speedup_over_dense == pytest.approx(100 / 90)
    head = dataclasses.replace(PLAN, saved_elsewhere_ms=30.0)
    assert (head.step_speedup, head.step_speedup_over_dense) == pytest.approx((114 / 60, 100 / 60))
    assert dataclasses.replace(PLAN, saved_elsewhere_ms=300.0).step_speedup_over_dense == pytest.approx(
        20
    )  # not below zero


def test_other_budgets() -> None:
    other = PLAN.with_neurons([(200, 0), (64, 72)])
    assert [(layer.predicted, layer.context) for layer in other.layers] == [(200, 0), (64, 72)]
    assert other == dataclasses.replace(PLAN, layers=other.layers)
    assert [dataclasses.replace(layer, predicted=0, context=0) for layer in other.layers] == [
        dataclasses.replace(layer, predicted=0, context=0) for layer in PLAN.layers
    ]
    with pytest.raises(ValueError):
        PLAN.with_neurons([(200, 200)])


def test_table_shows_every_mlp() -> None:
    header, first, second, classes, summary = PLAN.table().splitlines()
    assert first.split() == ["layers.1.mlp", "1000", "125", "0", "99.5%", "50%", "30.0", "20.0", "10.0"]
    assert second.split() == ["layers.2.mlp", "1003", "all", "all", "100.0%", "100%", "12.0", "8.0", "8.0"]
    assert header.rindex(" planned ms") + len(" planned ms") == len(first) == len(second)
    for part in ("2048 tokens", "36% are padding", "23% context", "41% predicted"):
        assert part in classes
    for part in ("bfloat16", "cpu", "1.56x", "1.11x", "1.27x", "0.0123", "0.02", "0.9870", "8 s"):
        assert part in summary


def test_table_says_why_an_mlp_computes_all_neurons() -> None:
    layers = (LAYERS[0], dataclasses.replace(LAYERS[1], why_all="not faster"))
    header, first, second, classes, _ = dataclasses.replace(PLAN, layers=layers).table().splitlines()
    assert header.index("why all") == second.index("not faster") and len(first) < header.index("why all")
    assert "why all tokens compute all neurons" in classes


@pytest.mark.parametrize(("sparse_ms", "gained"), [(19.9, False), (10.0, True)])
def test_table_says_in_one_line_if_nothing_is_gained(sparse_ms: float, gained: bool) -> None:
    layers = (dataclasses.replace(LAYERS[0], sparse_ms=sparse_ms), LAYERS[1])
    lines = dataclasses.replace(PLAN, layers=layers).table().splitlines()
    said = [line for line in lines if "Nothing is gained" in line]
    assert len(said) == (not gained)
    assert gained or ("unpatch_model" in said[0] and said[0] == lines[-1])


def test_round_trip(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert Plan.load(str(tmp_path / "plan.json")).loss_increase == 1 / 81  # floats to the bit
    assert Plan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


NAMES, COUNTS = st.text(min_size=1, max_size=20), st.integers(1, 10**15)
NUMBERS, TIMES = st.floats(0, 1e300), st.floats(1e-300, 1e300)
PLANS = st.builds(
    Plan, tolerance=NUMBERS, loss_increase=NUMBERS, gradient_cosine=st.floats(-1, 1), step_ms=TIMES,
    planning_seconds=NUMBERS, padding_share=st.floats(0, 1), context_share=st.floats(0, 1), tokens=COUNTS, dtype=NAMES,
    device=NAMES, tile_size=COUNTS, tile_order=st.sampled_from(["similar", "consecutive"]), saved_elsewhere_ms=NUMBERS,
    layers=st.lists(
        st.integers(1, 10**6).flatmap(
            lambda m: st.builds(
                LayerPlan, name=NAMES, neurons=st.just(m), predicted=st.integers(1, m), context=st.integers(0, m),
                gradient=st.floats(0, 1, exclude_min=True), error=NUMBERS, context_error=NUMBERS, full_ms=TIMES,
                dense_ms=TIMES, sparse_ms=TIMES,
            )
        ),
        min_size=1, max_size=3,
    ).map(tuple),
)  # fmt: skip
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(PLANS)
def test_any_plan_survives_its_file(tmp_path_factory: pytest.TempPathFactory, plan: Plan) -> None:
    path = tmp_path_factory.getbasetemp() / "any_plan.json"
    plan.save(path)
    assert Plan.load(path) == plan


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_value_in_any_field_is_a_plan_or_a_plan_error(data: st.DataObject) -> None:
    values = PLAN.to_dict()
    part = data.draw(st.sampled_from([values, values["layers"][0]]))
    name = data.draw(st.sampled_from(sorted(part)))
    part[name] = data.draw(ANYTHING)
    try:
        plan = Plan.from_dict(values)
    except PlanError:
        return
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert all(1 <= layer.predicted <= layer.neurons for layer in plan.layers)
    assert all(0 <= layer.context <= layer.neurons and 0 < layer.gradient <= 1 for layer in plan.layers)


def test_to_dict_shares_nothing() -> None:
    PLAN.to_dict()["layers"][0]["predicted"] = 1
    assert PLAN.layers[0].predicted == 125


# Files


def test_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"plan\.json.*No space left"):
            patch.setattr(os, call, full)
            PLAN.with_neurons([(8, 8), (8, 8)]).save(path)
    assert Plan.load(path) == PLAN
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_save_where_there_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "plan.json", tmp_path / "nowhere" / "plan.json"):
        with pytest.raises(OutputError, match=r"plan\.json"):
            PLAN.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "plan.json")


def test_truncated_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    data = path.read_bytes()
    for length in range(0, len(data.rstrip()), 7):
        path.write_bytes(data[:length])
        with pytest.raises(PlanError, match=r"plan\.json"):
            Plan.load(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xfe\x00", b"[]", b"3", b"null", b'"plan"', b"{}", b'{"format": 3}', b"[" * 100_000],
    ids=lambda data: repr(data[:14]),
)
def test_other_files_under_its_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(data)
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.load(path)


@pytest.mark.parametrize(
    "values",
    [
        {"format": 1},
        {"format": 2},
        {"format": None},
        {"surprise": 1},
        {"layers": []},
        {"layers": None},
        {"layers": ["layers.1.mlp"]},
        {"layer_predicted": 0},
        {"layer_predicted": 1001},
        {"layer_predicted": "125"},
        {"layer_context": -1},
        {"layer_context": 1001},
        {"layer_context": 0.5},
        {"layer_gradient": 0.0},
        {"layer_gradient": 1.01},
        {"gradient_cosine": math.nan},
        {"padding_share": -0.1},
        {"planning_seconds": None},
        {"layer_surprise": 1},
        {"layer_predicted": 125.5},
        {"layer_error": "small"},
        {"layer_sparse_ms": 0.0},
        {"layer_context": None},
        {"loss_increase": None},
        {"tolerance": math.nan},
        {"step_ms": math.inf},
        {"step_ms": 10**400},
        {"tokens": -1},
        {"tile_size": 1e9},
        {"tile_size": True},
        {"layer_neurons": True},
        {"layer_context_error": -0.1},
        {"layer_name": 3},
        {"layers": {"name": "layers.1.mlp"}},
        {"tile_order": "alphabetical"},
    ],
    ids=lambda values: str(values)[:40],
)
def test_what_is_no_plan_is_an_error_at_once(tmp_path: Path, values: dict[str, Any]) -> None:
    """Not later, in the middle of training."""
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(changed(**values)))
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.load(path)


@pytest.mark.parametrize(
    "name", [*(f.name for f in dataclasses.fields(Plan) if f.default is dataclasses.MISSING), "format"]
)
def test_missing_fields(name: str) -> None:
    values = PLAN.to_dict()
    del values[name]
    with pytest.raises(PlanError):
        Plan.from_dict(values)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(LayerPlan) if f.default is dataclasses.MISSING])
def test_missing_fields_of_a_layer(name: str) -> None:
    values = PLAN.to_dict()
    del values["layers"][1][name]
    with pytest.raises(PlanError):
        Plan.from_dict(values)


# On a model


def planned(budgets: list[int | tuple[int, int]], **values: Any) -> tuple[nn.Module, Plan]:
    """A model that was patched with a plan, its updates filled."""
    config = SubquadConfig(**{**CONFIG.to_dict(), **values})
    plan = hand_plan(patch_model(opt(), config), budgets)
    model = patch_model(opt(), config, plan=plan)
    fill_updates(model)
    return model, plan


def test_patch_with_a_plan_sets_budgets() -> None:
    model, plan = planned([16, NEURONS])
    assert budgets_of(model) == [16, NEURONS]
    assert [mlp.dense for mlp in sparse_mlps(model)] == [False, True]
    assert runtime_of(model).plan is plan
    computed: list[int] = []
    for mlp in sparse_mlps(model):
        mlp.output.register_forward_pre_hook(lambda _, args: computed.append(args[0].numel()))
    model(tokens())
    assert computed[0] < 16 / NEURONS * 1.5 * computed[1] and computed[1] == TOKENS * NEURONS


def test_a_plan_sets_what_each_class_and_the_gradient_get() -> None:
    model, plan = planned([(16, 0), (NEURONS, 24)])
    layers = tuple(dataclasses.replace(layer, gradient=0.95) for layer in plan.layers)
    apply_plan(model, dataclasses.replace(plan, layers=layers))
    assert [mlp.budget for mlp in sparse_mlps(model)] == [Budget(16, 0, 0.95), Budget(None, 24, 0.95)]
    assert budgets_of(model) == [16, NEURONS]
    assert not any(mlp.dense for mlp in sparse_mlps(model))


def test_a_plan_goes_before_a_fixed_budget() -> None:
    model, _ = planned([16, 24], active=0.9)
    assert budgets_of(model) == [16, 24]


def test_dense_layers_run_dense() -> None:
    """To the bit where no gradient is wanted; else up to the order of its sums."""
    model, _ = planned([NEURONS, NEURONS])
    inputs = batch("opt", model)
    with dense_forward(model):
        expected = logits(model, inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), sparse_forward(model):
        assert torch.equal(logits(model, inputs), expected)
    sparse, _ = planned([NEURONS, 8])
    assert not torch.equal(logits(sparse, inputs), expected)


def test_a_new_plan_replaces_the_old_one() -> None:
    model, plan = planned([16, NEURONS])
    other = plan.with_neurons([(NEURONS, NEURONS), (24, 0)])
    apply_plan(model, other)
    assert budgets_of(model) == [NEURONS, 24]
    assert [mlp.budget for mlp in sparse_mlps(model)] == [Budget(), Budget(24, 0)]
    assert [mlp.dense for mlp in sparse_mlps(model)] == [True, False]
    assert runtime_of(model).plan is other


def test_names_do_not_depend_on_a_peft_wrapper() -> None:
    from peft import LoraConfig, get_peft_model

    plan = planned([16, NEURONS])[1]
    model = get_peft_model(opt(), LoraConfig(r=2, target_modules=["q_proj"]))
    patch_model(model, CONFIG, plan=plan)
    assert budgets_of(model) == [16, NEURONS]


def renamed(plan: Plan) -> Plan:
    first, *rest = plan.layers
    return dataclasses.replace(plan, layers=(dataclasses.replace(first, name="model.layers.9.mlp"), *rest))


def resized(plan: Plan) -> Plan:
    first, *rest = plan.layers
    return dataclasses.replace(plan, layers=(dataclasses.replace(first, neurons=NEURONS + 4), *rest))


FOREIGN = {
    "another name": (renamed, r"model\.layers\.9\.mlp"),
    "other neurons": (resized, f"{NEURONS + 4} neurons"),
    "one less": (lambda plan: dataclasses.replace(plan, layers=plan.layers[:1]), r"1 MLPs.*patched at 2"),
    "another order": (lambda plan: dataclasses.replace(plan, layers=plan.layers[::-1]), "order"),
    "tile size": (lambda plan: dataclasses.replace(plan, tile_size=6), "tiles of 6"),
    "tile order": (lambda plan: dataclasses.replace(plan, tile_order="consecutive"), "consecutive"),
}


@pytest.mark.parametrize(("spoil", "words"), FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_plan_changes_nothing(spoil, words: str) -> None:
    model, plan = planned([16, NEURONS])
    with pytest.raises(PlanError, match=words):
        apply_plan(model, spoil(plan.with_neurons([(24, 24), (24, 24)])))
    assert budgets_of(model) == [16, NEURONS]
    assert runtime_of(model).plan is plan


@pytest.mark.parametrize(("spoil", "words"), FOREIGN.values(), ids=FOREIGN)
def test_a_patch_with_a_foreign_plan_is_undone(spoil, words: str) -> None:
    plan = planned([16, NEURONS])[1]
    model = opt()
    before = snapshot(model)
    with pytest.raises(PlanError, match=words):
        patch_model(model, CONFIG, plan=spoil(plan))
    assert_same(before, snapshot(model))
    assert not sparse_mlps(model)
    patch_model(model, CONFIG, plan=plan)


def test_a_plan_of_another_family() -> None:
    with pytest.raises(PlanError, match="differ in"):
        patch_model(llama(), CONFIG, plan=planned([16, 16])[1])


def test_a_model_that_is_not_patched() -> None:
    with pytest.raises(NotPatchedError):
        apply_plan(opt(), planned([16, 16])[1])
