"""A low-rank factorisation W ~ B A of weight rows, fitted to the inputs of the weights or to the weights alone."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import CalibrationError, WeightsError

_OVERSAMPLING = 8
_POWER_ITERATIONS = 2
RIDGE = 1e-2  # of the inputs' mean square, in every direction: where no token points, the plain weights decide


@dataclass(frozen=True)
class Sketch:
    """W ~ B A.

    Attributes:
        basis: A, float32 [r, d]; r directions of the input space, sorted by their effect on pre-activations.
        codes: B, float32 [rows, r], orthonormal columns; row i is weight row i.
    """

    basis: Tensor
    codes: Tensor
    _cast: dict[torch.dtype, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def to(self, device: torch.device) -> "Sketch":
        return Sketch(self.basis.to(device), self.codes.to(device))

    def basis_as(self, dtype: torch.dtype) -> Tensor:
        """The basis in another dtype; the copy is kept."""
        if dtype not in self._cast:
            with torch.inference_mode(False):
                self._cast[dtype] = self.basis.to(dtype)
        return self._cast[dtype]


def build_sketch(weight: Tensor, rank: int, seed: int, tokens: Tensor | None = None) -> Sketch:
    """The rank-r map that predicts the pre-activations W x best: reduced-rank regression (Izenman 1975).

    With C the inputs' second moment, B holds the leading left singular vectors of W C^(1/2), and A = B^T W. They are
    found by a randomised range finder with power iterations (Halko, Martinsson and Tropp 2011, algorithms 4.4 and
    5.1) on W C W^T, without forming C or W C W^T. Without tokens, C is the identity and B A the truncated SVD of W.

    The same arguments give the same sketch on every process; the global random state is not touched.

    Args:
        weight: [rows, d], any float dtype.
        rank: r wanted; at most min(rows, d) is used.
        tokens: [N, d], inputs to fit to, any float dtype; a ridge term keeps the fit well defined however few they are.

    Raises:
        WeightsError: the weight holds NaN or infinite values, or its squares leave the range of float32.
        CalibrationError: the tokens do.
    """
    weight = weight.detach().float()
    rows, width = weight.shape
    rank, found = min(rank, rows, width), min(rank + _OVERSAMPLING, rows, width)
    inputs = None if tokens is None or not len(tokens) else _scaled(tokens.to(weight.device))
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(width, found, generator=generator, dtype=torch.float32, device="cpu").to(weight.device)
    span = _orthonormal(weight @ _second_moment(inputs, probe))
    for _ in range(_POWER_ITERATIONS):
        span = _orthonormal(weight @ _second_moment(inputs, weight.t() @ span))
    projected = span.t() @ weight
    if not torch.isfinite(projected).all():
        raise WeightsError("its weights hold NaN or infinite values, or values too large to be squared")
    left = torch.linalg.svd(_root(inputs, projected), full_matrices=False).U[:, :rank]
    return Sketch(left.t() @ projected, span @ left)


def summary_of(tokens: Tensor, count: int, seed: int) -> Tensor:
    """A few rows that replace many tokens: float32 [count or N, d], with about the same second moment up to scale.

    Only directions outside the leading ones of the tokens are lost; these are found as in a sketch. With twice as many
    rows as the sketch's rank, the sketch generalises as well as one fitted to all tokens (measured).

    Raises:
        CalibrationError: the tokens hold NaN or infinite values, or their squares leave the range of float32.
    """
    inputs = _scaled(tokens)
    if len(inputs) <= count:
        return inputs
    count = min(count, inputs.shape[1])
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(inputs.shape[1], count, generator=generator, dtype=torch.float32, device="cpu").to(
        inputs.device
    )
    span = _orthonormal(inputs.t() @ (inputs @ probe))
    span = _orthonormal(inputs.t() @ (inputs @ span))
    return torch.linalg.qr(inputs @ span).R @ span.t()


def _scaled(tokens: Tensor) -> Tensor:
    """Tokens of any size as float32 inputs X with trace(X^T X) = d, or zeros if they all are."""
    tokens = tokens.detach().float()
    size = torch.linalg.vector_norm(tokens) / tokens.shape[1] ** 0.5
    if not torch.isfinite(size):
        raise CalibrationError("tokens hold NaN or infinite values, or values too large to be squared")
    return tokens / size.clamp_min(torch.finfo(torch.float32).tiny)


def _second_moment(inputs: Tensor | None, columns: Tensor) -> Tensor:
    """C columns, with C = X^T X + ridge, or the identity without inputs."""
    return columns if inputs is None else torch.addmm(columns, inputs.t(), inputs @ columns, beta=RIDGE)


def _root(inputs: Tensor | None, rows: Tensor) -> Tensor:
    """rows C^(1/2) up to a rotation from the right, which left singular vectors do not see."""
    return rows if inputs is None else torch.cat([rows @ inputs.t(), RIDGE**0.5 * rows], 1)


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q
