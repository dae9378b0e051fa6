"""Keep the index, the base weights and the low-rank updates of a patched model in step with training."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import InactivePatchError, WeightsError
from ..layers.lookup import patched_parts, require_patched
from ..layers.runtime import Runtime
from ..layers.sparse_mlp import SparseMLP, current_forward
from ..weights.projection import NeuronProjection
from .budget_control import Audit, BudgetChange, audit_live, review


@dataclass(frozen=True)
class SyncReport:
    """What one `sync_model` call did and saw.

    Attributes:
        step: optimizer steps done.
        active_share: neurons computed / neurons of the patched MLPs, in the coming step; 1.0 while dense.
        recall: share of the truly most important neurons that the index chose, as last measured; None before.
        error: relative output error of the sparse MLPs, as last measured; None before.
        sync_seconds: seconds spent in `sync_model` since the patch.
        folded: the updates were folded into the base weights.
        changes: budgets that changed.
    """

    step: int
    active_share: float
    recall: float | None
    error: float | None
    sync_seconds: float
    folded: bool
    changes: tuple[BudgetChange, ...]
    _mlps: Sequence[SparseMLP] = field(repr=False, compare=False)

    @property
    @torch.no_grad()
    def update_norm(self) -> float:
        """Frobenius norm of all live updates s U V together, when it is read."""
        return torch.stack([p.update.norm_squared() for m in self._mlps for p in m.projections]).sum().sqrt().item()

    def metrics(self) -> dict[str, float]:
        """The figures for logs, under 'subquad/...'; recall and error only once they were measured."""
        figures = {
            "subquad/active_share": self.active_share,
            "subquad/update_norm": self.update_norm,
            "subquad/sync_seconds": self.sync_seconds,
            "subquad/recall": self.recall,
            "subquad/output_error": self.error,
        }
        return {name: value for name, value in figures.items() if value is not None}


@torch.no_grad()
def sync_model(model: nn.Module, step: int, optimizer: torch.optim.Optimizer | None = None) -> SyncReport:
    """Do what is due after optimizer step `step`: fold, audit the live tiles, adjust budgets to the plan, refresh the
    index, and say whether the coming step runs dense.

    All that `SubquadCallback` does in training; call it with step 0 before the first step of a custom loop, then
    after each optimizer step. What is due at a step is done once, also if it is called again for that step.

    Args:
        optimizer: whose moments restart with the factors after a fold.

    Raises:
        NotPatchedError: the model is not patched.
        InactivePatchError: the updates were frozen after the patch.
        WeightsError: base weights that were changed from outside, or updates that are due to be folded, hold NaN or
            infinite values; no base weight is changed.
    """
    started = time.perf_counter()
    runtime, mlps = patched_parts(model)
    config = runtime.config
    _check_trainable(mlps)
    for mlp in mlps:
        mlp.forget_call()
        mlp.index.rebuild_if_stale()
    runtime.dense_step = _due_share(step + 1, config.dense_share)
    already = step == runtime.synced_step  # training resumed from there, or a second call: what was due is done
    folded = _due(step, config.fold_steps) and not already
    if folded:
        _check_finite(mlps, step)
    runtime.synced_step = step
    if folded:
        for mlp in mlps:
            mlp.index.fold()
        if optimizer is not None:
            restart_moments(mlps, optimizer)
    recall, error = (runtime.last_report.recall, runtime.last_report.error) if runtime.last_report else (None, None)
    changes: list[BudgetChange] = []
    if _due(step, config.refresh_steps) and not already:
        audits, changes = _review(mlps, runtime)
        if audits:
            recall = sum(audit.recall for audit in audits) / len(audits)
            error = sum(audit.error for audit in audits) / len(audits)
        for mlp in mlps:
            mlp.index.refresh()
    for mlp in mlps:
        mlp.auditing = _due(step + 1, config.refresh_steps)
    active = sum(mlp.active for mlp in mlps) / sum(mlp.index.neurons for mlp in mlps)
    runtime.sync_seconds += time.perf_counter() - started
    runtime.last_report = SyncReport(
        step=step,
        active_share=1.0 if runtime.dense_step else active,
        recall=recall,
        error=error,
        sync_seconds=runtime.sync_seconds,
        folded=folded,
        changes=tuple(changes),
        _mlps=mlps,
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
            _check_base(f"{mlp.name}.{path}", projection)
        if current_forward(mlp.parent) is not mlp.parent_forward:
            raise InactivePatchError(
                f"the forward of {mlp.name} ({type(mlp.parent).__name__}) was rebound after patch_model (Liger?): "
                "turn off use_liger_kernel, or its kernels for MLPs, or patch after what rebinds it"
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
    """Drop the optimizer's state of the low-rank updates, step counts of any kind included: it starts them anew."""
    for mlp in mlps:
        for factor in _factors(mlp):
            optimizer.state.pop(factor, None)


def _review(mlps: list[SparseMLP], runtime: Runtime) -> tuple[list[Audit], list[BudgetChange]]:
    """Audit the tiles that MLPs kept of the last batch, and adjust planned budgets to what they show."""
    audits, changes = [], []
    planned = runtime.plan.layers if runtime.plan else (None,) * len(mlps)
    for mlp, layer in zip(mlps, planned, strict=True):
        audit = audit_live(mlp)
        if audit is not None:
            audits.append(audit)
            if layer is not None and (change := review(mlp, layer, audit)):
                changes.append(change)
        mlp.audited = None
    if runtime.plan:
        runtime.plan = runtime.plan.with_active([mlp.active for mlp in mlps])
    return audits, changes


def _check_trainable(mlps: list[SparseMLP]) -> None:
    for mlp in mlps:
        if not all(p.update.U.requires_grad and p.update.V.requires_grad for p in mlp.projections):
            raise InactivePatchError(
                f"the low-rank updates of {mlp.name} are frozen (get_peft_model freezes all but its own): "
                "call patch_model after get_peft_model, or give the Trainer the model (not model_init) and "
                "SubquadCallback, which thaws them"
            )


def _check_base(name: str, projection: NeuronProjection) -> None:
    if "weight" not in projection._parameters:
        raise InactivePatchError(
            f"the weight of {name} is no parameter any more (pruning, weight_norm or a parametrization after "
            "patch_model?), so folds would be lost: make it permanent before patch_model"
        )
    if projection.weight.requires_grad or (projection.bias is not None and projection.bias.requires_grad):
        raise InactivePatchError(
            f"weight or bias of {name} was made trainable after patch_model (requires_grad_(True)? PEFT's "
            "bias='all'?), but sparse steps have no gradients for it: freeze it again, or call patch_model after that"
        )


def _check_finite(mlps: list[SparseMLP], step: int) -> None:
    for mlp in mlps:
        for path, projection in zip(mlp.sources, mlp.projections, strict=True):
            if not torch.isfinite(projection.update.norm_squared()):
                raise WeightsError(
                    f"the low-rank update of {mlp.name}.{path} holds NaN or infinite values at step {step}, so it is "
                    "not folded into the base weights: training has diverged. Go on from an earlier checkpoint, with a "
                    "lower learning rate or with gradient clipping"
                )


def _factors(mlp: SparseMLP) -> list[nn.Parameter]:
    return [factor for projection in mlp.projections for factor in projection.update.parameters()]


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _due_share(step: int, share: float) -> bool:
    """Whether a step is among a share of the steps, spread evenly from the first on: the last of a round number of
    steps, whose batch is audited, is not."""
    return math.ceil(step * share - 1e-9) > math.ceil((step - 1) * share - 1e-9)
