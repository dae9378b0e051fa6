"""Does the callback plan from the training data, without the training noticing, and keep the plan through it all?"""

import copy
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers.models import NEURONS, opt, tokens
from helpers.planning import STEP_MS, budgets_of, hand_plan, is_dense, set_times, text_batches, trained_head
from helpers.training import (
    ROWS,
    TRAIN,
    AtStart,
    StopAt,
    Texts,
    Watch,
    arguments,
    factors,
    listening,
    losses,
    patched_opt,
    trainer,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.utils import logging

from hf_subquad import (
    CalibrationError,
    Plan,
    SidecarError,
    SubquadCallback,
    SubquadConfig,
    apply_plan,
    compensate,
    load_sidecar,
    patch_model,
    save_sidecar,
    sparse_mlps,
)
from hf_subquad.layers.patched_mlps import runtime_of
from hf_subquad.training.trainer_batches import sample_batches

PLANNED = {**TRAIN.to_dict(), "active": None, "tolerance": 1e-3}  # a part of what the fastest plan costs


@pytest.fixture(autouse=True)
def _times(monkeypatch: pytest.MonkeyPatch) -> None:
    set_times(monkeypatch)
    trained_head(monkeypatch)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the library warns of; `warning_once` starts anew."""
    logging.get_logger("hf_subquad").warning_once.__func__.cache_clear()
    logging.enable_propagation()
    with caplog.at_level("WARNING"):
        yield caplog
    logging.disable_propagation()


def to_plan(model: nn.Module | None = None, plan: Plan | None = None, **values: Any) -> nn.Module:
    return patch_model(model or opt(), SubquadConfig(**{**PLANNED, **values}), plan=plan)


def fitted(model: nn.Module) -> list[Any]:
    """Copies of what was fitted for each MLP, by name: what sums up the tokens of its index, and the parts of
    corrections."""
    return [
        ({} if mlp.index.summary is None else {"summary": mlp.index.summary.clone()})
        | {
            f"{token_class}.{part}": values.clone()
            for token_class, correction in mlp.corrections.items()
            for part, values in vars(correction).items()
        }
        for mlp in sparse_mlps(model)
    ]


def same_fits(ones: list[Any], others: list[Any]) -> bool:
    return len(ones) == len(others) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(ones, others, strict=True)
    )


def all_fitted(model: nn.Module) -> list[Any]:
    return copy.deepcopy([(mlp.index.summary, mlp.corrections) for mlp in sparse_mlps(model)])


# Planning at the start


def test_the_callback_plans_logs_and_keeps_the_plan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "hf_subquad")
    model = to_plan(refresh_steps=0)  # budgets stay
    default = budgets_of(model)
    seen: list[Any] = []
    run = trainer(model, tmp_path, [AtStart(lambda m: seen.append((budgets_of(m), runtime_of(m).plan)))], max_steps=2)
    run.train()
    budgets, plan = seen[0]
    assert budgets == [layer.predicted for layer in plan.layers] != default
    assert 0 < plan.loss_increase <= 10 * plan.tolerance == 1e-2 and 0.99 <= plan.gradient_cosine < 1
    assert plan.tokens == 14 and plan.step_ms == STEP_MS  # two rows of seven tokens
    assert all(set(mlp.corrections) == {"predicted"} for mlp in sparse_mlps(model) if not mlp.dense)
    assert all(mlp.index.summary is not None for mlp in sparse_mlps(model))
    assert caplog.text.count(plan.table()) == 1
    rows = [entry for entry in run.state.log_history if "loss" in entry]
    assert [row["subquad/planned_loss_increase"] for row in rows] == [plan.loss_increase] * 2
    assert rows[0]["subquad/planned_step_speedup"] == pytest.approx(plan.step_speedup)
    assert rows[0]["subquad/active_share"] == pytest.approx(6 / 7 * sum(budgets) / (2 * NEURONS))
    assert Plan.load(tmp_path / "subquad_plan.json") == plan


def test_a_fixed_share_is_compensated_but_not_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = to_plan(active=0.5)
    run = trainer(model, tmp_path, max_steps=1)
    run.train()
    assert runtime_of(model).plan is None and budgets_of(model) == [NEURONS // 2] * 2
    assert all(mlp.corrections["predicted"].weight.any() for mlp in sparse_mlps(model))
    assert "MLP" not in capsys.readouterr().out
    assert not any("planned" in name for entry in run.state.log_history for name in entry)


def test_a_plan_that_is_there_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_subquad.training import trainer_planning as fitting

    monkeypatch.setattr(fitting, "plan_and_fit", None)
    plan = hand_plan(to_plan(), [40, NEURONS])
    model = to_plan(plan=plan)
    trainer(model, tmp_path, max_steps=1, logging_steps=5).train()
    assert [layer.name for layer in runtime_of(model).plan.layers] == [layer.name for layer in plan.layers]
    assert runtime_of(model).plan.loss_increase == plan.loss_increase
    first, second = sparse_mlps(model)
    assert set(first.corrections) == {"predicted"} and second.dense and not second.corrections


def test_compensations_that_are_there_are_kept(tmp_path: Path) -> None:
    model = to_plan(active=0.5)
    compensate(model, text_batches(7))
    before = fitted(model)
    trainer(model, tmp_path, max_steps=1).train()
    assert same_fits(fitted(model), before)


def test_a_second_training_goes_on_with_the_plan(tmp_path: Path) -> None:
    model = to_plan(refresh_steps=0)
    trainer(model, tmp_path, max_steps=1).train()
    plan, before = runtime_of(model).plan, fitted(model)
    trainer(model, tmp_path, max_steps=1).train()
    assert runtime_of(model).plan is plan and same_fits(fitted(model), before)


def test_mixed_precision_is_planned_in(tmp_path: Path) -> None:
    model = to_plan()
    trainer(model, tmp_path, max_steps=1, bf16=True).train()
    assert runtime_of(model).plan.dtype == "bfloat16"


def test_the_sampled_batches_are_of_the_data(tmp_path: Path) -> None:
    """Rows from all over, as the Trainer would collate them, on its device."""
    data = [{"row": torch.tensor(number)} for number in range(23)]
    loader = DataLoader(data, batch_size=4)
    batches = sample_batches(loader, rows=4, count=3, device=torch.device("cpu"))
    rows = [batch["row"].tolist() for batch in batches]
    assert [len(batch) for batch in rows] == [4, 4, 4]
    spread = sorted(itertools.chain(*rows))
    assert len(set(spread)) == 12 and max(b - a for a, b in itertools.pairwise(spread)) <= 2
    assert all(max(batch) - min(batch) > 12 for batch in rows)
    assert sample_batches(loader, rows=9, count=3, device=torch.device("cpu"))[1]["row"].shape == (9,)
    assert len(sample_batches(loader, rows=50, count=3, device=torch.device("cpu"))) == 1
    with pytest.raises(CalibrationError, match="empty"):
        sample_batches(DataLoader([]), rows=4, count=3, device=torch.device("cpu"))


@pytest.mark.parametrize("lengths", list(itertools.permutations([2, 5, 9])))
def test_the_last_batch_has_the_median_share_of_padding(lengths: tuple[int, ...]) -> None:
    batches = [{"attention_mask": (torch.arange(10) < length).long()[None]} for length in lengths]
    sampled = sample_batches(batches, rows=1, count=3, device=torch.device("cpu"))
    assert sorted(int(batch["attention_mask"].sum()) for batch in sampled) == [2, 5, 9]
    assert sampled[-1]["attention_mask"].sum() == 5


# Without the training noticing


class Noisy(Texts):
    """Rows that change with every random state, as augmented data do, and say which they were."""

    def __init__(self) -> None:
        self.served: list[tuple[int, int]] = []

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        noise = int(random.random() * 7) + int(numpy.random.rand() * 7) + int(torch.rand(1) * 7)
        self.served.append((row, noise))
        ids = tokens(seed=100 * row + noise, shape=(7,))
        return {"input_ids": ids, "labels": ids}


def run_noisy(model: nn.Module, folder: Path, look: Any = None) -> tuple[Trainer, Noisy]:
    data = Noisy()
    run = Trainer(model=model, args=arguments(folder, max_steps=4), train_dataset=data,
                  callbacks=[SubquadCallback(), AtStart(look)])  # fmt: skip
    run.train()
    return run, data


def test_planning_disturbs_neither_data_nor_random_states(tmp_path: Path) -> None:
    """Against a run that gets plan and compensations by hand: the same rows, the same dropout, the same losses."""
    found: list[Any] = []
    model = to_plan(opt(dropout=0.3))
    planned, data = run_noisy(model, tmp_path / "planned", lambda m: found.append((runtime_of(m).plan, all_fitted(m))))
    plan, fits = found[0]
    by_hand = to_plan(opt(dropout=0.3), plan)
    for mlp, (summary, corrections) in zip(sparse_mlps(by_hand), fits, strict=True):
        mlp.index.adopt(summary)
        mlp.corrections = corrections
    straight, other = run_noisy(by_hand, tmp_path / "by hand")
    assert len(other.served) >= 8 and data.served[6:] == other.served  # behind three batches of two rows to plan with
    assert losses(planned) == losses(straight)
    assert all(torch.equal(value, factors(by_hand)[name]) for name, value in factors(model).items())


def test_a_plan_by_hand_is_fitted_to_as_a_fixed_share_is(tmp_path: Path) -> None:
    """To all batches, as there is nothing to judge."""
    found: list[Any] = []
    plan = hand_plan(to_plan(), [24, 24])
    first, _ = run_noisy(to_plan(plan=plan), tmp_path / "planned", lambda m: found.append(fitted(m)))
    second, _ = run_noisy(to_plan(active=24), tmp_path / "fixed", lambda m: found.append(fitted(m)))
    assert same_fits(found[0], found[1]) and all(len(of_mlp) > 1 for of_mlp in found[0])
    assert losses(first)[0] == losses(second)[0]  # before budgets are reviewed


class Heavy:
    """A collator that holds the model, as `DataCollatorForSeq2Seq` does."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        assert self.model is HELD[0], "the model was copied"
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


HELD: list[nn.Module] = []


def test_a_model_in_the_collator_is_not_copied(tmp_path: Path) -> None:
    """It may fill most of the memory."""
    HELD[:] = [model := to_plan()]
    run = Trainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=Texts(),
                  data_collator=Heavy(model), callbacks=[SubquadCallback()])  # fmt: skip
    run.train()
    assert runtime_of(model).plan is not None


