"""Train by one method and measure it."""

import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import datasets
import torch
import transformers
from lm_data import NO_LOSS
from methods import apply_method, plain_model
from torch import nn
from torch.utils.data import DataLoader

from hf_subquad import SubquadConfig, dense_forward, sparse_forward, sparse_mlps

from .memory import resident_bytes
from .mlp_time import MlpTimer
from .run_inputs import Inputs, load_inputs
from .run_settings import RunSettings
from .training_clock import TimedTrainer
from .turns import Turns


def measure(settings: RunSettings, turns: Turns) -> dict[str, Any]:
    """Train by `settings.method`, in turns.

    Returns:
        steps, evaluations, setup_seconds, logs, digest (see `training_clock.Measured`); set-up includes patching.
        peak_memory_bytes: over the timed parts of the steps.
        memory_before_model_bytes: what Python and its libraries take of that.
        eval_loss_dense, eval_loss_sparse: at the end, mean over held-out tokens; None where there is none.
        patched: name, neurons and active neurons of each patched MLP.
        profile: a baseline's times in steps of their own, see `_profile`.
    """
    torch.set_num_threads(settings.threads)
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    memory_before = resident_bytes()

    transformers.set_seed(settings.seed)
    inputs = load_inputs(settings)
    use_cache = inputs.model.config.use_cache
    start = time.perf_counter()
    model, callbacks = apply_method(
        inputs.model,
        settings.method,
        rank=settings.rank,
        alpha=settings.alpha,
        subquad=subquad_config(settings),
        rest=settings.rest,
    )
    patching_seconds = time.perf_counter() - start
    transformers.set_seed(settings.seed)  # whatever the method drew from the random state

    loss_of = _evaluator(inputs, settings) if inputs.evaluation else None
    with tempfile.TemporaryDirectory() as scratch:
        trainer = TimedTrainer(
            model,
            settings,
            turns,
            inputs.train,
            inputs.collate,
            callbacks,
            scratch,
            loss_of,
            {"patched": _patched(model)} if settings.method == "subquad" else None,
        )
        trainer.measured.setup_seconds = patching_seconds
        trainer.train()
        evaluations = trainer.measured.evaluations
        sparse_loss = loss_of(model, sparse_forward) if loss_of and settings.method == "subquad" else None
        result = asdict(trainer.measured) | {
            "peak_memory_bytes": trainer.memory.bytes,
            "memory_before_model_bytes": memory_before,
            "trained_parameters": sum(w.numel() for w in model.parameters() if w.requires_grad),
            "total_parameters": sum(w.numel() for w in model.parameters()),
            "eval_loss_dense": evaluations[-1]["eval_loss"] if evaluations else None,
            "eval_loss_sparse": sparse_loss,
            "patched": _patched(model) if settings.method == "subquad" else [],
            "profile": None,
        }
        if settings.save_to and inputs.tokenizer is not None:
            plain = plain_model(model)
            plain.config.use_cache = use_cache
            plain.save_pretrained(settings.save_to)
            inputs.tokenizer.save_pretrained(settings.save_to)
        elif settings.method != "subquad" and "patched" in turns.shared and settings.profile_steps:
            result["profile"] = _profile(model, inputs, settings, turns, scratch)
    return result | {"waiting_cpu_seconds": turns.waiting_cpu_seconds}


def subquad_config(settings: RunSettings) -> SubquadConfig:
    """Rank, alpha and seed are the comparison's unless `settings.subquad` says otherwise."""
    common = {"rank": settings.rank, "alpha": settings.alpha, "seed": settings.seed}
    return SubquadConfig.from_dict(common | settings.subquad)


def _patched(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {
            "name": mlp.name,
            "projections": [f"{mlp.name}.{path}".lstrip(".") for path in mlp.sources],
            "neurons": mlp.index.neurons,
            "active": mlp.active,
        }
        for mlp in sparse_mlps(model)
    ]


def _evaluator(inputs: Inputs, settings: RunSettings) -> Callable[..., float]:
    """Function of a model: its mean loss (nats) over all held-out tokens that carry loss, with the dense forward.
    Its second argument may be `sparse_forward`."""

    @torch.no_grad()
    def loss_of(model: nn.Module, forward: Callable[[nn.Module], Any] = dense_forward) -> float:
        total, count = 0.0, 0
        mode = model.training
        model.eval()
        with forward(model) if settings.method == "subquad" else nullcontext():
            for batch in DataLoader(inputs.evaluation, settings.batch_size, collate_fn=inputs.collate):
                batch = {name: value.to(settings.device) for name, value in batch.items()}
                targets = int((batch["labels"][:, 1:] != NO_LOSS).sum())
                with torch.autocast(settings.device, torch.bfloat16, enabled=settings.autocast):
                    total += float(model(**batch).loss) * targets
                count += targets
        model.train(mode)
        return total / count

    return loss_of


class _ProfilingTrainer(TimedTrainer):
    """Also keeps, per step, the seconds spent in each MLP."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timer = MlpTimer(self.now)
        self.rows: list[dict[str, Any]] = []

    def step_begins(self, step: int) -> None:
        self.timer.restart()
        super().step_begins(step)

    def progress(self, step: int) -> dict[str, Any]:
        return {}  # not of the comparison's steps

    def step_ends(self, step: int) -> None:
        super().step_ends(step)
        self.rows.append({"step_seconds": self.measured.steps[-1]["seconds"], "mlp_seconds": dict(self.timer.seconds)})


def _profile(
    model: nn.Module, inputs: Inputs, settings: RunSettings, turns: Turns, scratch: str
) -> list[dict[str, Any]]:
    """Extra training steps of a baseline, after all that is reported of it was measured: step_seconds, and
    mlp_seconds of each MLP that subquad patches. The first steps are left out."""
    steps = settings.untimed_steps + settings.profile_steps
    trainer = _ProfilingTrainer(
        model,
        replace(settings, steps=steps, turn_steps=steps, lr_warmup_steps=0),
        turns,
        inputs.train,
        inputs.collate,
        [],
        scratch,
    )
    projections = {mlp["name"]: mlp["projections"] for mlp in turns.shared["patched"]}
    with trainer.timer.watching(model, projections):
        trainer.train()
    return trainer.rows[settings.untimed_steps :]
