"""Gauss-Newton that reads and writes the matrix in each iteration: the twins of `hf_subquad.theory.GaussNewton`."""

import torch
from torch import Tensor

from hf_subquad.theory import GaussNewton, WideNet
from hf_subquad.theory.lazy_matrix import sparse_product


class DenseGaussNewton(GaussNewton):
    """Z = H W^T anew in each iteration, and W -= D^T H in each iteration; the solve is the same.

    Works on a copy of the network's matrix; `network` stays as it was.
    """

    def __init__(self, network: WideNet, x: Tensor, y: Tensor, **settings: object) -> None:
        super().__init__(network, x, y, **settings)
        self.weight = network.trained.rows(torch.arange(network.width)).detach()

    def _forward(self) -> Tensor:
        self.state.set_pre(self.product(self.state.features))
        return self.state.predictions()

    def _update(self, direction: Tensor) -> None:
        self.weight.addmm_(self._left, direction)

    def _maintain(self, direction: Tensor) -> None:
        """Nothing is kept beside the weights."""

    def product(self, h: Tensor) -> Tensor:
        return h @ self.weight


class SparseGaussNewton(DenseGaussNewton):
    """The same, touching what is not zero only: rows of W at non-zero features, and of those the columns that fired."""

    def _update(self, direction: Tensor) -> None:
        for features, step in zip(self.state.features, direction, strict=True):
            rows, columns = features.nonzero()[:, 0], step.nonzero()[:, 0]
            self.weight[rows[:, None], columns] -= features[rows, None] * step[columns]

    def product(self, h: Tensor) -> Tensor:
        return sparse_product(h, self.weight)
