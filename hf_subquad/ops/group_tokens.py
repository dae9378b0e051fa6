"""Which tokens share a tile: recursive bisection by content, or consecutive runs. Pure functions."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..config import TileOrder

POWER_ITERATIONS = 2  # a split need not be exact: eight were measured to choose no better neurons than one


@dataclass(frozen=True)
class TokenTiles:
    """N tokens in n tiles of T slots each; the n * T - N spare slots repeat tokens.

    Attributes:
        entries: int64 [n, T]; the entry in each slot. Entry e < N is token e; an entry e >= N is spare, and repeats
            token e mod N.
        tokens: N.
    """

    entries: Tensor
    tokens: int

    @cached_property
    def slots(self) -> Tensor:
        """int64 [n, T]; the token in each slot (spare entries resolved to the token they repeat)."""
        return self.entries if self.entries.numel() == self.tokens else self.entries % self.tokens

    @cached_property
    def _places(self) -> Tensor:
        """int64 [n * T]; flat slot number of each entry."""
        flat = self.entries.reshape(-1)
        return torch.empty_like(flat).scatter_(0, flat, torch.arange(len(flat), device=flat.device))

    @property
    def position(self) -> Tensor:
        """int64 [N]; flat slot number of each token."""
        return self._places[: self.tokens]

    @property
    def spare(self) -> Tensor:
        """int64 [n * T - N]; flat slot numbers of the spare entries."""
        return self._places[self.tokens :]

    @property
    def shape(self) -> tuple[int, int]:
        """(n, T)."""
        return self.entries.shape[0], self.entries.shape[1]

    def to_slots(self, values: Tensor) -> Tensor:
        """[N, c] by token -> [n, T, c] by slot, zero in spare slots."""
        count, size = self.shape
        by_slot = values.index_select(0, self.slots.reshape(-1))
        if count * size > self.tokens:
            by_slot.index_fill_(0, self.spare, 0)
        return by_slot.view(count, size, -1)

    def to_tokens(self, values: Tensor) -> Tensor:
        """[n, T, c] by slot -> [N, c] by token; the values of spare slots are dropped."""
        return values.reshape(-1, values.shape[-1]).index_select(0, self.position)


@dataclass(frozen=True)
class Selection:
    """Tiles of tokens and the neurons each computes.

    Attributes:
        tiles: n tiles of T slots.
        neurons: int64 [n, k], without repetitions within a tile.
    """

    tiles: TokenTiles
    neurons: Tensor


def tile_shape(tokens: int, tile_size: int) -> tuple[int, int]:
    """Number n of tiles (a power of two) and tokens T of each, T within a factor sqrt(2) of `tile_size`.

    With a `tile_size` of 1, every token is its own tile.
    """
    if tile_size == 1:
        return tokens, 1
    rounds = max(0, round(math.log2(tokens / tile_size)))
    count = 1 << min(rounds, tokens.bit_length() - 1)
    return count, -(-tokens // count)


def bisect(features: Tensor, count: int, size: int) -> Tensor:
    """Split every group in half along its leading principal direction until there are `count` groups.

    Args:
        features: float32 [N, r] by token; entry e stands for token e mod N.
        count: n, a power of two.
        size: T; n T entries are at least N.

    Returns:
        int64 [n, T], the entries in each group.
    """
    order = torch.arange(count * size, device=features.device).unsqueeze(0)
    features = features[order[0] % len(features)]
    groups = features.unsqueeze(0)
    while len(groups) < count:
        centred = groups - groups.mean(1, keepdim=True)
        along = torch.bmm(centred, _leading_direction(centred)).squeeze(-1)
        ranking = along.argsort(dim=1)
        order = order.gather(1, ranking).view(2 * len(groups), -1)
        groups = features[order]
    return order


def make_tiles(
    features: Tensor, tile_size: int, order: TileOrder, bisect: Callable[[Tensor, int, int], Tensor] = bisect
) -> TokenTiles:
    """Split tokens into tiles.

    Args:
        features: float [N, r] by which tokens are compared (here: their sketch).
        tile_size: tokens wanted in a tile.
        order: 'similar' bisects by content, 'consecutive' keeps the given order.
        bisect: the bisection to use, a backend's or the one above.
    """
    tokens = features.shape[0]
    count, size = tile_shape(tokens, tile_size)
    if order == "similar" and 1 < count < tokens:
        return TokenTiles(bisect(features, count, size), tokens)
    return TokenTiles(torch.arange(count * size, device=features.device).view(count, size), tokens)


def _leading_direction(centred: Tensor) -> Tensor:
    """[g, p, r] -> [g, r, 1]: about the leading eigenvector of each group's covariance, unnormalised."""
    covariance = torch.bmm(centred.transpose(1, 2), centred)
    scale = covariance.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(centred.dtype).tiny)
    covariance = covariance / scale[:, None, None]
    # The heaviest coordinate's column cannot be orthogonal to the leading direction in practice, and needs no
    # random numbers: the same tokens always give the same tiles.
    heaviest = covariance.diagonal(dim1=1, dim2=2).argmax(1)
    direction = covariance.gather(2, heaviest[:, None, None].expand(-1, covariance.shape[1], 1))
    for _ in range(POWER_ITERATIONS):
        direction = torch.bmm(covariance, direction)
        direction = direction / direction.abs().amax(1, keepdim=True).clamp_min(torch.finfo(centred.dtype).tiny)
    return direction
