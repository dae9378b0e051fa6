"""Do the tensor sketches equal their definitions, and do they embed subspaces as well as theory says?"""

import pytest
import torch
from torch import Tensor

from hf_subquad.theory import TensorSketch, TensorSRHT
from hf_subquad.theory.tensor_sketches import walsh_hadamard

SKETCHES = [TensorSketch, TensorSRHT]
D1, D2 = 24, 40
F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sparse_rows(rows: int, width: int, seed: int) -> Tensor:
    """About a fifth of the entries are not zero, as in features and in factors of the Jacobian."""
    drawn = generator(seed)
    values = torch.rand(rows, width, generator=drawn, dtype=F64)
    return values * (torch.rand(rows, width, generator=drawn) < 0.2)


def kronecker(h: Tensor, b: Tensor) -> Tensor:
    """Rows h_i (x) b_i, formed."""
    return (h[:, :, None] * b[:, None, :]).flatten(1)


def sketched(kind: type, size: int, seed: int, h: Tensor, b: Tensor) -> Tensor:
    sketch = kind.draw(h.shape[1], b.shape[1], size, generator(seed), h)
    return sketch.join(sketch.left(h), sketch.right(b))


def hadamard(width: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=F64)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


@pytest.mark.parametrize(("width", "size"), [(1, 1), (8, 8), (11, 16), (16, 16)])
def test_walsh_hadamard_is_the_matrix_product(width: int, size: int) -> None:
    x = torch.randn(3, width, dtype=F64)
    torch.testing.assert_close(walsh_hadamard(x), x @ hadamard(size)[:width])


def test_tensor_sketch_adds_each_product_of_coordinates_to_one_bucket() -> None:
    h, b = torch.randn(2, D1, dtype=F64), torch.randn(2, D2, dtype=F64)
    size = 7
    sketch = TensorSketch.draw(D1, D2, size, generator(0), h)
    bucket = (sketch.first.bucket[:, None] + sketch.second.bucket[None, :]).flatten() % size
    sign = (sketch.first.sign[:, None] * sketch.second.sign[None, :]).flatten()
    expected = torch.zeros(2, size, dtype=F64).index_add_(1, bucket, kronecker(h, b) * sign)
    torch.testing.assert_close(sketch.join(sketch.left(h), sketch.right(b)), expected)


def test_tensor_srht_samples_the_hadamard_transform_of_the_kronecker_product() -> None:
    h, b = torch.randn(2, D1, dtype=F64), torch.randn(2, D2, dtype=F64)
    size = 9
    sketch = TensorSRHT.draw(D1, D2, size, generator(0), h)
    left, right = (h * sketch.signs[0]) @ hadamard(32)[:D1], (b * sketch.signs[1]) @ hadamard(64)[:D2]
    entries = sketch.entries[0] * 64 + sketch.entries[1]
    torch.testing.assert_close(
        sketch.join(sketch.left(h), sketch.right(b)), kronecker(left, right)[:, entries] / size**0.5
    )


@pytest.mark.parametrize("kind", SKETCHES)
def test_inner_products_are_kept_in_expectation(kind: type) -> None:
    h, b = sparse_rows(2, D1, 1), sparse_rows(2, D2, 2)
    exact = kronecker(h, b)
    exact = exact[0] @ exact[1]
    draws = torch.stack([(s := sketched(kind, 16, seed, h, b))[0] @ s[1] for seed in range(1000)])
    error = draws.std() / len(draws) ** 0.5
    assert exact > 10 * error  # else the next line would say nothing
    assert abs(draws.mean() - exact) < 4 * error


@pytest.mark.parametrize("kind", SKETCHES)
def test_subspace_embedding_error_over_many_draws(kind: type) -> None:
    """The sketch of orthonormal rows, those of a Jacobian whitened, has a Gram matrix I + E.

    The mean of ||E||_F^2 is at most 11 n^2 / s, the bound of Avron, Nguyen and Woodruff (2014) for TensorSketch, which
    TensorSRHT meets here too. At s = 64 n, in 95% of the draws the sketch changes no vector of the span by more than
    half of its length: singular values of the sketched Jacobian are within that of the exact ones.
    """
    n = 8
    h, b = sparse_rows(n, D1, 3), sparse_rows(n, D2, 4)
    values, vectors = torch.linalg.eigh(kronecker(h, b) @ kronecker(h, b).t())
    whitening = vectors / values.sqrt()
    for size in (64, 512):
        errors, spectra = [], []
        for seed in range(100):
            rows = whitening.t() @ sketched(kind, size, seed, h, b)
            embedded = rows @ rows.t()
            errors.append((embedded - torch.eye(n, dtype=F64)).square().sum())
            spectra.append(torch.linalg.eigvalsh(embedded).sqrt())
        assert torch.stack(errors).mean() <= 11 * n**2 / size
    spectra = torch.stack(spectra)
    within = ((spectra > 0.5) & (spectra < 1.5)).all(1).double().mean()
    assert within >= 0.95
