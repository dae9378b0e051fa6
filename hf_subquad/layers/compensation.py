"""A linear correction that predicts what skipped neurons would have added to an MLP's output."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CalibrationError

_RIDGE = 1e-3  # of each feature's mean square, so that a few large ones do not drown the others
_TOKEN_RIDGE = 0.5  # the same for whole tokens, times features per token: with few tokens, the sketch decides
_RANK = 128  # at most: twice as many lower errors on SmolLM2-135M (d = 576) by up to 37%, at twice the work
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

    def to(self, like: torch.device | Tensor) -> "Compensation":
        """On a device, or in the dtype and on the device of a tensor."""
        return Compensation(self.basis.to(like), self.weight.to(like), self.bias.to(like))


class CompensationFit:
    """Ridge regression from tokens to what selections miss, over any number of batches.

    Args:
        basis: [r, d], the sketch's directions: it is predicted from the tokens' components in them.
        whole: what these do not explain is predicted from the whole tokens.
    """

    def __init__(self, basis: Tensor, whole: bool = False) -> None:
        self._basis = basis
        self._whole = whole
        self._tokens = 0
        self._gram: Any = 0.0  # tensors once tokens were added
        self._moment: Any = 0.0

    @torch.no_grad()
    def add(self, x: Tensor, missed: Tensor) -> None:
        """Tokens x [N, d], and what the skipped neurons would have added on them [N, d_out]."""
        features = F.pad(x.float() if self._whole else x.float() @ self._basis.t(), (0, 1), value=1.0)
        self._tokens += len(x)
        self._gram = self._gram + features.t() @ features
        self._moment = self._moment + features.t() @ missed.float()

    @torch.no_grad()
    def solve(self) -> Compensation:
        """The compensation fitted to all added tokens; all zero if there were too few.

        Raises:
            CalibrationError: squares of the tokens, or what was missed on them, leave the range of float32, or lose all
                precision in it.
        """
        if not (self._gram.isfinite().all() and self._moment.isfinite().all()):
            raise CalibrationError("an MLP's input or output is too large to be fitted: the model has diverged")
        # In float64, because a few directions of a pretrained model's tokens are far larger than the others. In main
        # memory, because not every device has float64 or room for it.
        gram, moment = self._gram.cpu().double(), self._moment.cpu().double()
        if self._tokens <= len(self._basis):
            moment = torch.zeros_like(moment)
        if not self._whole:
            solution = _regression(gram, moment, _RIDGE).to(self._basis)
            return Compensation(self._basis, solution[:-1].t().contiguous(), solution[-1].contiguous())
        directions = torch.block_diag(self._basis.cpu().double(), gram.new_ones(1, 1)).t()
        start = directions @ _regression(directions.t() @ gram @ directions, directions.t() @ moment, _RIDGE)
        ridge = _TOKEN_RIDGE * len(gram) / self._tokens
        solution = start + _regression(gram, moment - gram @ start, ridge)
        outputs = _leading_outputs(solution, gram)
        bias = outputs @ (outputs.t() @ solution[-1])
        basis = (solution[:-1] @ outputs).t().contiguous()
        return Compensation(basis.to(self._basis), outputs.to(self._basis), bias.to(self._basis))


def _regression(gram: Tensor, moment: Tensor, ridge: float) -> Tensor:
    """[f, o] from the second moments of features [f, f], and of features and outputs [f, o]."""
    gram = gram.clone()
    gram.diagonal().mul_(1 + ridge).add_(torch.finfo(torch.float32).tiny)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        raise CalibrationError("some features of an MLP's input are too large beside the others to be fitted")
    return torch.cholesky_solve(moment, factor)


def _leading_outputs(solution: Tensor, gram: Tensor) -> Tensor:
    """Orthonormal [o, r] of the output directions in which a map [f, o] of features predicts the most (reduced-rank
    regression, Izenman 1975), by a randomised range finder (Halko, Martinsson and Tropp 2011, algorithm 4.4)."""
    width = solution.shape[1]
    found = torch.randn(
        width, min(_RANK, *solution.shape), generator=torch.Generator().manual_seed(0), device="cpu"
    ).to(solution)
    for _ in range(_ITERATIONS):
        found = torch.linalg.qr(solution.t() @ (gram @ (solution @ found))).Q
    return found
