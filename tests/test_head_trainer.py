"""The head on labelled positions under the Trainer: on by default, and off where something reads all logits."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.labelled_head import IGNORED, four_rows_a_chunk, labelled_batch, model_of
from helpers.models import tokens
from helpers.training import TRAIN, Texts, arguments, losses
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from hf_subquad import SubquadCallback, SubquadConfig, calibrate, patch_head, patch_model, unpatch_model
from hf_subquad.head.patch_head import labelled_forward


@pytest.fixture
def four_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    four_rows_a_chunk(monkeypatch)


class Answers(Texts):
    """Texts with a prompt that has no labels, of another length in each row, and a column that no model knows."""

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids = tokens(seed=row, shape=(7,))
        labels = ids.clone()
        labels[: 1 + row % 5] = IGNORED
        return {"input_ids": ids, "labels": labels, "question": torch.tensor(row)}


class Watched(transformers.TrainerCallback):
    """Notes whether the model's forward is ours during steps, and evaluates in between."""

    def __init__(self) -> None:
        self.during: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.during.append(labelled_forward(model) is not None)


def run(model: nn.Module, folder: Path, kind: type[Trainer] = Trainer, more: Any = None, **settings: Any) -> Trainer:
    watch = Watched()
    trainer = kind(
        model=model, args=arguments(folder, **{"eval_strategy": "steps", "eval_steps": 3, **settings}),
        train_dataset=Answers(), eval_dataset=Answers(), callbacks=[SubquadCallback(), watch], **(more or {}),
    )  # fmt: skip
    trainer.train()
    trainer.watch = watch
    return trainer


def subquad(**values: Any) -> nn.Module:
    return patch_model(model_of("opt", torch.float32), SubquadConfig(**{**TRAIN.to_dict(), **values}))


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 3}, {"bf16": True}, {"max_grad_norm": 0.1}])
def test_training_is_the_same_and_on_by_default(
    settings: dict[str, Any], tmp_path: Path, four_rows: None, caplog: pytest.LogCaptureFixture
) -> None:
    logging.enable_propagation()
    off = run(subquad(head_megabytes=0), tmp_path / "off", **settings)
    assert not any(off.watch.during)
    assert "labelled positions" not in caplog.text
    on = run(subquad(head_megabytes=1), tmp_path / "on", **settings)
    logging.disable_propagation()
    assert on.watch.during == [True] * 6
    assert caplog.text.count("logits are computed at labelled positions only") == 1
    assert labelled_forward(on.model) is None
    # Six steps of AdamW with 0.01 carry roundings of gradients into weights; bf16 rounds to 2^-8.
    tolerance = 0.02 if settings.get("bf16") else 1e-4
    assert losses(on) == pytest.approx(losses(off), rel=tolerance)
    evaluated = [[entry["eval_loss"] for entry in r.state.log_history if "eval_loss" in entry] for r in (on, off)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=tolerance)


class OwnLoss(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        assert outputs.logits.shape[:2] == inputs["input_ids"].shape
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def _by_logits(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize(
    ("kind", "more", "settings", "reason"),
    [
        (OwnLoss, {}, {}, "OwnLoss has a compute_loss of its own"),
        (Trainer, {"compute_loss_func": _by_logits}, {}, "compute_loss_func"),
        (Trainer, {}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_readers_of_logits_get_them(
    kind: type[Trainer], more: dict[str, Any], settings: dict[str, Any], reason: str, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    logging.enable_propagation()
    done = run(subquad(), tmp_path, kind, more, **settings)
    logging.disable_propagation()
    assert not any(done.watch.during)
    assert reason in caplog.text


def test_a_method_replaced_in_the_trainer_itself_gets_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Trainer, "compute_loss", OwnLoss.compute_loss)
    logging.enable_propagation()
    done = run(subquad(), tmp_path, eval_strategy="no")
    logging.disable_propagation()
    assert not any(done.watch.during)
    assert "Trainer has a compute_loss of its own" in caplog.text


class Around(nn.Module):
    """A module around a language model, which may read its logits, and returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model_of("opt", torch.float32)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = self.inner(input_ids=input_ids, labels=labels)
        return {"loss": outputs.loss + 1e-4 * outputs.logits.logsumexp(-1).square().mean(), "logits": outputs.logits}


def hooked_subquad() -> nn.Module:
    model = subquad()
    model.register_forward_hook(lambda _, inputs, outputs: print(outputs.logits.sum()))
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: patch_model(Around(), TRAIN), "the language model is inside a Around, which may read logits"),
        (hooked_subquad, "a forward hook on the model sees its outputs"),
    ],
)
def test_readers_around_the_model_get_logits(
    make: Callable[[], nn.Module], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.enable_propagation()
    done = run(make(), tmp_path, eval_strategy="no")
    logging.disable_propagation()
    assert not any(done.watch.during) and all(math.isfinite(loss) for loss in losses(done))
    assert reason in caplog.text


def test_inside_of_peft_the_head_is_limited(tmp_path: Path) -> None:
    model = get_peft_model(subquad(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert all(run(model, tmp_path, eval_strategy="no").watch.during)


def test_a_plan_for_a_model_that_returns_a_dictionary() -> None:
    class OnlyLoss(Around):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            outputs = self.inner(input_ids=input_ids, labels=labels)
            return {"loss": outputs.loss}

    model = patch_head(patch_model(OnlyLoss(), SubquadConfig(**{**TRAIN.to_dict(), "active": None})))
    batch = {"input_ids": tokens(0, (4, 9)), "labels": labelled_batch()["labels"]}
    assert calibrate(model, [batch, batch]).saved_elsewhere_ms >= 0


def test_what_the_user_patched_stays(tmp_path: Path) -> None:
    model = patch_head(subquad(), 5)
    run(model, tmp_path)
    assert labelled_forward(model).megabytes == 5


class Interrupted(transformers.TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt


def test_unpatching_after_a_training_that_was_interrupted(tmp_path: Path) -> None:
    model = subquad()
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=Answers(),
                      callbacks=[SubquadCallback(), Interrupted()])  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert model.train()(**labelled_batch()).logits is None
    unpatch_model(model)
    assert model(**labelled_batch()).logits is not None and labelled_forward(model) is None


def test_trainer_without_sparse_mlps(tmp_path: Path, four_rows: None) -> None:
    def trained(model: nn.Module, folder: Path) -> Trainer:
        trainer = Trainer(model=model, args=arguments(folder), train_dataset=Answers())
        trainer.train()
        return trainer

    stock = trained(model_of("llama", torch.float32), tmp_path / "stock")
    ours = trained(patch_head(model_of("llama", torch.float32), 1), tmp_path / "ours")
    assert losses(ours) == pytest.approx(losses(stock), rel=1e-4)
    assert labelled_forward(ours.model) is not None
