"""(G + damping I) z = r for the Gram matrix G of the Jacobian: by Cholesky, or by sketch-preconditioned CG."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, DivergedError
from .sample_state import MaintainedState
from .tensor_sketches import TensorSketch, TensorSRHT


class Solver(Protocol):
    def solve(self, state: MaintainedState, residual: Tensor) -> Tensor:
        """z [n, p] for the residual r [n, p]."""


class ExactGram:
    """Forms G = (H H^T) o (B B^T), o the Hadamard product, and factors it in float64: n^2 m + n^3 / 3 multiply-adds.

    Args:
        damping: added to the diagonal of G, as a share of its mean.
    """

    def __init__(self, damping: float) -> None:
        self.damping = damping

    def solve(self, state: MaintainedState, residual: Tensor) -> Tensor:
        return cholesky_solution(gram(state), self.damping, residual)


class SketchedCG:
    """Conjugate gradients, preconditioned by the Gram matrix of a sketch of the Jacobian; G is not formed.

    The sketch is drawn once, so its half for the features is computed once. An iteration of conjugate gradients costs
    n^2 m multiply-adds, forming G p^2 times as many: with one output, `ExactGram` is always the faster one.

    Args:
        kind: TensorSketch or TensorSRHT.
        size: s, entries of a sketched row; by default 4 n p.
        tolerance: of ||r - (G + damping I) z|| / ||r||.
        iterations: the most of conjugate gradients.
        seed: of the sketch.

    Attributes:
        used: iterations of the last solve.
    """

    def __init__(
        self,
        kind: type[TensorSketch] | type[TensorSRHT],
        damping: float,
        size: int | None = None,
        tolerance: float = 1e-3,
        iterations: int = 100,
        seed: int = 0,
    ) -> None:
        self.kind, self.damping, self.size = kind, damping, size
        self.tolerance, self.iterations, self.seed = tolerance, iterations, seed
        self.used = 0
        self._features: Tensor | None = None

    def solve(self, state: MaintainedState, residual: Tensor) -> Tensor:
        n, m = state.features.shape
        p = residual.shape[1]
        if self._features is not state.features:
            generator = torch.Generator().manual_seed(self.seed)
            self._sketch = self.kind.draw(m, m, self.size or 4 * n * p, generator, state.features)
            self._left = self._sketch.left(state.features).repeat_interleave(p, 0)
            self._features = state.features
        sketched = self._sketch.join(self._left, self._sketch.right(state.derivatives.flatten(0, 1)))
        sketched_gram = sketched @ sketched.t()
        damping = self.damping * gram_diagonal(state).mean()
        factor = cholesky_factor(sketched_gram, damping)
        z, self.used = conjugate_gradients(
            lambda v: gram_product(state, v.view(n, p)).flatten() + damping * v,
            lambda v: torch.cholesky_solve(v[:, None].double(), factor)[:, 0].to(v.dtype),
            residual.flatten(),
            self.tolerance,
            self.iterations,
        )
        return z.view(n, p)


def make_solver(name: str, damping: float) -> Solver:
    """'cholesky', 'tensor_sketch' or 'tensor_srht'."""
    if not damping > 0:
        raise ConfigError(f"damping must be above 0, got {damping}")
    if name == "cholesky":
        return ExactGram(damping)
    kinds = {"tensor_sketch": TensorSketch, "tensor_srht": TensorSRHT}
    if name not in kinds:
        raise ConfigError(f"solver must be one of 'cholesky', {', '.join(map(repr, kinds))}, got {name!r}")
    return SketchedCG(kinds[name], damping)


def gram(state: MaintainedState) -> Tensor:
    """G [n p, n p]: inner products of the Jacobian's rows, Kronecker products h (x) b, in n^2 p^2 m multiply-adds."""
    outputs = state.derivatives.shape[1]
    rows = state.derivatives.flatten(0, 1)
    return (rows @ rows.t()).mul_(state.kernel.repeat_interleave(outputs, 0).repeat_interleave(outputs, 1))


def gram_diagonal(state: MaintainedState) -> Tensor:
    """Diagonal of G, as [n, p]."""
    return state.kernel.diagonal()[:, None] * torch.linalg.vector_norm(state.derivatives, dim=2).square()


def gram_product(state: MaintainedState, v: Tensor) -> Tensor:
    """G v [n, p] for v [n, p] without G, in n^2 m + 2 n m p multiply-adds."""
    return torch.bmm((state.kernel @ state.direction(v))[:, None], state.derivatives.transpose(1, 2))[:, 0]


def cholesky_solution(matrix: Tensor, damping: float, right: Tensor) -> Tensor:
    """(matrix + damping mean(diag) I)^-1 right, in float64; right is [n, p] for an [n p, n p] matrix."""
    factor = cholesky_factor(matrix, damping * matrix.diagonal().mean())
    return torch.cholesky_solve(right.reshape(-1, 1).double(), factor).view_as(right).to(right.dtype)


def cholesky_factor(matrix: Tensor, shift: Tensor) -> Tensor:
    damped = matrix.double()
    damped.diagonal().add_(shift)
    try:
        return torch.linalg.cholesky(damped)
    except torch.linalg.LinAlgError as error:
        raise DivergedError(
            "the damped Gram matrix is not positive definite: use a larger damping, float64, or a wider net "
            "if no neuron fires"
        ) from error


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    right: Tensor,
    tolerance: float,
    iterations: int,
) -> tuple[Tensor, int]:
    """Solution [n] of a symmetric positive definite system to a relative residual, and the iterations it took."""
    solution, residual = torch.zeros_like(right), right.clone()
    goal = tolerance * right.norm()
    search = preconditioned = precondition(residual)
    energy = residual @ preconditioned
    for iteration in range(iterations):
        if residual.norm() <= goal:
            return solution, iteration
        image = product(search)
        step = energy / (search @ image)
        solution += step * search
        residual -= step * image
        preconditioned = precondition(residual)
        energy, before = residual @ preconditioned, energy
        search = preconditioned + energy / before * search
    return solution, iterations
