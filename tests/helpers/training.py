"""Short runs of the real Trainer on the CPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_subquad import SubquadCallback, SubquadConfig, patch_model, sparse_mlps, sync_model

from .models import opt, tokens

ROWS = 16
# A full-rank sketch and tiles of at most 16 scored tokens: selections do not hang on rounding in the index.
TRAIN = SubquadConfig(
    rank=3, alpha=6.0, tile_size=5, sketch_rank=20, active=0.5, refresh_steps=1, layers_to_transform="all_but_first"
)


class Texts(torch.utils.data.Dataset):
    """Fixed random token rows with themselves as labels."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids = tokens(seed=row, shape=(7,))
        return {"input_ids": ids, "labels": ids}


def steps_through_accelerate(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, batches: Mapping[int, dict[str, Tensor]]
) -> list[float]:
    """Losses of a custom loop over batches, by the number of their step."""
    found = []
    for step, batch in batches.items():
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sync_model(model, step, optimizer)
        found.append(loss.item())
    return found


class AtStart(TrainerCallback):
    """Calls a function with the model once, before the first step and after the callbacks that stand before it."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        if self.look:
            self.look(model)
        self.look = None


class StopAt(TrainerCallback):
    """Ends training after a step, as an interruption would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


class Watch(TrainerCallback):
    """Calls a function with the model and the step after every optimizer step."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        self.look(model, state.global_step, **kwargs)


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    values = dict(
        output_dir=str(folder), use_cpu=True, max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2,
        lr_scheduler_type="constant", logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, seed=7,
        dataloader_pin_memory=False, optim="adamw_torch",
    )  # fmt: skip
    old, new = "gradient_checkpointing", "activation_checkpointing"  # versions that know the new name warn of the old
    if new in TrainingArguments.__dataclass_fields__:
        settings = {name.replace(old, new): value for name, value in settings.items()}
    return TrainingArguments(**{**values, **settings})


def trainer(model: nn.Module, folder: Path, callbacks: list[TrainerCallback] | None = None, **settings: Any) -> Trainer:
    """A Trainer with SubquadCallback and `callbacks`."""
    return Trainer(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=Texts(),
        eval_dataset=Texts(),
        callbacks=[SubquadCallback(), *(callbacks or [])],
    )


def patched_opt(**values: Any) -> nn.Module:
    return patch_model(opt(), SubquadConfig(**{**TRAIN.to_dict(), **values}))


def factors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every U and V by name."""
    return {
        f"{mlp.name}.{path}.{name}": factor.detach().clone()
        for mlp in sparse_mlps(model)
        for path, projection in zip(mlp.sources, mlp.projections, strict=True)
        for name, factor in projection.update.named_parameters()
    }


def listening(monkeypatch: pytest.MonkeyPatch, module: str, method: str = "warning_once") -> list[str]:
    """Collects what a module of the library warns of, in place of its logger."""
    said: list[str] = []
    monkeypatch.setattr(logging.get_logger(f"hf_subquad.{module}"), method, said.append)
    return said


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]
