"""The state of the training samples at every iteration: margins and fired sets, without reading weights."""

import torch
from torch import Tensor

from .network import WideNet


class MaintainedState:
    """How far pre-activations of n fixed samples exceed their shifts, maintained exactly as the trained matrix changes.

    The features h_i do not change in training, so one pass over the m x m matrix gives Z = H W^T, and K = H H^T. From
    then on a step W -= D^T H moves Z by -K D: n^2 m multiply-adds as one dense product (n^2 nnz(d) if zeros were
    skipped), and W is not read. Which neurons fire follows from Z in one pass over its n m entries, which was
    faster than a tree of maxima or buckets of margins for each sample.

    Args:
        network: p outputs, width m.
        x: the samples [n, d].

    Attributes:
        features: H [n, m].
        kernel: K [n, n].
        margins: Z minus the shift of each sample, [n, m]; a neuron fires where it is positive.
        derivatives: B [n, p, m] of predictions by pre-activations, not zero where a neuron fires; a row of the Jacobian
            by W is the Kronecker product of h_i and B_io.
    """

    @torch.no_grad()
    def __init__(self, network: WideNet, x: Tensor) -> None:
        self.features = network.features(x)
        self.kernel = self.features @ self.features.t()
        self._shift = network.shift(self.features)
        self._gain, self._slopes = network.gain, network.gain * network.output
        self.derivatives = self._slopes.new_empty(len(x), *self._slopes.shape)
        self.set_pre(network.trained.apply_to(self.features))

    def set_pre(self, pre: Tensor) -> None:
        """Take over Z [n, m], changing it."""
        self._set_margins(pre.sub_(self._shift))

    def _set_margins(self, margins: Tensor) -> None:
        self.margins = margins
        torch.gt(margins[:, None].expand(self.derivatives.shape), 0, out=self.derivatives).mul_(self._slopes)

    def predictions(self) -> Tensor:
        """f [n, p]."""
        return torch.bmm(self.margins[:, None], self.derivatives.transpose(1, 2))[:, 0]

    def direction(self, z: Tensor) -> Tensor:
        """D [n, m], sums of B_io by z [n, p]: the transposed Jacobian applied to z is D^T H."""
        return torch.bmm(z[:, None], self.derivatives)[:, 0]

    def move(self, direction: Tensor) -> None:
        """Follow a step W -= D^T H of the trained matrix."""
        self._set_margins(self.margins.addmm_(self.kernel, direction, alpha=-1))

    @property
    def fired(self) -> Tensor:
        """bool [n, m]."""
        return self.derivatives[:, 0] != 0

    @property
    def fired_share(self) -> float:
        """Mean share of neurons that fire, over the samples."""
        norm = torch.linalg.vector_norm(self.derivatives[:, 0])  # of entries 0 and +-gain; faster than counting
        return (norm / self._gain).square().item() / self.margins.numel()
