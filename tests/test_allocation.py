"""Is a budget of loss spent where it buys most time?"""

import itertools
import math
import random
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_subquad.layers.budget import Budget
from hf_subquad.planning import choose_budgets
from hf_subquad.planning.allocation import Option, allocate, undominated
from hf_subquad.planning.measured_token_class import neuron_counts

TIMES = st.floats(0.1, 100)
LOSSES = st.one_of(st.just(0.0), st.floats(1e-6, 10))
SPARSE = st.lists(st.tuples(TIMES, LOSSES), max_size=4)
INSTANCES = st.lists(st.tuples(TIMES, SPARSE), min_size=1, max_size=4)
BUDGETS = st.one_of(st.just(0.0), st.floats(1e-7, 20))


def option(k: int, ms: float, cost: float) -> Option:
    return Option(Budget(k, k), ms, cost)


def active(options: Sequence[Option]) -> list[int | None]:
    return [option.budget.predicted for option in options]


def made(instance: Sequence[tuple[float, Sequence[tuple[float, float]]]]) -> list[list[Option]]:
    """Options of MLPs of 100 neurons: some sparse ones, and dense."""
    return [
        [option(10 + number, ms, loss) for number, (ms, loss) in enumerate(sparse)] + [option(100, dense, 0.0)]
        for dense, sparse in instance
    ]


def ms(options: Sequence[Option]) -> float:
    return math.fsum(option.ms for option in options)


def loss(options: Sequence[Option]) -> float:
    return math.fsum(option.cost for option in options)


def within(options: Sequence[Option], budget: float) -> bool:
    return loss(options) <= budget * (1 + 1e-9)


def brute_force(options: Sequence[Sequence[Option]], budget: float) -> float:
    return min(ms(chosen) for chosen in itertools.product(*options) if within(chosen, budget))


def realistic(count: int, seed: int) -> list[list[Option]]:
    """MLPs of one shape whose losses fall with k, some of them a hundred times as sensitive as others."""
    rng = random.Random(seed)
    options = []
    for _ in range(count):
        sensitivity, power = 10 ** rng.uniform(-3, -1), rng.uniform(0.5, 2)
        sparse = [
            option(k, 20 + 100 * k / 1024, sensitivity * ((1024 / k) ** power - 1) * rng.uniform(0.98, 1.02))
            for k in neuron_counts(1024)
        ]
        options.append([*sparse, option(1024, 120.0, 0.0)])
    return options


@pytest.mark.parametrize("neurons", [1, 5, 8, 9, 16, 52, 100, 1536, 8192, 11008])
def test_neuron_counts_are_possible_and_what_gemms_like(neurons: int) -> None:
    ks = neuron_counts(neurons)
    assert all(0 < k < neurons and k % 8 == 0 for k in ks)
    assert ks == sorted(set(ks))


def test_neuron_counts_reach_from_a_sixteenth_in_small_steps() -> None:
    ks = neuron_counts(8192)
    assert ks[0] == 512 and ks[-1] == 0.75 * 8192
    assert all(1.3 < following / k <= 2 for k, following in itertools.pairwise(ks))
    assert {1024, 2048, 4096} < set(ks)


@settings(max_examples=150, deadline=None)
@given(INSTANCES, BUDGETS)
def test_one_option_of_each_within_the_budget(instance, budget: float) -> None:
    options = made(instance)
    chosen = allocate(options, budget)
    assert len(chosen) == len(options)
    assert all(option in of_layer for option, of_layer in zip(chosen, options, strict=True))
    assert within(chosen, budget)


@settings(max_examples=150, deadline=None)
@given(INSTANCES, BUDGETS)
def test_nothing_that_saves_time_is_left_to_buy(instance, budget: float) -> None:
    options = made(instance)
    chosen = allocate(options, budget)
    for number, of_layer in enumerate(options):
        for option in of_layer:
            other = [*chosen[:number], option, *chosen[number + 1 :]]
            assert ms(other) >= ms(chosen) or loss(other) > budget * (1 - 1e-9)


@settings(max_examples=300, deadline=None)
@given(INSTANCES, BUDGETS)
@example([(10.0, [(2.0, 1.0), (1.9, 3.0)])] * 4, 3.5)
def test_at_most_one_mlp_behind_the_optimum(instance, budget: float) -> None:
    """Of a relaxation of the knapsack, only one item is ever split: that is all that rounding it can cost."""
    options = made(instance)
    split = max(of_layer[-1].ms - min(option.ms for option in of_layer) for of_layer in options)
    assert ms(allocate(options, budget)) <= brute_force(options, budget) + max(split, 0.0) + 1e-6


