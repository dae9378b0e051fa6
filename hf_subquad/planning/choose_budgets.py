"""Chooses the budgets of a model's MLPs: as fast as possible within the tolerance on a held-out batch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..layers.budget import Budget, TokenClass
from ..logs import get_logger
from .allocation import Option, allocate, undominated
from .fidelity import DenseReference, Fidelity
from .measured_mlp import GRADIENT_SHARES, MeasuredMLP, only
from .tolerance import Limits
from .why_dense import why_dense

_BANDS = 3  # of layers, with a price each
_UNMEASURED = 0.5  # times the price of the next band: measured ones were 0.16 to 4.6 times, half of them 0.6 to 2
_ROUNDS = 5
_FIRST_ALLOWANCE = 0.65  # the effects of several MLPs add up to 1.1 to 2.6 times their sum
_AIM = 0.95  # of what may be lost, to be used
_AIM_FROM_BEYOND = 0.85  # budgets move in steps: a round that is beyond again costs more than what stays unused
_AIM_BEYOND_AGAIN = 0.5  # after a second such round: few predictions make the effect of a small step uncertain
_CLOSE_ENOUGH = 0.8  # of it
_WORTHWHILE = 0.98  # of the exact time: where less is saved, nothing is approximated
_FAST_ENOUGH = 1.06  # times what a plan beyond the limits takes: another round would gain a part of that, in the MLPs
_USUAL_NOISE = 0.8  # of sampled rows over 1 - gradient share, measured on SmolLM2-135M
_LIKELY_ENOUGH = 0.9  # of the allowed noise: a share that is expected to add more is not measured
_GROWTH, _SHRINKING = 3.0, 10.0  # of the allowance between two rounds, at most
_NOTICEABLE = 1e-3  # of what may be lost: less may be rounding

logger = get_logger(__name__)

EXACT = Fidelity(divergence=0.0, cosine=1.0, gradient_error=0.0)


@dataclass(frozen=True)
class Choice:
    """Attributes:
    options: one for each MLP.
    fidelity: with all of them, and the whole gradient.
    noise: expected squared error of the sampled gradient, as a share of the squared gradient.
    reasons: for each MLP, why it computes all neurons for all tokens; empty if it does not.
    """

    options: list[Option]
    fidelity: Fidelity
    noise: float
    reasons: list[str]


def choose(measured: Sequence[MeasuredMLP], reference: DenseReference, tolerance: float) -> Choice:
    """Options that together are as fast as possible within the tolerance; exact ones if that saves less than 2%."""
    limits = Limits.of(tolerance)

    def run(budgets: Sequence[Budget]) -> Fidelity:
        for one, budget in zip(measured, budgets, strict=True):
            one.run_with(budget)
        return reference.fidelity()

    def noise_of(share: float) -> float:
        return run([Budget(gradient=share)] * len(measured)).gradient_error ** 2

    def judge(budgets: Sequence[Budget]) -> Fidelity:
        changed = next((i for i, budget in enumerate(budgets) if not budget.all_neurons), len(measured))
        # Each layer after the first one that changes adds about as much.
        found = run([replace(budget, gradient=1.0) for budget in budgets])
        return found.beyond(rounding, 1 - changed / len(measured))

    def spent(budgets: Sequence[Budget]) -> float:
        return limits.spent(judge(budgets))

    share, noise = _gradient_share(noise_of, limits.noise)
    rounding = _rounding(measured, reference)
    options = _PricedOptions(measured, share, spent, max(_NOTICEABLE, limits.spent(rounding) / 2))
    best = exact = [Option(Budget(), one.ms(Budget()), 0.0) for one in measured]
    best_found, allowance, aim = EXACT, _FIRST_ALLOWANCE, _AIM_FROM_BEYOND
    # The closest to the limits from either side: an allowance, and the share of the limits that it uses.
    within: tuple[float, float] = (0.0, 0.0)
    beyond: tuple[float, float] | None = None
    least = 0.0  # milliseconds of the plan beyond them
    known: dict[tuple[Budget, ...], Fidelity] = {}
    for _ in range(_ROUNDS):
        chosen = options.allocate(allowance)
        budgets = tuple(option.budget for option in chosen)
        if budgets not in known:
            found = known[budgets] = judge(budgets)
            logger.info(
                f"planning: budgets with which MLPs take {_milliseconds(chosen):.0f} ms "
                f"{'are within' if limits.spent(found) <= 1 else 'exceed'} the tolerance, at a divergence of "
                f"{found.divergence:.4f} nats and a gradient cosine of {found.cosine:.4f}"
            )
        found = known[budgets]
        used = limits.spent(found)
        if used <= 1:
            within = allowance, used
            if _milliseconds(chosen) <= _milliseconds(best):
                best, best_found = chosen, found
            fastest = all(option is of_mlp[0] for option, of_mlp in zip(chosen, options.of_mlps, strict=True))
            if fastest or used >= _CLOSE_ENOUGH:
                break
        else:
            aim = _AIM_FROM_BEYOND if beyond is None else _AIM_BEYOND_AGAIN
            beyond, least = (allowance, used), _milliseconds(chosen)
        if _milliseconds(best) <= _FAST_ENOUGH * least:
            break
        allowance = _next_allowance(within, beyond, aim)
    if all(option.budget.exact for option in best):  # what costs nothing is left, as context of the last layer does
        free = options.allocate(0.0)
        if not all(option.budget.exact for option in free):
            found = judge([option.budget for option in free])
            if limits.spent(found) <= 1:
                best, best_found = free, found
    little_gained = _milliseconds(best) > _WORTHWHILE * _milliseconds(exact)
    if little_gained:
        best, best_found = exact, EXACT
    reasons = [why_dense(option, of_mlp, little_gained) for option, of_mlp in zip(best, options.of_mlps, strict=True)]
    return Choice(best, best_found, noise if any(option.budget.gradient < 1 for option in best) else 0.0, reasons)


def _rounding(measured: Sequence[MeasuredMLP], reference: DenseReference) -> Fidelity:
    """What rounding adds to the effect of a change of the first MLP; in float32, nothing to speak of."""
    if getattr(torch, measured[0].dtype).itemsize >= 4:
        return EXACT
    for one in measured:
        one.run_with(Budget())
    return reference.rounding(measured[0].mlp.output)


def _gradient_share(noise_of: Callable[[float], float], most: float) -> tuple[float, float]:
    """The smallest share of the gradient, for all MLPs, with which sampling adds at most `most` of the squared gradient
    as noise; and that noise."""
    shares = sorted(GRADIENT_SHARES)
    likely = next((share for share in shares if _USUAL_NOISE * (1 - share) <= most), shares[-1])
    probed = noise_of(likely)
    for share in shares:
        # Noise is about in proportion to 1 - share.
        if share != likely and probed * (1 - share) / (1 - likely) > _LIKELY_ENOUGH * most:
            continue
        found = probed if share == likely else noise_of(share)
        if found <= most:
            return share, found
    return 1.0, 0.0


def _next_allowance(within: tuple[float, float], beyond: tuple[float, float] | None, from_beyond: float) -> float:
    """The allowance that may use `_AIM` of the limits: interpolated between logarithms, or in proportion.

    Args:
        from_beyond: what is aimed at instead, if none that uses a noticeable share is known to be within the limits.
    """
    low, little = within
    if beyond is None:
        return low * (min(_GROWTH, _AIM / little) if little else _GROWTH)
    high, much = beyond
    if little < _NOTICEABLE:
        return max(high * max(1 / _SHRINKING, from_beyond / much), math.sqrt(low * high))
    return low * (high / low) ** (math.log(_AIM / little) / math.log(much / little))


class _PricedOptions:
    """The options of each MLP. The cost of one is the share of the limits that it is expected to use: the MLP's forward
    cost, times the price of its band of layers.

    A pass that reduces the budgets of one band alone measures its price. This is done for the last band at once, and
    for another one when a plan first skips neurons there. Until then, its price is taken to be less than that of the
    nearest measured band after it.

    Args:
        spent: the share of the limits that budgets use.
        noticeable: the least of it that is not rounding.

    Attributes:
        of_mlps: for each MLP, the undominated options.
    """

    of_mlps: list[list[Option]]

    def __init__(
        self,
        measured: Sequence[MeasuredMLP],
        share: float,
        spent: Callable[[Sequence[Budget]], float],
        noticeable: float,
    ) -> None:
        self._measured, self._share, self._spent, self._noticeable = measured, share, spent, noticeable
        size = -(-len(measured) // _BANDS)
        self._band = [i // size for i in range(len(measured))]
        self._prices: dict[int, float] = {}
        self._measure(self._band[-1])

    def allocate(self, allowance: float) -> list[Option]:
        """One option for each MLP, as fast as possible, whose costs sum to at most `allowance`."""
        while True:
            chosen = allocate(self.of_mlps, allowance)
            unknown = {
                band
                for band, one, option in zip(self._band, self._measured, chosen, strict=True)
                if band not in self._prices and one.forward_cost(option.budget)
            }
            if not unknown:
                return chosen
            self._measure(max(unknown))

    def _measure(self, band: int) -> None:
        """Measure a band's price, with fewer and fewer neurons until the effect is noticeable. (Context tokens of the
        last layer have none, say.)"""
        self._prices[band] = 0.0
        layers = list(zip(self._band, self._measured, strict=True))
        for probe_of in _PROBES:
            probe = [probe_of(one) if of == band else Budget() for of, one in layers]
            total = sum(one.forward_cost(budget) for one, budget in zip(self._measured, probe, strict=True))
            if total > 0 and (lost := self._spent(probe)) > self._noticeable:
                self._prices[band] = lost / total
                break
        self.of_mlps = [
            undominated(
                [
                    Option(budget, one.ms(budget), price * one.forward_cost(budget))
                    for budget in one.budgets(self._share)
                ]
            )
            for one, price in ((one, self._price(of)) for of, one in layers)
        ]

    def _price(self, band: int) -> float:
        if band in self._prices:
            return self._prices[band]
        return _UNMEASURED * self._prices[min(after for after in self._prices if after > band)]


def _middle(measured: MeasuredMLP) -> Budget:
    """Half of the neurons, of context tokens if there are any."""
    name: TokenClass = "context" if "context" in measured.classes else "predicted"
    ks = [k for k in measured.classes[name].ks if k]
    return only(name, ks[len(ks) // 2]) if ks else Budget()


def _half(measured: MeasuredMLP) -> Budget:
    """Half of the neurons, of all tokens."""
    return Budget(**{name: one.ks[len(one.ks) // 2] for name, one in measured.classes.items()})


def _least(measured: MeasuredMLP) -> Budget:
    """The fewest neurons, of all tokens."""
    return Budget(**{name: one.ks[0] for name, one in measured.classes.items()})


_PROBES = (_middle, _half, _least)


def _milliseconds(options: Sequence[Option]) -> float:
    return sum(option.ms for option in options)
