"""Whether budgets still serve the live tokens, and which of them change: the sketch first, then k, then dense."""

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..index.selection_quality import evaluate_selection
from ..layers.sparse_mlp import SparseMLP
from ..plan import LayerPlan
from ..planning.allocation import budgets

# Live tiles are few and vary; a budget changes only when its error leaves this corridor around the planned one.
_PAST = 1.4
_COMFORTABLE = 0.7
_NEGLIGIBLE = 0.01  # error: less is not asked for


@dataclass(frozen=True)
class Audit:
    """How well chosen neurons serve their tiles.

    Attributes:
        recall: share of the truly most important neurons that were chosen.
        error: norm of what is missing from the MLP's output, over the norm of what all neurons add; NaN if that is
            not finite.
    """

    recall: float
    error: float


@dataclass(frozen=True)
class BudgetChange:
    """An MLP computes `after` neurons a tile in place of `before` from now on (all of them: dense), and why."""

    name: str
    before: int
    after: int
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.after} neurons: {self.reason}"


def audit(mlp: SparseMLP, tile_tokens: Tensor, neurons: Tensor) -> Audit:
    """Audit a selection: tokens [n, T, d] of tiles, and the neurons chosen for each, int64 [n, k]."""
    truth = evaluate_selection(mlp.index, tile_tokens, neurons)
    missed = truth.missed if mlp.compensation is None else truth.missed - mlp.compensation(tile_tokens.float())
    size = torch.linalg.vector_norm(truth.whole).item()
    if not math.isfinite(size):
        return Audit(truth.recall, math.nan)
    return Audit(truth.recall, torch.linalg.vector_norm(missed).item() / size if size else 0.0)


def audit_live(mlp: SparseMLP) -> Audit | None:
    """Audit the tiles that an MLP kept of its last batch; None if no rank kept any, or their outputs are not finite:
    they say nothing about budgets then. All ranks get the same."""
    agreed = _agreed(audit(mlp, *mlp.audited) if mlp.audited else None, mlp)
    return agreed if agreed and math.isfinite(agreed.error) else None


def review(mlp: SparseMLP, planned: LayerPlan, seen: Audit) -> BudgetChange | None:
    """Change an MLP's budget if what was measured has left its plan. Every rank decides the same."""
    if mlp.dense:
        return None
    if planned.error < _NEGLIGIBLE:
        planned = replace(planned, error=_NEGLIGIBLE)
    if seen.error > _PAST * planned.error:
        return _give_more(mlp, planned, seen.error)
    if seen.error < _COMFORTABLE * planned.error:
        return _give_back(mlp, planned, seen.error)
    return None


def _give_more(mlp: SparseMLP, planned: LayerPlan, found: float) -> BudgetChange | None:
    past = f"error {found:.3f} is past the planned {planned.error:.3f}"
    if mlp.index.sketch_is_approximate:
        mlp.index.build()
        error = _error(mlp, mlp.k)
        if error <= _PAST * planned.error:
            return BudgetChange(mlp.name, mlp.k, mlp.k, f"{past}; the sketch rebuilt after folds brings {error:.3f}")
    before = mlp.k
    for k in budgets(mlp.index.neurons):
        if before < k < planned.break_even and (error := _error(mlp, k)) <= planned.error:
            mlp.set_active(k)
            return BudgetChange(mlp.name, before, k, f"{past}; {k} neurons bring {error:.3f}")
    mlp.set_active(mlp.index.neurons)
    return BudgetChange(mlp.name, before, mlp.index.neurons, f"{past}; what would mend it is no faster than dense")


def _give_back(mlp: SparseMLP, planned: LayerPlan, found: float) -> BudgetChange | None:
    """One step down at a time."""
    less = max((k for k in budgets(mlp.index.neurons) if k < mlp.k), default=None)
    if less is None or not (error := _error(mlp, less)) <= planned.error:
        return None
    before = mlp.k
    mlp.set_active(less)
    reason = f"error {found:.3f} is well within the planned {planned.error:.3f}; {less} neurons bring {error:.3f}"
    return BudgetChange(mlp.name, before, less, reason)


def _error(mlp: SparseMLP, k: int) -> float:
    """Output error with k neurons on the tiles that were kept."""
    tokens = mlp.audited[0] if mlp.audited else None
    agreed = _agreed(None if tokens is None else audit(mlp, tokens, mlp.index.choose(tokens, k)), mlp)
    assert agreed is not None, "no rank kept tiles"
    return agreed.error


def _agreed(local: Audit | None, mlp: SparseMLP) -> Audit | None:
    """The mean over the ranks that have an audit. One that has none, its layer dropped (LayerDrop), takes part."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return local
    values = (local.recall, local.error, 1.0) if local else (0.0, 0.0, 0.0)
    shared = torch.tensor(values, dtype=torch.float64, device=mlp.output.weight.device)
    dist.all_reduce(shared)
    recall, error, ranks = shared.tolist()
    return Audit(recall / ranks, error / ranks) if ranks else None