@settings(max_examples=100, deadline=None)
@given(st.tuples(TIMES, SPARSE), BUDGETS)
def test_one_mlp_gets_the_best_option(layer, budget: float) -> None:
    options = made([layer])
    assert ms(allocate(options, budget)) == pytest.approx(brute_force(options, budget))


@pytest.mark.parametrize("seed", range(5))
def test_close_to_brute_force(seed: int) -> None:
    """On curves as they are measured: within a tenth of the time that the best choice saves."""
    options = [of_layer[::2] for of_layer in realistic(4, seed)]
    for budget in (0.003, 0.03, 0.3):
        best, dense = brute_force(options, budget), 4 * 120.0
        assert ms(allocate(options, budget)) <= best + 0.1 * (dense - best) + 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_no_uniform_choice_is_better(seed: int) -> None:
    """At the loss of any one k for all, MLPs that compete are at least as fast, mostly much faster."""
    options = realistic(24, seed)
    gains = []
    for number in range(len(options[0])):
        uniform = [of_layer[number] for of_layer in options]
        chosen = allocate(options, loss(uniform) * (1 + 1e-9))
        assert ms(chosen) <= ms(uniform) + 1e-6
        gains.append(ms(uniform) / ms(chosen))
    assert max(gains) > 1.2


@pytest.mark.parametrize("count", [2, 7, 24])
def test_equal_mlps(count: int) -> None:
    """At a price where all of them change at once, the budget goes to the change that buys most for its loss.

    Here as many as can take the good option (80 ms for a nat) should, not one the slightly faster dear one.
    """
    options = [[option(8, 19.0, 5.0), option(16, 20.0, 1.0), option(100, 100.0, 0.0)] for _ in range(count)]
    affordable = count // 2
    chosen = allocate(options, float(affordable) + 0.5)
    assert sorted(active(chosen)) == [16] * affordable + [100] * (count - affordable)


def test_no_budget_takes_what_is_free() -> None:
    """Which is dense, or a sparse option without loss; the fastest of them."""
    options = [
        [option(8, 1.0, 0.1), option(100, 9.0, 0.0)],
        [option(8, 1.0, 0.0), option(16, 2.0, 0.0), option(100, 9.0, 0.0)],
        [option(8, 12.0, 0.0), option(100, 9.0, 0.0)],
        [option(8, 1.0, 1e-9), option(100, 9.0, 0.0)],
    ]
    assert active(allocate(options, 0.0)) == [100, 8, 100, 100]


def test_an_unbounded_budget_takes_the_fastest() -> None:
    options = [*realistic(5, 0), [option(8, 130.0, 0.001), option(1024, 120.0, 0.0)]]
    assert active(allocate(options, 1e9)) == [64] * 5 + [1024]


def test_sensitive_mlps_get_more_neurons() -> None:
    def curve(sensitivity: float) -> list[Option]:
        sparse = [option(k, 20 + 100 * k / 1024, sensitivity * (1024 / k - 1)) for k in neuron_counts(1024)]
        return [*sparse, option(1024, 120.0, 0.0)]

    found = active(allocate([curve(s) for s in (0.001, 0.01, 0.1)], 0.05))
    assert found == sorted(found) and found[0] < found[2]


def test_a_larger_budget_is_never_slower_on_measured_curves() -> None:
    options = realistic(8, 3)
    times = [ms(allocate(options, budget)) for budget in (0.0, 0.001, 0.01, 0.1, 1.0, 10.0)]
    assert times == sorted(times, reverse=True) and times[0] > times[-1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(TIMES, LOSSES), min_size=1, max_size=12))
def test_dominated_options_are_left_out_and_no_others(values) -> None:
    options = [option(number + 1, ms, cost) for number, (ms, cost) in enumerate(values)]
    kept = undominated(options)

    def beaten(one: Option) -> bool:
        return any(
            other.ms <= one.ms and other.cost <= one.cost and (other.ms, other.cost) != (one.ms, one.cost)
            for other in options
        )

    assert {(one.ms, one.cost) for one in kept} == {(one.ms, one.cost) for one in options if not beaten(one)}
    assert [one.ms for one in kept] == sorted({one.ms for one in kept})


