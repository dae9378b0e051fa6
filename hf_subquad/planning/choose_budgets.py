"""Chooses the budgets of a model's MLPs: as fast as possible within the tolerance on a held-out batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..layers.budget import Budget, TokenClass
from ..logs import get_logger
from .allocation import Option, allocate, undominated
from .fidelity import DenseReference, Fidelity
from .measured_mlp import PROBED_SHARE, MeasuredMLP, only

COSINE_PER_TOLERANCE = 10.0  # 1 - cosine of the gradient, for each unit of tolerance
DIVERGENCE_PER_TOLERANCE = 10.0  # nats: what context tokens miss shows in the divergence, but little in training
# What the backward skips costs more in training than its cosine tells, because small gradients are left out in every
# step. On SmolLM2-135M a cosine of 0.991 from it alone raised the loss by 0.8% after 30 steps, 0.971 by 1.9%.
_BACKWARD_WEIGHT = 10.0

_BANDS = 3  # of layers: an error costs the more, the more layers come after it
_ROUNDS = 5
_AIM = 0.95  # of what may be lost, to be used
_CLOSE_ENOUGH = 0.85  # of it
_GROWTH, _SHRINKING = 3.0, 10.0  # of the allowance between two rounds, at most
_NOTICEABLE = 1e-3  # of what may be lost: less may be rounding

logger = get_logger(__name__)


@dataclass(frozen=True)
class Limits:
    """How far predictions and gradient may move."""

    divergence: float
    cosine: float

    @classmethod
    def of(cls, tolerance: float) -> "Limits":
        return cls(DIVERGENCE_PER_TOLERANCE * tolerance, max(0.0, 1 - COSINE_PER_TOLERANCE * tolerance))

    def spent(self, found: Fidelity) -> float:
        """Share of the limits that is used; above 1, a limit is exceeded."""
        return max(found.divergence / self.divergence, found.lost / (1 - self.cosine**2))


def choose(
    measured: Sequence[MeasuredMLP], reference: DenseReference, tolerance: float
) -> tuple[list[Option], Fidelity]:
    """An option for each MLP, which together stay within the tolerance, and their measured fidelity."""
    limits = Limits.of(tolerance)

    def run(budgets: Sequence[Budget]) -> Fidelity:
        for one, budget in zip(measured, budgets, strict=True):
            one.run_with(budget)
        return reference.fidelity()

    def spent(budgets: Sequence[Budget]) -> float:
        return limits.spent(run(budgets))

    forward = _forward_prices(measured, spent)
    probe = [Budget(gradient=PROBED_SHARE)] * len(measured)
    backward = _BACKWARD_WEIGHT * _price(measured, MeasuredMLP.backward_cost, probe, spent)
    options = [
        undominated(
            [Option(b, one.ms(b), price * one.forward_cost(b) + backward * one.backward_cost(b)) for b in one.budgets()]
        )
        for one, price in zip(measured, forward, strict=True)
    ]
    best = [Option(Budget(), one.ms(Budget()), 0.0) for one in measured]
    best_found, allowance = Fidelity(0.0, 1.0, 0.0), 1.0
    # The closest to the limits from either side: an allowance, and the share of the limits that it uses.
    within: tuple[float, float] = (0.0, 0.0)
    beyond: tuple[float, float] | None = None
    known: dict[tuple[Budget, ...], Fidelity] = {}
    for _ in range(_ROUNDS):
        chosen = allocate(options, allowance)
        budgets = tuple(option.budget for option in chosen)
        found = known[budgets] = known.get(budgets) or run(budgets)
        skipped = sum(one.backward_cost(option.budget) for one, option in zip(measured, chosen, strict=True))
        used = max(limits.spent(found), backward * skipped)
        logger.info(
            f"planning: with the budgets of this round MLPs take {_milliseconds(chosen):.0f} ms, at a divergence of "
            f"{found.divergence:.4f} nats and a gradient cosine of {found.cosine:.4f}"
        )
        if used <= 1 and _milliseconds(chosen) <= _milliseconds(best):
            best, best_found = chosen, found
        fastest = all(option is of_mlp[0] for option, of_mlp in zip(chosen, options, strict=True))
        if used <= 1 and (fastest or used >= _CLOSE_ENOUGH):
            break
        if used <= 1:
            within = allowance, used
        else:
            beyond = allowance, used
        allowance = _next_allowance(within, beyond)
    if all(option.budget.exact for option in best):  # what costs nothing is left, as context of the last layer does
        free = allocate(options, 0.0)
        found = run([option.budget for option in free])
        if limits.spent(found) <= 1:
            best, best_found = free, found
    return best, best_found


def _next_allowance(within: tuple[float, float], beyond: tuple[float, float] | None) -> float:
    """The allowance that may use `_AIM` of the limits: interpolated between logarithms, or in proportion."""
    low, little = within
    if beyond is None:
        return low * (min(_GROWTH, _AIM / little) if little else _GROWTH)
    high, much = beyond
    if little < _NOTICEABLE:
        return max(high * max(1 / _SHRINKING, _AIM / much), math.sqrt(low * high))
    return low * (high / low) ** (math.log(_AIM / little) / math.log(much / little))


def _forward_prices(measured: Sequence[MeasuredMLP], spent: Callable[[Sequence[Budget]], float]) -> list[float]:
    """For each MLP, the share of the limits that a unit of forward cost uses: measured for each band of layers alone,
    with fewer and fewer neurons until the effect is noticeable. (Context tokens of the last layer have none, say.)"""
    prices = [0.0] * len(measured)
    size = -(-len(measured) // _BANDS)
    for start in range(0, len(measured), size):
        band = range(start, min(start + size, len(measured)))
        price = 0.0
        for probe_of in _PROBES:
            probe = [probe_of(one) if i in band else Budget() for i, one in enumerate(measured)]
            total = sum(one.forward_cost(budget) for one, budget in zip(measured, probe, strict=True))
            if total > 0 and (lost := spent(probe)) > _NOTICEABLE:
                price = lost / total
                break
        for i in band:
            prices[i] = price
    return prices


def _price(
    measured: Sequence[MeasuredMLP],
    cost: Callable[[MeasuredMLP, Budget], float],
    budgets: Sequence[Budget],
    spent: Callable[[Sequence[Budget]], float],
) -> float:
    """The share of the limits that a unit of a cost uses, measured by running with some budgets."""
    total = sum(cost(one, budget) for one, budget in zip(measured, budgets, strict=True))
    return spent(budgets) / total if total > 0 else 0.0


def _middle(measured: MeasuredMLP) -> Budget:
    """Half of the neurons, of context tokens if there are any."""
    name: TokenClass = "context" if "context" in measured.classes else "predicted"
    ks = [k for k in measured.classes[name].ks if k]
    return only(name, ks[len(ks) // 2]) if ks else Budget()


def _half(measured: MeasuredMLP) -> Budget:
    """Half of the neurons, of all tokens."""
    return Budget(**{name: one.ks[len(one.ks) // 2] for name, one in measured.classes.items() if one.ks})


def _least(measured: MeasuredMLP) -> Budget:
    """The fewest neurons, of all tokens."""
    return Budget(**{name: one.ks[0] for name, one in measured.classes.items() if one.ks})


_PROBES = (_middle, _half, _least)


def _milliseconds(options: Sequence[Option]) -> float:
    return sum(option.ms for option in options)
