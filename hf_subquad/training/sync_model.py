"""Keeps the index, the base weights and the low-rank updates of a patched model in sync with training."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.utils import logging

from ..errors import InactivePatchError, WeightsError
from ..layers.batch_hook import watch_batches
from ..layers.patched_mlps import frozen_with_the_rest, patched_parts, settle_shards
from ..layers.shared_state import Runtime
from ..layers.sparse_mlp import SparseMLP, current_forward
from ..weights.projection_with_update import NeuronProjection
from .budget_control import Audit, BudgetChange, audit_live, review

_IDLE_STEPS = 5  # from the start: all layers may be dropped in one of them, not in so many

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class SyncReport:
    """What one `sync_model` call did and measured.

    Attributes:
        step: optimizer steps done.
        active_share: share of all token-neuron products that the forward computes, for the classes of the latest
            batch; mean over the patched MLPs; 1.0 in a dense step.
        recall: share of the truly most important neurons that the index chose, as last measured; None before the first
            audit.
        error: relative output error of the sparse MLPs, as last measured; None before the first audit.
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
        """Frobenius norm of all current updates s U V together, computed when it is read; under FSDP2 by all ranks."""
        return torch.stack([p.update.norm_squared() for m in self._mlps for p in m.projections]).sum().sqrt().item()

    def metrics(self) -> dict[str, float]:
        """The metrics for logs, under 'subquad/...'; recall and error only once they are measured."""
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
    """Do what is due after optimizer step `step`: fold, audit tiles of the current batch, adjust planned budgets,
    refresh the index, and decide whether the next step runs dense.

    In a custom loop, call it with step 0 before the first step, then after each optimizer step, as `SubquadCallback`
    does. A second call for the same step repeats nothing. With several processes, all ranks must call it.

    Args:
        optimizer: its moments for factors are reset after a fold, and after other weights were loaded.

    Raises:
        NotPatchedError: the model is not patched.
        InactivePatchError: at step 0, as `check_active`.
        WeightsError: base weights that something else changed, or updates that are due to be folded, hold NaN or
            infinite values; no base weight is changed.
    """
    started = time.perf_counter()
    runtime, mlps = patched_parts(model)
    config = runtime.config
    watch_batches(model, runtime)  # PEFT may have wrapped it after the patch
    if step == 0:
        check_active(model, optimizer)
        runtime.idle_steps = None  # until `SubquadCallback` says that a Trainer trains
    if step != runtime.synced_step:
        _count_idle_step(runtime, mlps)
    settle_shards(runtime, mlps)
    runtime.padding.check(runtime.surroundings.model)
    runtime.passes.forget()
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
        runtime.folded = True
        for mlp in mlps:
            mlp.index.fold()
            for projection in mlp.projections:
                projection.moments_are_stale = True
    if optimizer is not None:
        _restart_stale_moments(mlps, optimizer)
    recall, error = (runtime.last_report.recall, runtime.last_report.error) if runtime.last_report else (None, None)
    changes: list[BudgetChange] = []
    if _due(step, config.refresh_steps) and not already:
        audits, changes = _review(mlps, runtime)
        if audits:
            recall = sum(audit.recall for audit in audits) / len(audits)
            error = sum(audit.error for audit in audits) / len(audits)
    for mlp in mlps:
        mlp.auditing = _due(step + 1, config.refresh_steps)
    active = sum(mlp.work_share() for mlp in mlps) / len(mlps)
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
    """Check that training will use the patch.

    Raises:
        NotPatchedError: the model is not patched.
        InactivePatchError: something replaced or bypassed a part of it; the message says what.
    """
    runtime, mlps = patched_parts(model)
    for mlp in mlps:
        for path, projection in zip(mlp.sources, mlp.projections, strict=True):
            if mlp.parent.get_submodule(path) is not projection:
                raise InactivePatchError(
                    f"{mlp.name}.{path} was replaced after patch_model (by PEFT?): exclude the patched projections "
                    "from whatever replaces modules, such as PEFT's target_modules"
                )
            _check_base(f"{mlp.name}.{path}", projection)
        if current_forward(mlp.parent) is not mlp.parent_forward:
            raise InactivePatchError(
                f"the forward of {mlp.name} ({type(mlp.parent).__name__}) was rebound after patch_model (Liger?): "
                "turn off use_liger_kernel, or its kernels for MLPs, or patch after what rebinds it"
            )
    runtime.surroundings.find_adapter()
    kept_frozen = all(projection.kept_frozen for _, projection in named_projections(mlps))
    if frozen_with_the_rest(model, mlps) and not kept_frozen:
        raise InactivePatchError(
            f"the low-rank updates of {mlps[0].name} and all others are frozen (get_peft_model freezes all but its "
            "own parameters): set requires_grad on those whose names end with update.U and update.V before you create "
            "the optimizer, as SubquadCallback does for the Trainer's model (not for model_init), and calibrate and "
            "compensate for one with PEFT"
        )
    if optimizer is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        left_out = [
            f"{name}.update"
            for name, projection in named_projections(mlps)
            if any(id(p) not in held for p in projection.update.parameters() if p.requires_grad)
        ]
        if left_out:
            raise InactivePatchError(
                f"the optimizer does not hold {len(left_out)} of the low-rank updates ({left_out[0]}.U and .V, ...): "
                "it was made before patch_model, or its parameter groups leave out names that end with update.U and "
                "update.V"
            )


