"""Chooses one option per MLP that together save the most time within an error budget. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..layers.budget import Budget


@dataclass(frozen=True)
class Option:
    """One way to run one MLP: its budget, the milliseconds it takes and what it costs in fidelity."""

    budget: Budget
    ms: float
    cost: float


def undominated(options: Sequence[Option]) -> list[Option]:
    """The Pareto-optimal options by time and cost, the fastest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.ms, option.cost)):
        if not kept or option.cost < kept[-1].cost:
            kept.append(option)
    return kept


def allocate(options: Sequence[Sequence[Option]], budget: float) -> list[Option]:
    """One option for each MLP, close to the fastest whose costs sum to at most `budget`.

    A multiple-choice knapsack, solved greedily: from the cheapest options, always the change that saves the most time
    per cost. That follows the lower convex hulls of the options, as the linear relaxation does (Sinha and Zoltners
    1979), so the result is optimal up to the part of the budget that the last change did not fit into.

    Args:
        options: for each MLP; at least one option must cost nothing.
    """
    chosen = [min(of_layer, key=lambda option: (option.cost, option.ms)) for of_layer in options]
    while better := _best_swap(options, chosen, budget):
        layer, option = better
        chosen[layer] = option
    return chosen


def _best_swap(
    options: Sequence[Sequence[Option]], chosen: Sequence[Option], budget: float
) -> tuple[int, Option] | None:
    """The change that saves the most time per cost within the budget, if any."""
    left = budget - sum(option.cost for option in chosen)
    swaps = [
        ((now.ms - option.ms) / max(option.cost - now.cost, 1e-30), layer, option)
        for layer, (of_layer, now) in enumerate(zip(options, chosen, strict=True))
        for option in of_layer
        if option.ms < now.ms and option.cost - now.cost <= left
    ]
    return max(swaps, key=lambda swap: swap[0])[1:] if swaps else None
