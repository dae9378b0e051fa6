"""Is the low-rank sketch as good as it can be, repeatable, and kept current without the weights?"""

import pytest
import torch
from torch import Tensor

from hf_subquad.index.sketch import Sketch, add_low_rank, build_sketch


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


def test_basis_is_orthonormal() -> None:
    basis = build_sketch(decaying(70, 30), 9, seed=0).basis
    torch.testing.assert_close(basis @ basis.t(), torch.eye(9), rtol=0, atol=1e-5)


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


def test_adding_equals_sketching_the_sum_of_low_rank_matrices() -> None:
    weight, left, right = low_rank(60, 25, 3), torch.randn(60, 2), torch.randn(2, 25)
    added = add_low_rank(build_sketch(weight, 5, seed=0), left, right)
    assert (added.codes.shape, added.basis.shape) == ((60, 5), (5, 25))
    torch.testing.assert_close(product(added), weight + left @ right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        product(added), product(build_sketch(weight + left @ right, 5, seed=0)), rtol=1e-4, atol=1e-4
    )


def test_adding_keeps_the_best_of_what_does_not_fit() -> None:
    """Recompression to rank r is the best rank-r approximation of sketch + update."""
    sketch, left, right = build_sketch(decaying(80, 30), 6, seed=0), torch.randn(80, 4) * 0.1, torch.randn(4, 30) * 0.1
    whole = product(sketch) + left @ right
    added = add_low_rank(sketch, left, right)
    assert (product(added) - whole).norm() <= 1.001 * torch.linalg.svdvals(whole)[6:].norm() + 1e-5


def test_adding_many_times_does_not_drift() -> None:
    generator = torch.Generator().manual_seed(0)
    whole = low_rank(60, 12, 12)
    sketch = build_sketch(whole, 12, seed=0)
    for _ in range(50):
        left, right = (torch.randn(*shape, generator=generator) * 0.1 for shape in ((60, 2), (2, 12)))
        sketch, whole = add_low_rank(sketch, left, right), whole + left @ right
    torch.testing.assert_close(product(sketch), whole, rtol=1e-3, atol=1e-3)
