"""One of two processes that train together, and what each scenario ends with."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from helpers.distributed import SCENARIOS, found, loads_as_the_trainer_asks, run_scenario
from helpers.models import opt
from helpers.planning import hand_plan, set_times, trained_head
from helpers.training import TRAIN, StopAt, Texts, arguments, losses, patched_opt, trainer
from pytest import MonkeyPatch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer

from hf_subquad import ParallelismError, SubquadCallback, SubquadConfig, UnsupportedModuleError, apply_plan, patch_model

PLANNED = SubquadConfig(**{**TRAIN.to_dict(), "active": None, "tolerance": 1e-5, "fold_steps": 2})


def mask_at_random(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A collator as for masked language models, which draws other masks on every rank."""
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids.masked_fill(torch.rand(ids.shape) < 0.3, 5), "labels": ids}


class DrawOtherwise(SubquadCallback):
    """Gives every rank a random state of its own before the callback does its part."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        torch.manual_seed(100 + dist.get_rank())
        super().on_train_begin(*args, **kwargs)


def of_one_plan(rank: int, folder: Path) -> dict[str, Any]:
    """By itself, the second rank would plan all dense, and fit to other batches."""
    with MonkeyPatch.context() as patch:
        set_times(patch, overhead=(0.2, 3.0)[rank])
        trained_head(patch)
        run = Trainer(
            model=patch_model(opt(), PLANNED), args=arguments(folder, max_steps=5), train_dataset=Texts(),
            data_collator=mask_at_random, callbacks=[DrawOtherwise()],
        )  # fmt: skip
        run.train()
    return found(run)


def resumed(folder: Path) -> dict[str, Any]:
    """Stopped after three steps and gone on with, and the same without a stop."""
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    straight = trainer(patched_opt(fold_steps=2), folder / "straight", max_steps=5)
    straight.train()
    trainer(patched_opt(fold_steps=2), folder / "run", [StopAt(3)], **saving).train()
    again = trainer(patched_opt(fold_steps=2), folder / "run", **saving)
    again.train(resume_from_checkpoint=True)
    return {**found(again), "straight": losses(straight)}


def refused(folder: Path, **settings: Any) -> str:
    AcceleratorState._reset_state()  # which would stay that of the first Trainer
    try:
        trainer(patched_opt(), folder, **settings)
    except ParallelismError as error:
        return str(error)
    return "not refused"


def sharded() -> str:
    """A model that FSDP2 has split already."""
    try:
        patch_model(fully_shard(opt(), mesh=init_device_mesh("cpu", (2,))), TRAIN)
    except UnsupportedModuleError as error:
        return str(error)
    return "not refused"


def dropping_layers(folder: Path) -> dict[str, Any]:
    """LayerDrop with a random state of each rank's own: in many steps one rank audits an MLP that the other skipped."""
    model = patch_model(opt(layerdrop=0.4, num_hidden_layers=6), TRAIN)
    apply_plan(model, hand_plan(model, [40] * 5, error=0.8))  # to be given back, step by step
    run = Trainer(
        model=model, args=arguments(folder, max_steps=6, ddp_find_unused_parameters=True),
        train_dataset=Texts(), callbacks=[DrawOtherwise()],
    )  # fmt: skip
    run.train()
    return found(run)


def work(rank: int, out: Path) -> dict[str, Any]:
    results: dict[str, Any] = {name: found(run_scenario(name, out / name)) for name in SCENARIOS}
    results["one plan"] = of_one_plan(rank, out / "one plan")
    if loads_as_the_trainer_asks():
        results["resumed"] = resumed(out / "resumed")
    results["dropping layers"] = dropping_layers(out / "dropping layers")
    results["fsdp"] = refused(out / "fsdp", fsdp=True, fsdp_config={"version": 2})
    results["sharded"] = sharded()
    return results
