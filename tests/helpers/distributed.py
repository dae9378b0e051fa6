"""Short training runs that two processes, or one that accumulates the same micro-batches, must end alike."""

import io
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from hf_subquad import apply_plan, sparse_mlps
from hf_subquad.layers.patched_mlps import runtime_of

from .models import NEURONS
from .planning import budgets_of, hand_plan
from .training import factors, losses, patched_opt, trainer

# What the config says, and what the TrainingArguments say. All with plain SGD: Adam would turn the rounding of entries
# with hardly a gradient into steps of full size.
SCENARIOS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sparse": ({}, {}),
    "folds and dense steps": ({"fold_steps": 2, "dense_share": 0.5}, {}),
    "accumulation": ({"fold_steps": 2}, {"gradient_accumulation_steps": 2}),
    "one MLP dense": ({"active": None}, {}),
    "checkpointing": ({"active": None}, {"gradient_checkpointing": True}),
    "reentrant": ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
}


def loads_as_the_trainer_asks() -> bool:
    """To "cpu:0", where ranks on the CPU resume; torch 2.6 cannot."""
    file = io.BytesIO()
    torch.save(torch.zeros(1), file)
    file.seek(0)
    try:
        torch.load(file, map_location="cpu:0")
    except RuntimeError:
        return False
    return True


def run_scenario(name: str, folder: Path, processes: int = 2) -> Trainer:
    """Train by a scenario; one process takes the micro-batches of two in turn."""
    config, settings = SCENARIOS[name]
    model = patched_opt(refresh_steps=2, **config)
    if config.get("active", 1) is None:
        apply_plan(model, hand_plan(model, [24, NEURONS], error=0.15))
    accumulation = settings.get("gradient_accumulation_steps", 1) * 2 // processes
    settings = {**settings, "gradient_accumulation_steps": accumulation}
    run = trainer(model, folder, max_steps=4, optim="sgd", learning_rate=0.3, **settings)
    run.train()
    return run


def found(run: Trainer) -> dict[str, Any]:
    """All that ranks must agree on, and what the run logged."""
    mlps = sparse_mlps(run.model)
    runtime = runtime_of(run.model)
    return {
        "plan": runtime.plan.to_dict() if runtime.plan else None,
        "budgets": budgets_of(run.model),
        "budgets by class": [mlp.budget for mlp in mlps],
        "corrections": [{name: vars(made) for name, made in mlp.corrections.items()} for mlp in mlps],
        "indices": [
            {"basis": m.index.sketch.basis, "codes": m.index.sketch.codes, "norms": m.index.output_norms} for m in mlps
        ],
        "weights": {name: value.detach() for name, value in run.model.named_parameters()},
        "factors": factors(run.model),
        "restarts": [p.update.restarts for mlp in mlps for p in mlp.projections],
        "calls": [mlp.calls for mlp in mlps],
        "audited": (runtime.last_report.recall, runtime.last_report.error),
        "losses": losses(run),
        "gradients": [row["grad_norm"] for row in run.state.log_history if "grad_norm" in row],
    }
