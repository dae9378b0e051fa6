"""Does a lazily updated matrix stay equal to one that is updated at once?"""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_subquad import ConfigError
from hf_subquad.theory import LazyMatrix
from hf_subquad.theory.lazy_matrix import sparse_product

ROWS, COLUMNS, BUDGET = 13, 9, 6
CLOSE = {"rtol": 0.0, "atol": 1e-11}  # sums of at most 500 rank-8 products of standard normal numbers


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(budget: int = BUDGET) -> tuple[LazyMatrix, Tensor]:
    weight = random(ROWS, COLUMNS, seed=0)
    return LazyMatrix(weight.clone(), budget), weight


def waiting() -> tuple[LazyMatrix, Tensor, Tensor]:
    """A matrix with an update that waits, the sum of both, and the update's right factor."""
    lazy, dense = pair()
    left, right = random(ROWS, 2, seed=1), random(2, COLUMNS, seed=2)
    lazy.append(left, right)
    return lazy, dense + left @ right, right


def run(operations: list[tuple[str, int]]) -> LazyMatrix:
    """Apply (name, number) operations to a lazy and a dense matrix, comparing all that can be asked after each."""
    lazy, dense = pair()
    shared = [random(ROWS, rank, seed=100 + rank) for rank in (1, 2, 3)]
    for step, (name, number) in enumerate(operations):
        rank = number % 8 + 1  # some are over the budget by themselves
        if name == "new":
            left, right = random(ROWS, rank, seed=step), random(rank, COLUMNS, seed=step + 1)
        elif name == "shared":
            left = shared[number % 3]
            right = random(left.shape[1], COLUMNS, seed=step)
        if name in ("new", "shared"):
            lazy.append(left, right)
            dense = dense + left @ right
        elif name == "merge":
            lazy.merge()
        assert lazy.pending_rank <= BUDGET
        x = random(3, ROWS, seed=step) * (random(3, ROWS, seed=step + 1) > 0.5)
        index = torch.tensor([number % ROWS, 0, number % ROWS])
        torch.testing.assert_close(lazy.apply_to(x), x @ dense, **CLOSE)
        torch.testing.assert_close(lazy.rows(index), dense[index], **CLOSE)
    torch.testing.assert_close(lazy.state_dict()["weight"], dense, **CLOSE)
    return lazy


@given(st.lists(st.tuples(st.sampled_from(["new", "shared", "merge"]), st.integers(0, 100)), max_size=30))
@settings(max_examples=60, deadline=None)
def test_equals_dense_accumulation(operations: list[tuple[str, int]]) -> None:
    run(operations)


def test_equals_dense_accumulation_over_a_long_run() -> None:
    draw = torch.Generator().manual_seed(3)
    numbers = torch.randint(101, (500,), generator=draw).tolist()
    lazy = run([("merge" if number % 17 == 0 else "new" if number % 2 else "shared", number) for number in numbers])
    assert lazy.merges > 50


def test_updates_with_one_left_factor_never_spend_the_budget() -> None:
    lazy, dense = pair()
    left = random(ROWS, 4, seed=1)
    for step in range(200):
        right = random(4, COLUMNS, seed=step)
        lazy.append(left, right)
        dense = dense + left @ right
    assert (lazy.pending_rank, lazy.merges) == (4, 0)
    torch.testing.assert_close(lazy.rows(torch.arange(ROWS)), dense, **CLOSE)


def test_keeps_no_hold_on_the_right_factor() -> None:
    lazy, expected, right = waiting()
    right.zero_()
    torch.testing.assert_close(lazy.rows(torch.arange(ROWS)), expected, **CLOSE)


def test_merges_only_when_an_update_no_longer_fits() -> None:
    lazy, _ = pair()
    before = lazy.weight.clone()
    for seed in (1, 2, 3):
        lazy.append(random(ROWS, 2, seed=seed), random(2, COLUMNS, seed=seed + 10))
    assert lazy.pending_rank == 6 and torch.equal(lazy.weight, before)
    lazy.append(random(ROWS, 1, seed=4), random(1, COLUMNS, seed=14))
    assert (lazy.pending_rank, lazy.merges) == (1, 1) and not torch.equal(lazy.weight, before)


def test_saves_one_plain_matrix_and_loading_drops_what_waited() -> None:
    lazy, _, _ = waiting()
    now = lazy.rows(torch.arange(ROWS))
    buffer = io.BytesIO()
    torch.save(lazy.state_dict(), buffer)
    buffer.seek(0)
    other, _ = pair()
    other.append(random(ROWS, 1, seed=5), random(1, COLUMNS, seed=6))
    state = torch.load(buffer)
    assert list(state) == ["weight"]
    other.load_state_dict(state)
    # Saved, the update is summed in another order: of up to 3 terms (its rank, and the base), each rounded once.
    rounding = 3 * torch.finfo(now.dtype).eps * now.abs().max().item()
    torch.testing.assert_close(other.rows(torch.arange(ROWS)), now, rtol=0, atol=rounding)


def test_a_load_that_fails_keeps_what_waits() -> None:
    lazy, expected, _ = waiting()
    with pytest.raises(RuntimeError, match="size mismatch"):
        lazy.load_state_dict({"weight": torch.zeros(2, 2)})
    torch.testing.assert_close(lazy.rows(torch.arange(ROWS)), expected, **CLOSE)


def test_a_cast_takes_what_waits_along() -> None:
    lazy, expected, _ = waiting()
    lazy.float()
    torch.testing.assert_close(lazy.rows(torch.arange(ROWS)), expected.float())


@pytest.mark.parametrize(
    ("left", "right"), [((ROWS, 2), (3, COLUMNS)), ((ROWS + 1, 2), (2, COLUMNS)), ((ROWS, 2), (2, COLUMNS - 1)),
                        ((ROWS,), (1, COLUMNS))],
)  # fmt: skip
def test_factors_that_do_not_fit_are_refused(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    lazy, dense = pair()
    with pytest.raises(ConfigError, match=r"must be \[13, q\] and \[q, 9\]"):
        lazy.append(torch.zeros(left, dtype=torch.float64), torch.zeros(right, dtype=torch.float64))
    assert torch.equal(lazy.rows(torch.arange(ROWS)), dense)


def test_sparse_product_takes_rows_without_and_with_all_entries() -> None:
    weight = random(ROWS, COLUMNS, seed=0)
    x = random(5, ROWS, seed=1)
    x[1], x[3], x[2, ::2] = 0, 0, 0
    torch.testing.assert_close(sparse_product(x, weight), x @ weight, **CLOSE)
    assert sparse_product(x[:0], weight).shape == (0, COLUMNS)
    assert torch.equal(sparse_product(torch.zeros(2, ROWS).double(), weight), torch.zeros(2, COLUMNS).double())
