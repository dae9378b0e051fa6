"""Is the low-rank sketch as good as it can be, repeatable, and kept current without the weights?"""

import pytest
import torch
from torch import Tensor

from hf_subquad import CalibrationError, WeightsError
from hf_subquad.index.sketch import Sketch, build_sketch, summary_of


def low_rank(rows: int, width: int, rank: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, width, generator=generator)


def decaying(rows: int, width: int) -> Tensor:
    """Singular values 1, 1/2, 1/3, ..., about those of trained weights."""
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(rows, width, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    return (left / torch.arange(1, width + 1)) @ right


def product(sketch: Sketch) -> Tensor:
    return sketch.codes @ sketch.basis


@pytest.mark.parametrize(("rows", "width"), [(90, 31), (17, 40), (33, 33)])
def test_recovers_an_exactly_low_rank_matrix(rows: int, width: int) -> None:
    weight = low_rank(rows, width, 5)
    sketch = build_sketch(weight, 5, seed=0)
    assert (sketch.codes.shape, sketch.basis.shape) == ((rows, 5), (5, width))
    torch.testing.assert_close(product(sketch), weight, rtol=1e-4, atol=1e-4)
    assert (product(build_sketch(weight, 4, seed=0)) - weight).norm() > 0.05 * weight.norm()


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_error_is_close_to_the_best_possible(rank: int) -> None:
    weight = decaying(200, 60)
    optimal = torch.linalg.svdvals(weight)[rank:].norm()
    assert (product(build_sketch(weight, rank, seed=3)) - weight).norm() <= 1.02 * optimal


def test_full_rank_is_exact_and_more_is_not_asked() -> None:
    weight = decaying(50, 20)
    for rank in (20, 64):
        sketch = build_sketch(weight, rank, seed=0)
        assert sketch.basis.shape == (20, 20)
        torch.testing.assert_close(product(sketch), weight, rtol=1e-5, atol=1e-5)


def test_codes_are_orthonormal_and_leading_directions_come_first() -> None:
    sketch = build_sketch(decaying(70, 30), 9, seed=0)
    torch.testing.assert_close(sketch.codes.t() @ sketch.codes, torch.eye(9), rtol=0, atol=1e-5)
    sizes = sketch.basis.norm(dim=1)
    torch.testing.assert_close(sizes, 1 / torch.arange(1.0, 10.0), rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_give_float32(dtype: torch.dtype) -> None:
    weight = low_rank(40, 12, 3).to(dtype)
    sketch = build_sketch(weight, 12, seed=0)
    assert sketch.codes.dtype == sketch.basis.dtype == torch.float32
    torch.testing.assert_close(product(sketch), weight.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", [torch.zeros(20, 9), torch.ones(20, 9), torch.eye(9)])
def test_degenerate_weights(weight: Tensor) -> None:
    torch.testing.assert_close(product(build_sketch(weight, 9, seed=0)), weight, rtol=1e-4, atol=1e-5)


def test_seed_decides_and_global_randomness_is_untouched() -> None:
    weight = torch.randn(80, 40)
    state = torch.get_rng_state()
    first, second, other = (build_sketch(weight, 6, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.codes, second.codes) and torch.equal(first.basis, second.basis)
    assert not torch.equal(product(first), product(other))


# Fitted to inputs


def correlated(count: int, width: int, seed: int = 0) -> Tensor:
    """Inputs whose directions differ in size by a factor of the width, turned so that no axis is one of them."""
    generator = torch.Generator().manual_seed(7)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    values = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return (values / torch.arange(1, width + 1)) @ turn


def error(sketch: Sketch, weight: Tensor, tokens: Tensor) -> float:
    return ((product(sketch) - weight) @ tokens.t()).norm().item()


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_fit_predicts_pre_activations_about_as_well_as_any_map_of_its_rank(rank: int) -> None:
    """Held against the truncated SVD of all pre-activations, in float64 (Eckart and Young)."""
    weight, tokens = decaying(200, 60), correlated(500, 60)
    optimal = torch.linalg.svdvals(weight.double() @ tokens.double().t())[rank:].norm().item()
    assert error(build_sketch(weight, rank, 3, tokens), weight, tokens) <= 1.02 * optimal
    assert error(build_sketch(weight, rank, 3), weight, tokens) > 1.2 * optimal
    unseen = correlated(500, 60, seed=1)
    assert error(build_sketch(weight, rank, 3, tokens), weight, unseen) < error(
        build_sketch(weight, rank, 3), weight, unseen
    )


def test_a_fit_does_not_depend_on_the_size_of_the_tokens() -> None:
    weight, tokens = decaying(80, 30), correlated(100, 30)
    expected = product(build_sketch(weight, 5, 0, tokens))
    for size in (1e-12, 1e12):
        torch.testing.assert_close(product(build_sketch(weight, 5, 0, size * tokens)), expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        product(build_sketch(weight, 5, 0, tokens.bfloat16())), expected, rtol=0, atol=0.05 * expected.abs().max()
    )


@pytest.mark.parametrize("count", [0, 1, 3])
def test_few_tokens_leave_the_rest_to_the_plain_weights(count: int) -> None:
    """Their directions are met, and the others are as in a sketch of the weights but for what that takes."""
    weight, tokens = decaying(80, 30), correlated(count, 30)
    fitted, plain = build_sketch(weight, 9, 0, tokens), build_sketch(weight, 9, 0)
    assert fitted.basis.isfinite().all() and fitted.basis.shape == (9, 30)
    if count:
        assert error(fitted, weight, tokens) < 0.3 * error(plain, weight, tokens)
    fewer = build_sketch(weight, 9 - count, 0)
    assert (product(fitted) - weight).norm() <= 1.05 * (product(fewer) - weight).norm()


@pytest.mark.parametrize("tokens", [torch.zeros(40, 30), torch.ones(40, 30), torch.eye(30)[:1].expand(40, 30)])
def test_degenerate_tokens(tokens: Tensor) -> None:
    weight = decaying(80, 30)
    sketch = build_sketch(weight, 9, 0, tokens)
    assert (product(sketch) - weight).norm() <= 1.05 * torch.linalg.svdvals(weight)[8:].norm()
    torch.testing.assert_close(product(build_sketch(weight, 30, 0, tokens)), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_values_that_cannot_be_fitted_are_told(value: float) -> None:
    weight, tokens = decaying(40, 20), correlated(50, 20)
    spoiled = tokens.clone()
    spoiled[3, 4] = value
    with pytest.raises(CalibrationError, match="tokens"):
        build_sketch(weight, 5, 0, spoiled)
    weight[3, 4] = value
    for inputs in (None, tokens):
        with pytest.raises(WeightsError, match="weights"):
            build_sketch(weight, 5, 0, inputs)


def test_a_fit_is_repeatable_and_leaves_global_randomness_alone() -> None:
    weight, tokens, state = decaying(80, 30), correlated(100, 30), torch.get_rng_state()
    first, second = (build_sketch(weight, 6, 1, tokens) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.codes, second.codes) and torch.equal(first.basis, second.basis)


@pytest.mark.parametrize("rank", [3, 8])
def test_a_summary_serves_as_all_tokens_do(rank: int) -> None:
    weight, tokens = decaying(200, 60), correlated(900, 60)
    summary = summary_of(tokens, 2 * rank, 0)
    assert summary.shape == (2 * rank, 60)
    expected = error(build_sketch(weight, rank, 0, tokens), weight, tokens)
    assert error(build_sketch(weight, rank, 0, summary), weight, tokens) <= 1.03 * expected
    assert error(build_sketch(weight, rank, 0, tokens[: 2 * rank]), weight, tokens) > 1.05 * expected
    assert torch.equal(summary_of(tokens, 2 * rank, 0), summary)


@pytest.mark.parametrize("count", [1, 9, 20])
def test_a_summary_of_few_tokens_or_few_dimensions_is_exact(count: int) -> None:
    tokens = torch.randn(count, 6)
    summary = summary_of(tokens, 8, 0)
    assert len(summary) <= 8
    moment = tokens.t() @ tokens
    torch.testing.assert_close(summary.t() @ summary, 6 * moment / moment.trace(), rtol=1e-4, atol=1e-4)
