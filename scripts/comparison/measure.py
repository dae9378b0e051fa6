"""Trains by one method and measures it: a Trainer whose steps are timed."""

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from .apart import OnProgress
from .settings import RunSettings


def full_run(settings: RunSettings, report: OnProgress) -> dict[str, Any]:
    """All of the training: losses, memory, set-up.

    Returns:
        steps: one row a step: step, seconds, tokens, train_loss.
        evaluations: one row an evaluation, the first before training: step, eval_loss (dense, mean over tokens).
        setup_seconds: patching, and what callbacks did before the first step.
        logs: what the method's callbacks logged, by step.
        digest: of all token ids trained on, in order.
        peak_memory_bytes: over the steps; `memory_before_model_bytes` of it are Python and its libraries.
        eval_loss_dense, eval_loss_sparse: at the end; None where there is none.
        patched: of each patched MLP name, projections, neurons, and its budget at the end: neurons for predicted and
            for context tokens, and the precision of the gradient that passes back.
        plan: the plan that was made, as JSON text; None if there was none.
    """
    return _train(settings, report)


def turn(argument: tuple[RunSettings, Mapping[str, Any]], report: OnProgress) -> dict[str, Any]:
    """A few steps, to be timed: `argument` is the settings and, by name, the projections of the MLPs to time.

    Returns:
        steps: one row a timed step.
        profile: one row a step in which MLPs were timed too: seconds, mlp_seconds.
        peak_memory_bytes: over all steps.
        digest: of the token ids.
    """
    settings, mlps = argument
    result = _train(settings, report, mlps)
    profiled = settings.untimed_steps + settings.turn_steps
    return {
        "steps": result["steps"][settings.untimed_steps : profiled],
        "profile": result["steps"][profiled:],
        "peak_memory_bytes": result["peak_memory_bytes"],
        "digest": result["digest"],
    }


def expected_memory(settings: RunSettings, report: OnProgress) -> dict[str, int]:
    """See inputs.py."""
    _prepare(settings)
    from .inputs import expected_memory

    return expected_memory(settings)


def _prepare(settings: RunSettings) -> None:
    """This process: its threads, where the recipes lie, and what it does not print."""
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))
    import datasets
    import torch
    import transformers

    torch.set_num_threads(settings.threads)
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _train(settings: RunSettings, report: OnProgress, mlps: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """With `mlps` a turn, which is neither evaluated nor saved."""
    _prepare(settings)
    import transformers
    from methods import apply_method

    from hf_subquad import SubquadConfig, save_merged, sparse_forward
    from hf_subquad.training.callback import PLAN_NAME

    from .inputs import load_inputs
    from .memory import resident_bytes
    from .timed_trainer import TimedTrainer

    memory_before = resident_bytes()
    transformers.set_seed(settings.seed)
    inputs = load_inputs(settings)
    use_cache = inputs.model.config.use_cache
    common = {"rank": settings.rank, "alpha": settings.alpha, "seed": settings.seed}
    start = time.perf_counter()
    model, callbacks = apply_method(
        inputs.model, settings.method, rank=settings.rank, alpha=settings.alpha, rest=settings.rest,
        subquad=SubquadConfig.from_dict(common | settings.subquad), plan=settings.plan,
    )  # fmt: skip
    patching_seconds = time.perf_counter() - start
    transformers.set_seed(settings.seed)  # whatever the method drew from the random state

    loss_of = _evaluator(inputs, settings) if inputs.evaluation and mlps is None else None
    with tempfile.TemporaryDirectory() as folder:
        trainer = TimedTrainer(model, settings, inputs.train, inputs.collate, callbacks, folder, loss_of, report, mlps)
        trainer.train()
        plan = Path(folder, PLAN_NAME)  # the callback writes it
        result: dict[str, Any] = {
            "steps": trainer.steps,
            "evaluations": trainer.evaluations,
            "setup_seconds": patching_seconds + trainer.setup_seconds,
            "logs": trainer.logs,
            "digest": trainer.digest.hexdigest()[:16],
            "peak_memory_bytes": trainer.memory.bytes,
            "memory_before_model_bytes": memory_before,
            "trained_parameters": sum(w.numel() for w in model.parameters() if w.requires_grad),
            "total_parameters": sum(w.numel() for w in model.parameters()),
            "eval_loss_dense": trainer.evaluations[-1]["eval_loss"] if loss_of else None,
            "eval_loss_sparse": None,
            "patched": _patched(model) if settings.method == "subquad" else [],
            "plan": plan.read_text(encoding="utf-8") if plan.is_file() else None,
        }
    if loss_of and settings.method == "subquad":
        result["eval_loss_sparse"] = loss_of(model, sparse_forward)
    if mlps is None and settings.save_to and inputs.tokenizer is not None:
        model.config.use_cache = use_cache
        save_merged(model, settings.save_to)
        inputs.tokenizer.save_pretrained(settings.save_to)
    return result


def _patched(model: Any) -> list[dict[str, Any]]:
    from hf_subquad import sparse_mlps

    found = []
    for mlp in sparse_mlps(model):
        neurons, budget = mlp.index.neurons, mlp.budget
        found.append(
            {
                "name": mlp.name,
                "projections": [f"{mlp.name}.{path}".lstrip(".") for path in mlp.sources],
                "neurons": neurons,
                "predicted": neurons if budget.predicted is None else mlp.index.round_up_k(budget.predicted),
                "context": neurons if budget.context is None else mlp.index.round_up_k(budget.context),
                "gradient": budget.gradient,
            }
        )
    return found


def _evaluator(inputs: Any, settings: RunSettings) -> Callable[..., float]:
    """Function of a model: its mean loss (nats) over all held-out tokens that carry loss, with the dense forward.
    Its second argument may be `sparse_forward`."""
    import torch
    from lm_data import NO_LOSS
    from torch.utils.data import DataLoader

    from hf_subquad import dense_forward

    @torch.no_grad()
    def loss_of(model: Any, forward: Callable[[Any], Any] = dense_forward) -> float:
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
