"""A linear stand-in for what skipped neurons would have added to an MLP's output."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_RIDGE = 1e-3  # of the features' mean square


@dataclass(frozen=True)
class Compensation:
    """x -> weight (basis x) + bias, fitted to the output that selections miss; its cost is that of the sketch.

    Attributes:
        basis: float32 [r, d], the sketch's directions when it was fitted.
        weight: float32 [d_out, r].
        bias: float32 [d_out].
    """

    basis: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d_out] in the dtype of x; differentiable in x."""
        return F.linear(F.linear(x, self.basis.to(x.dtype)), self.weight.to(x.dtype), self.bias.to(x.dtype))

    def to(self, device: torch.device) -> "Compensation":
        return Compensation(self.basis.to(device), self.weight.to(device), self.bias.to(device))

    def towards(self, other: "Compensation", share: float) -> "Compensation":
        """Between this one (share 0) and another on the same basis (share 1)."""
        return Compensation(
            self.basis, torch.lerp(self.weight, other.weight, share), torch.lerp(self.bias, other.bias, share)
        )


@torch.no_grad()
def fit_compensation(basis: Tensor, x: Tensor, missed: Tensor, prior: Compensation | None = None) -> Compensation:
    """Ridge regression of what was missed on the sketch of the tokens.

    Args:
        basis: [r, d].
        x: tokens [N, d].
        missed: what the skipped neurons would have added, [N, d_out].
        prior: what to stay near, on the basis given, in place of zero.
    """
    features = torch.cat([x.float() @ basis.t(), x.new_ones(len(x), 1, dtype=torch.float32)], 1)
    target = missed.float() if prior is None else missed.float() - prior(x.float())
    gram = features.t() @ features
    ridge = _RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    gram.diagonal().add_(ridge)
    solution = torch.cholesky_solve(features.t() @ target, torch.linalg.cholesky(gram))
    fitted = Compensation(basis, solution[:-1].t().contiguous(), solution[-1].contiguous())
    if prior is None:
        return fitted
    return Compensation(basis, prior.weight + fitted.weight, prior.bias + fitted.bias)