def frozen_updates(mlps: list[SparseMLP]) -> list[str]:
    """Names of the MLPs with a frozen update."""
    return [mlp.name for mlp in mlps if not all(factor.requires_grad for factor in _factors([mlp]))]


def named_projections(mlps: Sequence[SparseMLP]) -> Iterator[tuple[str, NeuronProjection]]:
    """The patched projections of MLPs, with their names in the bare model."""
    for mlp in mlps:
        for path, projection in zip(mlp.sources, mlp.projections, strict=True):
            yield f"{mlp.name}.{path}", projection


@torch.enable_grad()  # in which training runs
def _count_idle_step(runtime: Runtime, mlps: list[SparseMLP]) -> None:
    """Warn if no MLP ran sparse in any of the first steps of a Trainer, as then nothing is saved."""
    if runtime.idle_steps is None or all(mlp.dense for mlp in mlps) or runtime.mode(training=True) != "sparse":
        return
    runtime.idle_steps += 1
    if runtime.idle_steps == _IDLE_STEPS:
        logger.warning(
            f"no patched MLP ran sparse in the first {_IDLE_STEPS} training steps, so they saved nothing: does the "
            "Trainer train the model that was patched, in training mode, on inputs that reach the patched layers?"
        )


def _restart_stale_moments(mlps: list[SparseMLP], optimizer: torch.optim.Optimizer) -> None:
    """Reset the optimizer's state, step counts included, for updates that a fold or other weights have restarted."""
    for name in ("optimizer", "optim"):  # inside accelerate's wrapper, and of ZeroRedundancyOptimizer this rank's part
        inner = getattr(optimizer, name, None)
        optimizer = inner if isinstance(inner, torch.optim.Optimizer) else optimizer
    for _, projection in named_projections(mlps):
        if projection.moments_are_stale:
            for factor in projection.update.parameters():
                optimizer.state.pop(factor, None)
            projection.moments_are_stale = False


def _review(mlps: list[SparseMLP], runtime: Runtime) -> tuple[list[Audit], list[BudgetChange]]:
    """Audit the tiles that MLPs kept of the last batch, adjust planned budgets accordingly, and refresh indices."""
    audits, changes = [], []
    planned = runtime.plan.layers if runtime.plan else (None,) * len(mlps)
    for mlp, layer in zip(mlps, planned, strict=True):
        with mlp.index.gathered():
            for token_class, audit in audit_live(mlp).items():
                audits.append(audit)
                if layer is not None and (change := review(mlp, layer, token_class, audit)):
                    changes.append(change)
            mlp.index.refresh()
        mlp.audited = {}
    if runtime.plan:
        runtime.plan = runtime.plan.with_neurons([mlp.budget.counts(mlp.index.neurons) for mlp in mlps])
    return audits, changes


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
        with mlp.index.gathered():
            for name, projection in named_projections([mlp]):
                norms = torch.cat([projection.update.norm_squared().view(1), projection.row_norms()])
                if not torch.isfinite(norms).all():
                    raise WeightsError(
                        f"the weight of {name}, with its low-rank update, holds NaN or infinite values at step {step}, "
                        "so updates are not folded: training has diverged. Continue from an earlier checkpoint, with a "
                        "lower learning rate or with gradient clipping"
                    )


def _factors(mlps: Sequence[SparseMLP]) -> list[nn.Parameter]:
    return [factor for _, projection in named_projections(mlps) for factor in projection.update.parameters()]


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _due_share(step: int, share: float) -> bool:
    """Whether a step is among a share of the steps, spread evenly from the first on: the last of a round number of
    steps, whose batch is audited, is not."""
    return math.ceil(step * share - 1e-9) > math.ceil((step - 1) * share - 1e-9)
