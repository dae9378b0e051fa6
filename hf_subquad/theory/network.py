"""The wide net: layers of random weights, a shifted ReLU, and one trained m x m matrix under a fixed output layer."""

import math

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .lazy_matrix import LazyMatrix, sparse_product


def threshold(width: int) -> float:
    """c = sqrt(0.4 ln m): the standard deviations that a pre-activation must exceed for its neuron to fire.

    By the Gaussian tail bound exp(-c^2 / 2) = m^(-1/5), at most about m^(4/5) of m neurons do.
    """
    return math.sqrt(0.4 * math.log(width))


def gain(c: float) -> float:
    """1 / sqrt(2 E[max(g - c, 0)^2]) for a standard Gaussian g: what makes a shifted ReLU layer keep lengths.

    With weights N(0, 2 / m) it keeps the expected squared length of its input; sqrt(1) for the plain ReLU, c = 0.
    """
    tail, density = 0.5 * math.erfc(c / math.sqrt(2)), math.exp(-c * c / 2) / math.sqrt(2 * math.pi)
    return 1 / math.sqrt(2 * ((1 + c * c) * tail - c * density))


class WideNet(nn.Module):
    """f(x) = A phi(W_L phi(... phi(W_1 x))), of which W_L is trained, on few samples and with low-rank updates.

    phi(z) = gain * max(z - shift, 0), where shift is c standard deviations, sqrt(2 / m) ||h||, of the pre-activations
    that random weights give the layer's input h. The gain and the factor ||h|| are ours. Without the gain a shifted
    ReLU shrinks what passes, by 0.11 a layer at m = 16,384; with it and entries +-1 in A, f(x) is of order ||x|| at
    every width and depth. It changes no fired set. One shift for all h would silence the shorter ones in deep nets.

    Matrices are stored by input: row k of a stored matrix is what input k adds to the m neurons (the transpose of
    `nn.Linear.weight`), so a sparse input reads few, contiguous rows. Entries of W_l are N(0, 2 / m), drawn on the
    CPU from `seed`; the global random state is left alone.

    Args:
        in_features: d.
        width: m.
        depth: L >= 2, hidden layers.
        outputs: p, the rows of A.
        zero_start: neurons come in pairs with equal weights in W_L and opposite ones in A, so that f = 0 before
            training. Half as many distinct neurons, but no random function is left in predictions.
        rank_budget: of the updates of W_L that are kept as factors; by default ceil(m ** 0.8), where they cost as much
            to apply as the m^(4/5) rows that a sparse input reads.

    Attributes:
        lower: W_1 [d, m], ..., W_(L-1) [m, m], frozen.
        trained: W_L [m, m] with its pending updates; they are merged when a state dict is made.
        output: A [p, m], frozen.

    Raises:
        ConfigError: a size is out of range.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        depth: int = 2,
        outputs: int = 1,
        seed: int = 0,
        zero_start: bool = False,
        rank_budget: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("in_features", in_features, 1), ("width", width, 2), ("depth", depth, 2), ("outputs", outputs, 1),
        ):  # fmt: skip
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if zero_start and width % 2:
            raise ConfigError(f"zero_start needs an even width, got {width}")
        if dtype not in (torch.float32, torch.float64):
            raise ConfigError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        generator = torch.Generator().manual_seed(seed)
        deviation = math.sqrt(2 / width)

        def gaussian(rows: int) -> Tensor:
            return torch.randn(rows, width, generator=generator, dtype=dtype).mul_(deviation)

        self.shift_per_length = threshold(width) * deviation
        self.gain = gain(threshold(width))
        lower = [gaussian(in_features), *(gaussian(width) for _ in range(depth - 2))]
        self.lower = nn.ParameterList(nn.Parameter(weight, requires_grad=False) for weight in lower)
        trained, signs = gaussian(width), torch.randint(2, (outputs, width), generator=generator).to(dtype) * 2 - 1
        if zero_start:
            half = width // 2
            trained[:, half:] = trained[:, :half]
            signs[:, half:] = -signs[:, :half]
        self.trained = LazyMatrix(trained, math.ceil(width**0.8) if rank_budget is None else rank_budget)
        self.output = nn.Parameter(signs, requires_grad=False)

    @property
    def in_features(self) -> int:
        """d."""
        return self.lower[0].shape[0]

    @property
    def width(self) -> int:
        """m."""
        return self.output.shape[1]

    def shift(self, h: Tensor) -> Tensor:
        """The threshold that pre-activations of a layer with inputs h [N, r] must exceed to fire, [N, 1]."""
        return self.shift_per_length * torch.linalg.vector_norm(h, dim=1, keepdim=True)

    def layer(self, h: Tensor, pre: Tensor) -> Tensor:
        """phi of pre-activations [N, m] that come from inputs h [N, r]."""
        return (pre - self.shift(h)).clamp_(min=0).mul_(self.gain)

    def features(self, x: Tensor) -> Tensor:
        """h [N, m]: the trained layer's inputs for x [N, d]. Training does not change them."""
        first, *others = self.lower
        h = self.layer(x, x @ first)
        for weight in others:
            h = self.layer(h, sparse_product(h, weight))
        return h

    def forward(self, x: Tensor) -> Tensor:
        """f(x) [N, p] of any x [N, d], exactly: m nnz(h) multiply-adds a sample and layer, plus the pending updates."""
        h = self.features(x)
        return self.layer(h, self.trained.apply_to(h)) @ self.output.t()
