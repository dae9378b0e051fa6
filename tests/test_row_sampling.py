"""Rows of a gradient are sampled without bias, and with the squared error that is asked for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_subquad.ops.mlp_products import _rows_to_keep
from hf_subquad.ops.row_sampling import keep_probabilities, row_norms, sampled_weights


def weights_of(gradient: Tensor, share: float) -> Tensor:
    return sampled_weights(keep_probabilities(row_norms(gradient), share))


def rows(tokens: int, seed: int, zeros: int = 0) -> Tensor:
    """Gradient [N, 3] with norms of several orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(tokens, width, generator=generator, dtype=torch.float64) for width in (3, 1))
    direction, size = drawn
    gradient = direction * size.mul(2).exp()
    gradient[:zeros] = 0
    return gradient


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 99), st.integers(0, 3))
def test_probabilities_give_the_error_that_is_asked_for(tokens: int, share: float, seed: int, zeros: int) -> None:
    norms = row_norms(rows(tokens, seed, zeros))
    found = keep_probabilities(norms, share)
    assert ((found >= 0) & (found <= 1)).all() and not found[norms == 0].any()
    if not norms.any():
        return
    real = norms > 0
    error = (norms[real].square() * (1 / found[real] - 1)).sum() / norms.square().sum()
    assert float(error) == pytest.approx(1 - share, rel=1e-9, abs=1e-9)
    below = real & (found < 1)  # in proportion to the norm
    assert torch.allclose(
        found[below] / norms[below], (found[below] / norms[below]).amax() if below.any() else norms[:0]
    )
    assert not below.any() or norms[below].max() <= norms[real & ~below].min() if (real & ~below).any() else True


def test_the_expectation_is_the_whole_gradient() -> None:
    gradient, share, draws = rows(200, seed=3, zeros=20), 0.8, 2000
    torch.manual_seed(0)
    weights = torch.stack([weights_of(gradient, share) for _ in range(draws)])
    norms, probability = row_norms(gradient), keep_probabilities(row_norms(gradient), share)
    # The standard error of a mean of weights of 1 / p with probability p, five times.
    spread = ((1 / probability.clamp_min(1e-12) - 1).clamp_min(0) / draws).sqrt()
    assert ((weights.mean(0) - (norms > 0).double()).abs() <= 5 * spread + 1e-12).all()
    errors = ((weights.unsqueeze(-1) - 1) * gradient).square().sum((1, 2)) / gradient.square().sum()
    assert float(errors.mean()) == pytest.approx(1 - share, rel=0.1)
    kept = (weights > 0).sum(1)
    assert kept.max() - kept.min() <= 2  # one random number for all


def test_few_rows_stand_for_many() -> None:
    torch.manual_seed(0)
    gradient = rows(1000, seed=1)
    assert int((weights_of(gradient, 0.9) > 0).sum()) < 200


def test_the_whole_gradient_leaves_out_zeros_only() -> None:
    assert weights_of(rows(5, seed=0, zeros=2), 1.0).tolist() == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("share", [1.0, 0.9])
@pytest.mark.parametrize("shape", [(0, 3), (4, 3), (1, 3)])
def test_zeros_and_no_rows_at_all(shape: tuple[int, int], share: float) -> None:
    assert not weights_of(torch.zeros(shape), share).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_propagated(bad: float) -> None:
    """So that a gradient scaler sees it."""
    gradient = torch.ones(4, 2)
    gradient[2, 1] = bad
    assert weights_of(gradient, 0.9)[2] == 1


def test_half_precision() -> None:
    """Squares are summed in float32: those of float16 would overflow, or vanish."""
    for size in (300.0, 1e-4):
        gradient = torch.tensor([[size, 0], [0, size / 2], [0, 0]], dtype=torch.float16)
        assert weights_of(gradient, 1.0).tolist() == [1, 1, 0]
        assert keep_probabilities(row_norms(gradient), 0.9)[2] == 0


def test_the_same_seed_draws_the_same_rows() -> None:
    gradient = rows(50, seed=5)
    torch.manual_seed(7)
    first = weights_of(gradient, 0.7)
    torch.manual_seed(7)
    assert torch.equal(first, weights_of(gradient, 0.7))


@pytest.mark.parametrize("rows", [0, 1, 40, 999, 1000])
def test_all_rows_of_some_weight_are_kept_and_few_others(rows: int) -> None:
    weights = torch.zeros(1000).index_fill(0, torch.randperm(1000)[:rows], 0.5)
    kept = _rows_to_keep(weights)
    assert len(kept.unique()) == len(kept) <= rows * (1 + 1 / 32)
    assert weights[kept].count_nonzero() == rows


def test_rows_are_kept_in_few_different_numbers() -> None:
    """As each one costs a kernel for each product."""
    numbers = {len(_rows_to_keep((torch.arange(2000) < rows).float())) for rows in range(1000, 1500)}
    assert len(numbers) <= 20
