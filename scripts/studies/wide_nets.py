"""What the studies of wide nets share: tasks, and Gauss-Newton that reads and writes the matrix in each iteration."""

import torch
from torch import Tensor

from hf_subquad.theory import GaussNewton, WideNet
from hf_subquad.theory.lazy_matrix import sparse_product


def smooth_task(samples: int, features: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    """x [n, d] of length 1, drawn uniformly, and standardised values y [n, 1] of sin(3 x_1) + x_2 x_3.

    With fewer samples than fired neurons some weights fit them all.
    """
    draw = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(samples, features, generator=draw))
    y = torch.sin(3 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]
    return x, (y - y.mean()) / y.std()


def teacher_task(samples: int, features: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    """The same samples; values y [n, 1] are another wide net's, standardised."""
    x, _ = smooth_task(samples, features, seed)
    with torch.no_grad():
        y = WideNet(features, 2048, seed=seed + 1000)(x)
    return x, (y - y.mean()) / y.std()


TASKS = {"teacher": teacher_task, "smooth": smooth_task}


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
