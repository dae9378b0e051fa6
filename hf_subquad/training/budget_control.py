"""Checks budgets on current tokens, and adjusts them: another number of neurons, or all of them."""

import math
from dataclasses import dataclass, replace
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor

from ..index.selection_quality import evaluate_selection
from ..layers.budget import TokenClass
from ..layers.sparse_mlp import SparseMLP
from ..plan import LayerPlan
from ..planning.measured_token_class import neuron_counts

# Live tiles are few and vary; a budget changes only when its error leaves this corridor around the planned one.
_PAST = 1.4
_COMFORTABLE = 0.7
_NEGLIGIBLE = 0.01  # error: less is not asked for


@dataclass(frozen=True)
class Audit:
    """How well the chosen neurons represent their tiles.

    Attributes:
        recall: share of the truly most important neurons that were chosen.
        error: norm of what is missing from the MLP's output, divided by the norm of what all neurons add; NaN if that
            is not finite.
    """

    recall: float
    error: float


@dataclass(frozen=True)
class BudgetChange:
    """From now on an MLP computes `after` neurons instead of `before`, for the given reason.

    Attributes:
        after: number of neurons; all of them mean that the MLP runs dense.
        token_class: the tokens for which this holds.
    """

    name: str
    before: int
    after: int
    reason: str
    token_class: TokenClass = "predicted"

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.after} neurons for {self.token_class} tokens: {self.reason}"


def audit(mlp: SparseMLP, token_class: TokenClass, tile_tokens: Tensor, neurons: Tensor) -> Audit:
    """Audit the neurons [n, k] chosen for tiles of tokens [n, T, d] of one class."""
    truth = evaluate_selection(mlp.index, tile_tokens, neurons)
    correction = mlp.corrections.get(token_class)
    missed = truth.missed if correction is None else truth.missed - correction(tile_tokens.float())
    size = torch.linalg.vector_norm(truth.whole).item()
    if not math.isfinite(size):
        return Audit(truth.recall, math.nan)
    return Audit(truth.recall, torch.linalg.vector_norm(missed).item() / size if size else 0.0)


def audit_live(mlp: SparseMLP) -> dict[TokenClass, Audit]:
    """Audit the tiles that an MLP kept from its last batch, by class. Classes for which no rank kept tiles, or with
    outputs that are not finite, are left out. All ranks get the same result."""
    found: dict[TokenClass, Audit] = {}
    for token_class in get_args(TokenClass):
        if not mlp.budget.neurons(token_class):  # of no neurons there is nothing to choose, of all nothing is skipped
            continue
        kept = mlp.audited.get(token_class)
        agreed = _agreed(audit(mlp, token_class, *kept) if kept else None, mlp)
        if agreed and math.isfinite(agreed.error):
            found[token_class] = agreed
    return found


def review(mlp: SparseMLP, planned: LayerPlan, token_class: TokenClass, seen: Audit) -> BudgetChange | None:
    """Change an MLP's budget if the measured error is far from the planned one. Every rank decides the same."""
    before = mlp.budget.neurons(token_class)
    if not before:
        return None
    aim = max(planned.error if token_class == "predicted" else planned.context_error, _NEGLIGIBLE)
    if seen.error > _PAST * aim:
        after, remedy = _brought_back(mlp, token_class, before, aim)
        reason = f"error {seen.error:.3f} is above the planned {aim:.3f}; {remedy}"
    elif seen.error < _COMFORTABLE * aim:
        after = max((k for k in neuron_counts(mlp.index.neurons) if k < before), default=before)  # one step at a time
        if after == before or not (error := _error(mlp, token_class, after)) <= aim:
            return None
        reason = f"error {seen.error:.3f} is well within the planned {aim:.3f}; {after} neurons bring {error:.3f}"
    else:
        return None
    shared = mlp.budget.predicted == mlp.budget.context  # then classes share their tiles, and continue to
    classes = get_args(TokenClass) if shared else (token_class,)
    mlp.set_budget(replace(mlp.budget, **dict.fromkeys(classes, after)))
    return BudgetChange(mlp.name, before, after, reason, token_class)


def _brought_back(mlp: SparseMLP, token_class: TokenClass, before: int, aim: float) -> tuple[int, str]:
    """The least number of neurons whose error is that aimed at, and what it took."""
    for k in neuron_counts(mlp.index.neurons):
        if before < k and (error := _error(mlp, token_class, k)) <= aim:
            return k, f"{k} neurons bring {error:.3f}"
    return mlp.index.neurons, "only all neurons bring it back"


def _error(mlp: SparseMLP, token_class: TokenClass, k: int) -> float:
    """Output error with k neurons on the tiles that were kept."""
    kept = mlp.audited.get(token_class)
    found = audit(mlp, token_class, kept[0], mlp.index.choose(kept[0], k)) if kept else None
    agreed = _agreed(found, mlp)
    assert agreed is not None, "no rank kept tiles"
    return agreed.error


def _agreed(local: Audit | None, mlp: SparseMLP) -> Audit | None:
    """The mean over the ranks that have an audit. Ranks without one (LayerDrop) must call this, too."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return local
    values = (local.recall, local.error, 1.0) if local else (0.0, 0.0, 0.0)
    shared = torch.tensor(values, dtype=torch.float64, device=mlp.output.weight.device)
    dist.all_reduce(shared)
    recall, error, ranks = shared.tolist()
    return Audit(recall / ranks, error / ranks) if ranks else None
