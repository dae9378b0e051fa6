"""Keep the index, the base weights and the low-rank updates of a patched model in step with training."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import InactivePatchError
from .layers import SparseMLP, current_forward
from .patching import require_patched, runtime_of


@dataclass(frozen=True)
class SyncReport:
    """What one `sync_model` call did and saw.

    Attributes:
        step: optimizer steps done.
        active_share: neurons computed / neurons of the patched MLPs, in the coming step; 1.0 while dense.
        recall: share of the truly most important neurons that the index chose, as last measured; None before.
        update_norm: Frobenius norm of all live updates s U V together (0-dim tensor).
        sync_seconds: seconds spent in `sync_model` since the patch.
        folded: the updates were folded into the base weights.
    """

    step: int
    active_share: float
    recall: float | None
    update_norm: Tensor
    sync_seconds: float
    folded: bool

    def metrics(self) -> dict[str, float]:
        """The figures for logs, under 'subquad/...'; recall only once it was measured."""
        figures = {
            "subquad/active_share": self.active_share,
            "subquad/update_norm": self.update_norm.item(),
            "subquad/sync_seconds": self.sync_seconds,
        }
        return figures if self.recall is None else {**figures, "subquad/recall": self.recall}


@torch.no_grad()
def sync_model(model: nn.Module, step: int, optimizer: torch.optim.Optimizer | None = None) -> SyncReport:
    """Do what is due after optimizer step `step`: end the dense warm-up, fold, measure recall, refresh the index.

    All that `SubquadCallback` does in training; call it with step 0 before the first step of a custom loop, then
    after each optimizer step. What is due at a step is done once, also if it is called again for that step.

    Args:
        optimizer: whose moments restart with the factors after a fold.

    Raises:
        NotPatchedError: the model is not patched.
        InactivePatchError: the updates were frozen after the patch.
    """
    started = time.perf_counter()
    mlps = require_patched(model)
    runtime = runtime_of(model)
    config = runtime.config
    _check_trainable(mlps)
    runtime.warming_up = step < config.dense_steps
    already = step == runtime.synced_step  # training resumed from there, or a second call: what was due is done
    runtime.synced_step = step
    folded = _due(step, config.fold_steps) and not already
    if folded:
        for mlp in mlps:
            mlp.index.fold()
        if optimizer is not None:
            restart_moments(mlps, optimizer)
    recall = runtime.last_report.recall if runtime.last_report else None
    if _due(step, config.refresh_steps) and not already:
        recall = _measure_recall(mlps, recall)
        for mlp in mlps:
            mlp.index.refresh()
    for mlp in mlps:
        mlp.auditing = _due(step + 1, config.refresh_steps)
    norms_squared = torch.stack([p.update.norm_squared() for m in mlps for p in m.projections])
    runtime.sync_seconds += time.perf_counter() - started
    runtime.last_report = SyncReport(
        step=step,
        active_share=1.0 if runtime.warming_up else sum(m.k for m in mlps) / sum(m.index.neurons for m in mlps),
        recall=recall,
        update_norm=norms_squared.sum().sqrt(),
        sync_seconds=runtime.sync_seconds,
        folded=folded,
    )
    return runtime.last_report


def check_active(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Make sure that training will go through the patch.

    Raises:
        NotPatchedError: the model is not patched.
        InactivePatchError: something replaced or bypassed a part of it; the message names what.
    """
    mlps = require_patched(model)
    for mlp in mlps:
        for path, projection in zip(mlp.sources, mlp.projections, strict=True):
            if mlp.parent.get_submodule(path) is not projection:
                raise InactivePatchError(
                    f"{mlp.name}.{path} was replaced after patch_model (by PEFT?): leave the patched projections out "
                    "of what replaces modules, or out of target_modules"
                )
        if current_forward(mlp.parent) is not mlp.parent_forward:
            raise InactivePatchError(
                f"the forward of {mlp.name} ({type(mlp.parent).__name__}) was rebound after patch_model (Liger?): "
                "turn off use_liger_kernel, or patch after what rebinds it"
            )
    _check_trainable(mlps)
    if optimizer is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(factor) not in held for mlp in mlps for factor in _factors(mlp)):
            raise InactivePatchError(
                "the optimizer does not hold the low-rank updates: call patch_model before the optimizer is made"
            )


def train_updates(model: nn.Module) -> None:
    """Make the low-rank updates trainable again, after PEFT froze all that is not its own."""
    for mlp in require_patched(model):
        for factor in _factors(mlp):
            factor.requires_grad_(True)


def restart_moments(mlps: list[SparseMLP], optimizer: torch.optim.Optimizer) -> None:
    """Zero the optimizer's state of the low-rank updates, step counts included."""
    for mlp in mlps:
        for factor in _factors(mlp):
            for value in optimizer.state.get(factor, {}).values():
                if isinstance(value, Tensor):
                    value.zero_()


def _measure_recall(mlps: list[SparseMLP], before: float | None) -> float | None:
    """Mean recall over the MLPs that kept audit tokens; `before` if none did (no sparse step since)."""
    config = mlps[0].runtime.config
    recalls = []
    for mlp in mlps:
        if mlp.audit is not None:
            recalls.append(mlp.index.recall(mlp.audit, mlp.k, config.tile_size, config.tile_order))
            mlp.audit = None
    return sum(recalls) / len(recalls) if recalls else before


def _check_trainable(mlps: list[SparseMLP]) -> None:
    for mlp in mlps:
        if not all(factor.requires_grad for factor in _factors(mlp)):
            raise InactivePatchError(
                f"the low-rank updates of {mlp.name} are frozen (get_peft_model freezes all but its own): "
                "call patch_model after get_peft_model, or pass SubquadCallback to the Trainer, which thaws them"
            )


def _factors(mlp: SparseMLP) -> list[nn.Parameter]:
    return [factor for projection in mlp.projections for factor in projection.update.parameters()]


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