@settings(max_examples=100, deadline=None)
@given(INSTANCES, BUDGETS)
def test_nothing_is_lost_with_dominated_options(instance, budget: float) -> None:
    """Neither the best choice, nor that there is one."""
    options = made(instance)
    assert brute_force([undominated(of_layer) for of_layer in options], budget) == brute_force(options, budget)


@pytest.mark.parametrize("power", [0.8, 1, 2])
@pytest.mark.parametrize("limit", [0.05, 0.4, 1.3, 7, 20])
def test_the_rounds_are_enough_to_close_in_on_the_limit(power: float, limit: float) -> None:
    """Where what an allowance uses grows with a power of it, up to the limit."""
    allowance, within, beyond = 1.0, (0.0, 0.0), None
    for _ in range(choose_budgets._ROUNDS):
        used = (allowance / limit) ** power
        if choose_budgets._CLOSE_ENOUGH <= used <= 1:
            return
        within, beyond = ((allowance, used), beyond) if used <= 1 else (within, (allowance, used))
        allowance = choose_budgets._next_allowance(within, beyond, choose_budgets._AIM_FROM_BEYOND)
    pytest.fail(f"still at {used:.2f} of the limit")


def test_rounding_is_not_taken_for_use() -> None:
    """After a plan that costs nothing but rounding, and one far beyond, the next one is in between."""
    assert choose_budgets._next_allowance((1.0, 1e-6), (3.0, 1.5), 0.85) < 2


class FakeMLP:
    """An MLP whose context tokens may have 50 neurons or none, with a forward cost of `cost` or four times as much."""

    def __init__(self, cost: float) -> None:
        self.cost = cost
        self.classes = {"context": SimpleNamespace(ks=[0, 50])}

    def budgets(self, share: float) -> list[Budget]:
        return [Budget(), Budget(context=50), Budget(context=0)]

    def ms(self, budget: Budget) -> float:
        return {None: 10.0, 50: 6.0, 0: 3.0}[budget.context]

    def forward_cost(self, budget: Budget) -> float:
        return {None: 0.0, 50: self.cost, 0: 4 * self.cost}[budget.context]


def priced(costs: Sequence[float], prices: Sequence[float]) -> tuple[choose_budgets._PricedOptions, list[list[int]]]:
    """Options of MLPs with some forward costs and true prices, and the list of the MLPs that each pass reduces."""
    mlps, probes = [FakeMLP(cost) for cost in costs], []

    def spent(budgets: Sequence[Budget]) -> float:
        probes.append([i for i, budget in enumerate(budgets) if budget != Budget()])
        return sum(price * mlp.forward_cost(budget) for price, mlp, budget in zip(prices, mlps, budgets, strict=True))

    return choose_budgets._PricedOptions(mlps, 1.0, spent, 1e-3), probes


def test_prices_are_measured_where_a_plan_spends() -> None:
    options, probes = priced([100, 100, 1, 1, 1, 1], [2, 2, 0.1, 0.1, 0.3, 0.3])
    assert probes == [[4, 5]]
    options.allocate(0.0)
    assert len(probes) == 1
    chosen = options.allocate(0.25)
    assert probes == [[4, 5], [2, 3]]  # the first two are too dear at any price
    assert [option.budget.context for option in chosen] == [None, None, 50, 50, None, None]
    assert [option.cost for option in options.of_mlps[2]] == pytest.approx([0.4, 0.1, 0])
    assert [option.cost for option in options.of_mlps[4]] == pytest.approx([1.2, 0.3, 0])
    options.allocate(1000)
    assert probes == [[4, 5], [2, 3], [0, 1]]
    assert options.of_mlps[0][0].cost == pytest.approx(800)


def test_no_price_is_taken_over_from_a_band_without_effect() -> None:
    """Whose options then cost nothing, and are all that is taken of them without an allowance."""
    options, probes = priced([1] * 6, [1, 1, 1, 1, 0, 0])
    assert probes == [[4, 5]] * 3  # with fewer and fewer neurons
    chosen = options.allocate(0.0)
    assert probes[3:] == [[2, 3]]
    assert [option.budget.context for option in chosen] == [None] * 4 + [0] * 2


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_any_number_of_mlps_has_bands(count: int) -> None:
    options, probes = priced([1] * count, [0.1] * count)
    assert all(option.budget.context == 0 for option in options.allocate(100))
    assert sorted(itertools.chain(*probes)) == list(range(count))
