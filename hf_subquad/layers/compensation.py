"""A linear correction that predicts what skipped neurons would have added to an MLP's output."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CalibrationError

_RIDGE = 1e-3  # of each feature's mean square, so that a few large ones do not drown the others


@dataclass(frozen=True)
class Compensation:
    """x -> weight (basis x) + bias, fitted to the part of the output that selections miss. As cheap as the sketch.

    Attributes:
        basis: float32 [r, d], the sketch's directions when it was fitted.
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

    def towards(self, other: "Compensation", share: float) -> "Compensation":
        """Interpolation between this one (share 0) and another on the same basis (share 1)."""
        return Compensation(
            self.basis, torch.lerp(self.weight, other.weight, share), torch.lerp(self.bias, other.bias, share)
        )


class CompensationFit:
    """Ridge regression from the sketch of the tokens to what selections miss, over any number of batches.

    Args:
        basis: [r, d].
    """

    def __init__(self, basis: Tensor) -> None:
        self._basis = basis
        self._tokens = 0
        size = len(basis) + 1
        self._gram = basis.new_zeros(size, size)
        self._moment: Any = 0.0  # a tensor once tokens were added

    @torch.no_grad()
    def add(self, x: Tensor, missed: Tensor) -> None:
        """Tokens x [N, d], and what the skipped neurons would have added on them [N, d_out]."""
        features = torch.cat(
            [x.float() @ self._basis.t(), torch.ones(len(x), 1, dtype=torch.float32, device=x.device)], 1
        )
        self._tokens += len(x)
        self._gram = self._gram + features.t() @ features
        self._moment = self._moment + features.t() @ missed.float()

    @torch.no_grad()
    def solve(self) -> Compensation:
        """The compensation fitted to all added tokens; all zero if there were too few.

        Raises:
            CalibrationError: squares of the tokens, or what was missed on them, leave the range of float32.
        """
        if not (torch.isfinite(self._gram).all() and torch.isfinite(torch.as_tensor(self._moment)).all()):
            raise CalibrationError("an MLP's input or output is too large to be fitted: the model has diverged")
        gram = self._gram.clone()
        gram.diagonal().mul_(1 + _RIDGE).add_(torch.finfo(gram.dtype).tiny)
        if self._tokens < len(gram):
            solution = torch.zeros_like(self._moment)
        else:
            solution = torch.cholesky_solve(self._moment, torch.linalg.cholesky(gram))
        return Compensation(self._basis, solution[:-1].t().contiguous(), solution[-1].contiguous())