# Where it cannot plan


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (Texts()[row] for row in range(ROWS))


class Bare(nn.Module):
    """Hands out a loss, or only hidden states."""

    def __init__(self, loss: bool) -> None:
        super().__init__()
        self.model, self.loss = opt().model, loss

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        found = self.model(input_ids).last_hidden_state
        return {"loss": found.square().mean()} if self.loss or self.training else {"hidden_states": found}


def test_a_model_with_only_a_loss_is_planned_by_its_gradient(tmp_path: Path) -> None:
    found: list[Plan] = []
    model = to_plan(Bare(loss=True), tolerance=0.02)
    trainer(model, tmp_path, [AtStart(lambda m: found.append(runtime_of(m).plan))], max_steps=1).train()
    assert found[0].loss_increase == 0 and 0.8 <= found[0].gradient_cosine < 1
    assert not all(map(is_dense, found[0].layers))


def test_a_model_without_logits_or_loss_to_plan_with(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    model = to_plan(Bare(loss=False))
    run = trainer(model, tmp_path, max_steps=2)
    run.train()
    assert run.state.global_step == 2 and budgets_of(model) == [NEURONS] * 2 and runtime_of(model).plan is None
    assert "Bare returns no logits (only hidden_states)" in warnings.text and "MLPs run dense" in warnings.text


def test_the_warning_says_what_runs(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    """With a plan, a stream leaves MLPs at its budgets, not at m^0.8, but without compensations."""
    model = to_plan(plan=hand_plan(to_plan(), [40, 40]))
    run = Trainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=Stream(),
                  callbacks=[SubquadCallback()])  # fmt: skip
    run.train()
    assert budgets_of(model) != [24, 24] and "can only be iterated" in warnings.text
    assert "MLPs keep the budgets that they were given" in warnings.text


def test_a_bypass_is_found_after_planning_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What calibration ran sparse does not count as a training step."""
    model, other = to_plan(), opt()
    forward = model.forward

    def bypassed_in_training(input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        return (forward if not model.training else other)(input_ids=input_ids, labels=labels)

    model.forward = bypassed_in_training
    said = listening(monkeypatch, "training.sync_model", "warning")
    trainer(model, tmp_path, max_steps=6).train()
    assert len(said) == 1 and "no patched MLP ran sparse" in said[0]


def test_a_trainer_that_keeps_labels_plans_without_them(tmp_path: Path) -> None:
    """It calls the model without labels, which then treats all tokens as predicted."""
    shares = []
    for smoothing in (0.0, 0.1):
        model = to_plan()
        data = [{**row, "labels": torch.where(torch.arange(len(row["labels"])) < 3, -100, row["labels"])} for row in
                map(Texts().__getitem__, range(8))]  # fmt: skip
        run = Trainer(model=model, args=arguments(tmp_path, max_steps=1, label_smoothing_factor=smoothing),
                      train_dataset=data, callbacks=[SubquadCallback()])  # fmt: skip
        run.train()
        runtime = runtime_of(model)
        shares.append(runtime.plan.context_share)
        runtime.begin(model, {"input_ids": tokens(), "labels": tokens()})
        assert runtime.passes.latest.stacks  # by the labels of calls of another kind
        runtime.end()
    assert shares[0] > 0.2 and shares[1] == 0


# During training


def test_changes_of_budgets_are_warned_of(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    model = to_plan(plan=hand_plan(to_plan(), [8, NEURONS], error=1e-6))
    trainer(model, tmp_path, max_steps=1).train()
    first, second = budgets_of(model)
    assert first > 8 and second == NEURONS
    assert f"step 1: {sparse_mlps(model)[0].name}: 8 -> {first} neurons" in warnings.text


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0, 0.3])
def test_dense_steps_are_spread(tmp_path: Path, share: float) -> None:
    """A share of the steps, the first among them, with the others in between."""
    dense: list[bool] = []
    calls = [0]

    def look(model: nn.Module, step: int, **_: Any) -> None:
        now = sparse_mlps(model)[0].calls
        dense.append(now == calls[0])
        calls[0] = now

    trainer(to_plan(active=0.5, dense_share=share), tmp_path, [Watch(look)], max_steps=12).train()
    assert len(dense) == 12 and dense[0]
    places = [number for number, value in enumerate(dense) if value]
    assert len(places) == -(-12 * share // 1)
    gaps = {b - a for a, b in itertools.pairwise(places)}
    assert gaps <= {int(1 / share), -int(-1 // share)}


# Saving and resuming


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}


@pytest.mark.parametrize("values", [{}, {"fold_steps": 2}, {"dense_share": 0.5}], ids=["plain", "folds", "dense steps"])
def test_resumed_equals_uninterrupted(
    tmp_path: Path, values: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "hf_subquad")
    straight = to_plan(**values)
    whole = trainer(straight, tmp_path / "whole")
    whole.train()
    first = trainer(to_plan(**values), tmp_path / "run", [StopAt(4)], **SAVING)
    first.train()
    assert losses(first) == losses(whole)[:4]
    caplog.clear()

    set_times(monkeypatch, overhead=3.0)  # planned anew, all would be dense
    resumed, found = to_plan(**values), []
    again = trainer(resumed, tmp_path / "run", [AtStart(lambda m: found.append((runtime_of(m).plan, fitted(m))))],
                    **SAVING)  # fmt: skip
    again.train(resume_from_checkpoint=True)
    assert found[0][0] == runtime_of(first.model).plan
    assert same_fits(found[0][1], fitted(first.model)) and any(len(of_mlp) > 1 for of_mlp in found[0][1])
    assert caplog.text.count(found[0][0].table()) == 1
    assert losses(again) == pytest.approx(losses(whole), abs=1e-4)
    assert budgets_of(resumed) == budgets_of(straight)


def test_a_checkpoint_without_a_plan_is_planned(tmp_path: Path) -> None:
    Trainer(model=to_plan(active=0.5), args=arguments(tmp_path, **SAVING), train_dataset=Texts(),
            callbacks=[StopAt(2)]).train()  # fmt: skip
    model = to_plan()
    trainer(model, tmp_path, **SAVING).train(resume_from_checkpoint=True)
    assert runtime_of(model).plan is not None


def saved(folder: Path, **values: Any) -> nn.Module:
    model = to_plan(**values)
    from hf_subquad import apply_plan

    apply_plan(model, hand_plan(model, [24, NEURONS]))
    compensate(model, text_batches(0))
    save_sidecar(model, folder, 3)
    return model


def test_the_sidecar_keeps_plan_and_compensations(tmp_path: Path) -> None:
    model, other = saved(tmp_path), to_plan()
    compensate(other, text_batches(5))
    assert load_sidecar(other, tmp_path) == 3
    assert runtime_of(other).plan == runtime_of(model).plan and budgets_of(other) == [24, NEURONS]
    assert same_fits(fitted(other), fitted(model))
    assert set(sparse_mlps(other)[0].corrections) == {"predicted"} and not sparse_mlps(other)[1].corrections


@pytest.mark.parametrize("rank", [1, 20])
def test_the_sidecar_holds_compensations_of_any_rank(tmp_path: Path, rank: int) -> None:
    model, other = saved(tmp_path, sketch_rank=rank), to_plan(sketch_rank=rank)
    load_sidecar(other, tmp_path)
    assert same_fits(fitted(other), fitted(model)) and len(fitted(other)[0]["predicted.basis"]) == rank


def test_a_sidecar_with_a_plan_for_other_tiles_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    other = to_plan(tile_size=6)
    before, budgets = factors(other), budgets_of(other)
    with pytest.raises(SidecarError, match="tiles"):
        load_sidecar(other, tmp_path)
    assert all(torch.equal(before[name], value) for name, value in factors(other).items())
    assert budgets_of(other) == budgets and not any(mlp.corrections for mlp in sparse_mlps(other))


def test_best_model_at_end_keeps_the_plan(tmp_path: Path) -> None:
    model = to_plan()
    trainer(model, tmp_path, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
            **{**SAVING, "max_steps": 2}).train()  # fmt: skip
    assert [layer.predicted for layer in runtime_of(model).plan.layers] == budgets_of(model)


def test_a_plan_with_other_neurons_gets_corrections_of_its_own(tmp_path: Path) -> None:
    """On a model that was trained with another plan before."""
    model = patched_opt()
    trainer(model, tmp_path, max_steps=1).train()
    before = [mlp.corrections for mlp in sparse_mlps(model)]
    assert all(before)
    plan = hand_plan(model, [(20, 20)] * len(before))
    apply_plan(model, plan)
    assert not any(mlp.corrections for mlp in sparse_mlps(model))
    trainer(model, tmp_path, max_steps=1).train()
    for mlp, old in zip(sparse_mlps(model), before, strict=True):
        assert mlp.corrections and mlp.corrections is not old
