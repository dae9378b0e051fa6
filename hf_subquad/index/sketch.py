"""A low-rank factorisation W ~ B A of weight rows: built once, kept current without reading W again."""

from dataclasses import dataclass

import torch
from torch import Tensor

_OVERSAMPLING = 8
_POWER_ITERATIONS = 2


@dataclass(frozen=True)
class Sketch:
    """W ~ B A.

    Attributes:
        basis: A, float32 [r, d]; r directions of the input space.
        codes: B, float32 [rows, r]; row i is weight row i.
    """

    basis: Tensor
    codes: Tensor

    def to(self, device: torch.device) -> "Sketch":
        return Sketch(self.basis.to(device), self.codes.to(device))


def build_sketch(weight: Tensor, rank: int, seed: int) -> Sketch:
    """Randomised SVD with power iterations (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1).

    The same weight and seed give the same sketch on every process; the global random state is not touched.

    Args:
        weight: [rows, d], any float dtype.
        rank: r wanted; at most min(rows, d) is used.
    """
    weight = weight.detach().float()
    rows, width = weight.shape
    rank = min(rank, rows, width)
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(width, min(rank + _OVERSAMPLING, rows, width), generator=generator, dtype=torch.float32)
    span = torch.linalg.qr(weight @ probe.to(weight.device)).Q
    for _ in range(_POWER_ITERATIONS):
        span = torch.linalg.qr(weight @ torch.linalg.qr(weight.t() @ span).Q).Q
    left, values, basis = torch.linalg.svd(span.t() @ weight, full_matrices=False)
    return Sketch(basis[:rank].contiguous(), (span @ left[:, :rank]) * values[:rank])


def add_low_rank(sketch: Sketch, left: Tensor, right: Tensor) -> Sketch:
    """Sketch of W + left right, sketch_is_approximate to the same rank from the factors alone.

    Args:
        left: [rows, q].
        right: [q, d].
    """
    rank = sketch.codes.shape[1]
    q_left, r_left = torch.linalg.qr(torch.cat([sketch.codes, left.to(sketch.codes)], 1))
    q_right, r_right = torch.linalg.qr(torch.cat([sketch.basis, right.to(sketch.basis)], 0).t())
    core_left, values, core_right = torch.linalg.svd(r_left @ r_right.t())
    codes = (q_left @ core_left[:, :rank]) * values[:rank]
    return Sketch((q_right @ core_right[:rank].t()).t().contiguous(), codes)
