"""Does the one place that reads the Trainer's variables find them, and say so loudly where it does not?"""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tokens
from helpers.training import Texts, Watch, arguments, patched_opt, trainer
from transformers import Trainer, TrainerControl, TrainerState
from transformers.utils import logging

from hf_subquad import SubquadCallback
from hf_subquad.training import caller_frames


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    logger = logging.get_logger("hf_subquad.training.caller_frames")
    monkeypatch.setattr(logger, "warning_once", messages.append)
    monkeypatch.setattr(logger, "warning", messages.append)
    return messages


class Asking(Watch):
    """Asks for what the callback asks for, from an event."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = caller_frames.current_trainer(), caller_frames.resumed_from()


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_finds_what_the_trainer_does_not_tell(
    elsewhere: bool, kind: type[str | Path], tmp_path: Path, said: list[str]
) -> None:
    trainer(patched_opt(), tmp_path / "first", max_steps=2, save_strategy="steps", save_steps=1).train()
    folder = tmp_path / ("other" if elsewhere else "first")
    asking = Asking(lambda *_, **__: None)
    run = trainer(patched_opt(), folder, [asking], max_steps=2, save_strategy="steps", save_steps=1)
    run.train(resume_from_checkpoint=kind(tmp_path / "first" / "checkpoint-1"))
    assert asking.found == (run, tmp_path / "first" / "checkpoint-1")
    assert (folder / "checkpoint-2" / "subquad_state.safetensors").is_file()
    assert run.callback_handler.callbacks[0].__class__ is SubquadCallback
    assert not said


def test_trials_have_folders_of_their_own(tmp_path: Path, said: list[str]) -> None:
    pytest.importorskip("optuna")
    args = arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    run = Trainer(model_init=lambda trial: patched_opt(), args=args, train_dataset=Texts(), eval_dataset=Texts(),
                  callbacks=[SubquadCallback()])  # fmt: skip
    run.hyperparameter_search(n_trials=2, backend="optuna", hp_space=lambda trial: {})
    for number in (0, 1):
        assert (tmp_path / f"run-{number}" / "checkpoint-1" / "subquad_state.safetensors").is_file()
    assert not said


def test_called_by_something_else(tmp_path: Path, said: list[str]) -> None:
    """Training works, what is not known is told."""
    model, args = patched_opt(), arguments(tmp_path)
    callback, state, control = (
        SubquadCallback(),
        TrainerState(stateful_callbacks={}, train_batch_size=2),
        TrainerControl(),
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    callback.on_init_end(args, state, control, model=model)
    callback.on_train_begin(args, state, control, model=model, optimizer=optimizer, train_dataloader=[
        {"input_ids": tokens(seed), "labels": tokens(seed)} for seed in range(3)
    ])  # fmt: skip
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    state.global_step = 1
    callback.on_step_end(args, state, control, model=model, optimizer=optimizer)
    assert any("no Trainer calls SubquadCallback" in text and "integrations" in text for text in said)
