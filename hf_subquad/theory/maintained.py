"""What is known of the training set at every iteration: pre-activations and fired sets, without reading weights."""

import torch
from torch import Tensor

from .network import WideNet


class MaintainedState:
    """Pre-activations of n fixed samples, kept exact while the trained matrix moves by H^T D.

    The features h_i do not change in training, so one pass over the m x m matrix gives Z = H W^T, and K = H H^T. From
    then on a step W -= D^T H moves Z by -K D: n^2 m multiply-adds as one dense product (n^2 nnz(d) if zeros were
    skipped), and W is not read. Which neurons fire follows from Z in one pass over its n m entries.

    Args:
        network: p outputs, width m.
        x: the samples [n, d].

    Attributes:
        features: H [n, m].
        kernel: K [n, n].
        shift: [n, 1].
        pre: Z [n, m].
        fired: bool [n, m], where Z exceeds the shift.
    """

    @torch.no_grad()
    def __init__(self, network: WideNet, x: Tensor) -> None:
        self.gain, self.output = network.gain, network.output
        self.features = network.features(x)
        self.shift = network.shift(self.features)
        self.kernel = self.features @ self.features.t()
        self.pre = network.trained.apply_to(self.features)
        self.fired = self.pre > self.shift

    def predictions(self) -> Tensor:
        """f [n, p]."""
        return (self.pre - self.shift).mul_(self.fired) @ self.output.t() * self.gain

    def direction(self, z: Tensor) -> Tensor:
        """D [n, m] = sum over outputs o of diag(z_o) B_o, where B_o [n, m] is the derivative of f_o by Z; z is [n, p].

        The transposed Jacobian of f by W, applied to z, is D^T H.
        """
        return (z @ self.output).mul_(self.fired).mul_(self.gain)

    def jacobian_factors(self) -> Tensor:
        """B [n p, m]: row (i, o) of the Jacobian is the Kronecker product of features[i] and row i p + o of this."""
        return (self.fired[:, None] * (self.gain * self.output)).flatten(0, 1)

    def move(self, direction: Tensor) -> None:
        """Follow a step W -= D^T H of the trained matrix."""
        self.pre.addmm_(self.kernel, direction, alpha=-1)
        torch.gt(self.pre, self.shift, out=self.fired)

    @property
    def fired_share(self) -> float:
        """Mean share of neurons that fire, over the samples."""
        return self.fired.count_nonzero().item() / self.fired.numel()
