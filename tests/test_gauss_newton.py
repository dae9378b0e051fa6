"""The study of Gauss-Newton steps: rows are the exact Jacobian, the step solves its problem, the report is whole."""

import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, default_data_collator
from transformers.utils import logging

pytest.importorskip("peft")
pytest.importorskip("datasets")
pytest.importorskip("yaml")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import study_gauss_newton
from study.gauss_newton import (
    GaussNewtonTrainer,
    OutputOf,
    direction,
    logit_difference,
    root_loss,
    rows_of,
    squared_error,
    trained,
)
from study.sequence_tasks import TASKS, Task, memorise, patched

SEQUENCES, LENGTH, CLASSES = 4, 6, 3


@pytest.fixture(autouse=True)
def _verbosity() -> Iterator[None]:
    before = logging.get_verbosity()  # which the script lowers
    yield
    logging.set_verbosity(before)


def tiny() -> Task:
    return memorise(rows=SEQUENCES, length=LENGTH, width=16, neurons=40)


def tiny_classes(classes: int = CLASSES, output_of: OutputOf = root_loss) -> Task:
    config = BertConfig(
        vocab_size=256, hidden_size=16, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=classes, initializer_range=0.5,
    )  # fmt: skip
    rows = [row | {"labels": number % classes} for number, row in enumerate(tiny().train)]
    return tiny()._replace(model=lambda: BertForSequenceClassification(config), output_of=output_of, train=rows)


def fill(model: nn.Module) -> nn.Module:
    """With updates at zero, half of their gradients are zero too."""
    with torch.no_grad():
        for weight in trained(model):
            weight.add_(0.2 * torch.randn_like(weight))
    return model.train()


@pytest.mark.parametrize(
    ("make", "factor"),
    [(tiny, 2.0), (tiny_classes, 1.0), (partial(tiny_classes, 2, logit_difference), 1.0)],
    ids=["regression", "classes", "two classes"],
)
def test_rows_add_up_to_the_gradient_of_the_batch(make: Any, factor: float) -> None:
    """In the sparse forward, too: a tile is a sequence, in a batch as alone."""
    task = make()
    model = fill(patched(task, 0.5, 16.0, 0)[0])
    batch, weights = default_data_collator(task.train), trained(model)
    rows, first, second = rows_of(model, batch, task.output_of, weights)
    assert rows.shape == (SEQUENCES, sum(weight.numel() for weight in weights)) and (second > 0).all()
    gradients = torch.autograd.grad(model(**batch).loss, weights)
    expected = torch.cat([gradient.flatten() for gradient in gradients])
    torch.testing.assert_close(factor / SEQUENCES * rows.t() @ first, expected, rtol=1e-4, atol=1e-6)


def test_curvature_is_the_second_derivative_of_a_squared_residual() -> None:
    logits, label = torch.randn(CLASSES), torch.tensor(1)
    residual = (2 * nn.functional.cross_entropy(logits, label)).sqrt()
    logits.requires_grad_()
    value, first, second = root_loss(logits, label)
    (row,) = torch.autograd.grad(value, logits)
    # d sqrt(2 l) = dl / sqrt(2 l): one step of least squares on it, in terms of l
    of_residual = row / residual
    torch.testing.assert_close(second * row.outer(row), of_residual.outer(of_residual))
    torch.testing.assert_close(first * row, residual * of_residual)
    assert squared_error(torch.tensor([3.0]), torch.tensor(1.0))[1:] == (2.0, 1.0)


def test_direction_is_the_damped_generalised_gauss_newton_step() -> None:
    jacobian, first, second = torch.randn(5, 9).double(), torch.randn(5).double(), torch.rand(5).double() + 0.1
    damping = 0.3 * (second * (jacobian**2).sum(1)).mean()
    curvature = jacobian.t() @ second.diag() @ jacobian + damping * torch.eye(9)
    expected = torch.linalg.solve(curvature, jacobian.t() @ first)
    torch.testing.assert_close(direction(jacobian, first, second, 0.3), expected)


def test_a_full_step_without_damping_fits_the_batch(tmp_path: Path) -> None:
    """Up to what is not linear: the loss falls by far more than a gradient step brings it down."""
    task = tiny()
    model, callbacks = patched(task, 0.5, 16.0, 0)
    trainer = GaussNewtonTrainer(
        model=model, train_dataset=task.train, data_collator=default_data_collator, callbacks=callbacks,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, learning_rate=1.0, lr_scheduler_type="constant", optim="sgd",
            max_grad_norm=0.0, per_device_train_batch_size=SEQUENCES, logging_steps=1, report_to="none",
            save_strategy="no", use_cpu=True, disable_tqdm=True,
        ),
        output_of=squared_error, damping=1e-9,
    )  # fmt: skip
    trainer.train()
    before, after = (row["loss"] for row in trainer.state.log_history if "loss" in row)
    assert before > 0.1 and after < 0.1 * before


def test_report_has_trials_runs_and_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "memorise", tiny)
    path = tmp_path / "rows.json"
    arguments = ["memorise", "--steps", "4", "--seeds", "1", "--trials", "1", "--rounds", "2"]
    assert study_gauss_newton.main([*arguments, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [(row["method"], row["seed"]) for row in report["trials"]] == [("adamw", 0), ("gauss-newton", 0)]
    assert [(row["method"], row["seed"]) for row in report["runs"]] == [("adamw", 1), ("gauss-newton", 1)]
    for row in (*report["trials"], *report["runs"]):
        assert len(row["losses"]) == 4 and row["train_loss"] == row["losses"][-1]
        assert math.isfinite(row["eval_loss"]) and row["losses"][-1] < row["losses"][0]
    costs = report["costs"]
    assert costs["jacobian_bytes"] == 4 * SEQUENCES * costs["trained_weights"] and len(costs["rounds"]) == 2
    assert costs["gauss_newton_against_adamw"] > 0 and costs["bound_against_adamw"] > 0
    assert {"definitions", "settings", "versions", "commit", "machine", "command", "finished"} <= set(report)


def test_derivatives_of_two_classes_are_those_of_the_cross_entropy() -> None:
    difference, label = torch.tensor(0.7, requires_grad=True), torch.tensor(1)
    _, first, second = logit_difference(torch.stack([torch.zeros(()), difference]), label)
    loss = nn.functional.cross_entropy(torch.stack([torch.zeros(()), difference]), label)
    (slope,) = torch.autograd.grad(loss, difference, create_graph=True)
    torch.testing.assert_close(first, slope.detach())
    torch.testing.assert_close(second, torch.autograd.grad(slope, difference)[0])
