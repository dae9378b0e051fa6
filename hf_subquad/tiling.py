"""Which tokens share a tile: recursive bisection by content, or consecutive runs. Pure functions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TileOrder

_POWER_ITERATIONS = 2  # a split need not be exact: eight were measured to choose no better neurons than one


@dataclass(frozen=True)
class TokenTiles:
    """N tokens in n tiles of T slots each; the n * T - N spare slots repeat tokens.

    Attributes:
        entries: int64 [n, T]; the entry in each slot. Entry e < N is token e, an entry e >= N is spare.
        slots: int64 [n, T]; the token in each slot (spare entries resolved to the token they repeat).
        position: int64 [N]; flat slot number of each token.
        spare: int64 [n * T - N]; flat slot numbers of the spare entries.
    """

    entries: Tensor
    slots: Tensor
    position: Tensor
    spare: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(n, T)."""
        return self.entries.shape[0], self.entries.shape[1]

    def to_slots(self, values: Tensor) -> Tensor:
        """[N, c] by token -> [n, T, c] by slot, zero in spare slots."""
        count, size = self.shape
        by_slot = values.index_select(0, self.slots.reshape(-1))
        if len(self.spare):
            by_slot.index_fill_(0, self.spare, 0)
        return by_slot.view(count, size, -1)

    def to_tokens(self, values: Tensor) -> Tensor:
        """[n, T, c] by slot -> [N, c] by token; what spare slots hold is dropped."""
        return values.reshape(-1, values.shape[-1]).index_select(0, self.position)


def tile_shape(tokens: int, tile_size: int) -> tuple[int, int]:
    """Number n of tiles (a power of two) and tokens T of each, T within a factor sqrt(2) of `tile_size`.

    Tiles of one token are as many as there are tokens.
    """
    if tile_size == 1:
        return tokens, 1
    rounds = max(0, round(math.log2(tokens / tile_size)))
    count = 1 << min(rounds, tokens.bit_length() - 1)
    return count, -(-tokens // count)


def make_tiles(features: Tensor, tile_size: int, order: TileOrder) -> TokenTiles:
    """Split tokens into tiles.

    Args:
        features: float [N, r], what resembling tokens have in common (here: their sketch).
        tile_size: tokens wanted in a tile.
        order: 'similar' bisects by content, 'consecutive' keeps the given order.
    """
    tokens = features.shape[0]
    count, size = tile_shape(tokens, tile_size)
    token_of = torch.arange(count * size, device=features.device) % tokens
    if order == "similar" and 1 < count < tokens:
        entries = _bisect(features[token_of], count)
    else:
        entries = torch.arange(count * size, device=features.device).view(count, size)
    by_entry = torch.empty_like(token_of)
    by_entry[entries.reshape(-1)] = torch.arange(count * size, device=features.device)
    return TokenTiles(entries, token_of[entries], by_entry[:tokens], by_entry[tokens:])


def _bisect(features: Tensor, count: int) -> Tensor:
    """Halve every group across its leading principal direction until there are `count` groups.

    Args:
        features: float [P, r] with P a multiple of `count`, a power of two.

    Returns:
        int64 [count, P / count], the row numbers of `features` in each group.
    """
    groups = features.unsqueeze(0)
    order = torch.arange(len(features), device=features.device).unsqueeze(0)
    while len(groups) < count:
        centred = groups - groups.mean(1, keepdim=True)
        along = torch.bmm(centred, _leading_direction(centred)).squeeze(-1)
        ranking = along.argsort(dim=1)
        order = order.gather(1, ranking).view(2 * len(groups), -1)
        groups = features[order]
    return order


def _leading_direction(centred: Tensor) -> Tensor:
    """[g, p, r] -> [g, r, 1]: about the leading eigenvector of each group's covariance, unnormalised."""
    covariance = torch.bmm(centred.transpose(1, 2), centred)
    scale = covariance.diagonal(dim1=1, dim2=2).sum(1).clamp_min(torch.finfo(centred.dtype).tiny)
    covariance = covariance / scale[:, None, None]
    # The heaviest coordinate's column cannot be orthogonal to the leading direction in practice, and needs no
    # random numbers: the same tokens always give the same tiles.
    heaviest = covariance.diagonal(dim1=1, dim2=2).argmax(1)
    direction = covariance.gather(2, heaviest[:, None, None].expand(-1, covariance.shape[1], 1))
    for _ in range(_POWER_ITERATIONS):
        direction = torch.bmm(covariance, direction)
        direction = direction / direction.abs().amax(1, keepdim=True).clamp_min(torch.finfo(centred.dtype).tiny)
    return direction
