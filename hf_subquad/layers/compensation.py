"""A linear correction that predicts what skipped neurons would have added to an MLP's output."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CalibrationError

_RIDGE = 1e-3  # of each feature's mean square, so that a few large ones do not drown the others
_RANK = 128  # at most: on SmolLM2-135M (d = 576), more takes longer and explains little more
_ITERATIONS = 2


@dataclass(frozen=True)
class Compensation:
    """x -> weight (basis x) + bias, fitted to the part of the output that selections miss.

    Attributes:
        basis: float32 [r, d].
        weight: float32 [d_out, r].
        bias: float32 [d_out].
    """

    basis: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d_out] in the dtype and on the device of x; differentiable in x."""
        return F.linear(F.linear(x, self.basis.to(x)), self.weight.to(x), self.bias.to(x))

    def to(self, device: torch.device) -> "Compensation":
        return Compensation(self.basis.to(device), self.weight.to(device), self.bias.to(device))


class CompensationFit:
    """Ridge regression from tokens to what selections miss, over any number of batches.

    Args:
        basis: [f, d], the directions that it is predicted from; None: all of the input space.
    """

    def __init__(self, basis: Tensor | None) -> None:
        self._basis = basis
        self._tokens = 0
        self._gram: Any = 0.0  # tensors once tokens were added
        self._moment: Any = 0.0

    @torch.no_grad()
    def add(self, x: Tensor, missed: Tensor) -> None:
        """Tokens x [N, d], and what the skipped neurons would have added on them [N, d_out]."""
        features = x.float() if self._basis is None else x.float() @ self._basis.t()
        features = F.pad(features, (0, 1), value=1.0)
        self._tokens += len(x)
        self._gram = self._gram + features.t() @ features
        self._moment = self._moment + features.t() @ missed.float()

    @torch.no_grad()
    def solve(self) -> Compensation:
        """The compensation fitted to all added tokens; all zero if there were too few.

        A map of more than `_RANK` directions is reduced to those that explain the most (reduced-rank regression,
        Izenman 1975), found by a randomised range finder (Halko, Martinsson and Tropp 2011, algorithm 4.4).

        Raises:
            CalibrationError: squares of the tokens, or what was missed on them, leave the range of float32.
        """
        if not (self._gram.isfinite().all() and self._moment.isfinite().all()):
            raise CalibrationError("an MLP's input or output is too large to be fitted: the model has diverged")
        # In float64, because a few directions of a pretrained model's tokens are far larger than the others.
        dtype = torch.float32 if self._gram.device.type == "mps" else torch.float64
        gram, moment = self._gram.to(dtype), self._moment.to(dtype)
        gram.diagonal().mul_(1 + _RIDGE).add_(torch.finfo(torch.float32).tiny)
        factor = torch.linalg.cholesky(gram)
        if self._tokens < len(gram):
            moment = torch.zeros_like(moment)
        if len(gram) - 1 <= _RANK:
            solution = torch.cholesky_solve(moment, factor).float()
            basis = torch.eye(len(gram) - 1).to(solution) if self._basis is None else self._basis
            return Compensation(basis, solution[:-1].t().contiguous(), solution[-1].contiguous())
        generator = torch.Generator().manual_seed(0)
        outputs = torch.randn(moment.shape[1], min(_RANK, moment.shape[1]), generator=generator).to(moment)
        for _ in range(_ITERATIONS):
            outputs = torch.linalg.qr(moment.t() @ torch.cholesky_solve(moment @ outputs, factor)).Q
        solution = torch.cholesky_solve(moment @ outputs, factor)
        basis, bias = solution[:-1].t().float(), (outputs @ solution[-1]).float()
        return Compensation(basis if self._basis is None else basis @ self._basis, outputs.float(), bias)
