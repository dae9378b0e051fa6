"""Random inputs of every operation of a backend, and what the operations are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_subquad.ops.backends import Backend, EstimatedInput, MergedWeight, Scoring
from hf_subquad.ops.token_tiles import TokenTiles

_SAMPLED = 16  # tokens of a tile that are scored
_DIRECTIONS = 64  # of a sketch
_SPARE = 7.0  # what spare slots hold, which must not count


@dataclass(frozen=True)
class ProblemSize:
    """N tokens in n tiles of T slots, k of m neurons, d features, rank q; n * T >= N."""

    name: str
    tokens: int
    tiles: int
    slots: int
    active: int
    neurons: int
    width: int
    rank: int


@dataclass
class Problem:
    """Inputs, the same in every dtype they are given in: `to` float64 changes no value.

    Attributes:
        a: [n, T, k] each, of two matrices.
        matrices: into neurons, two.
        outputs: the same rows with a bias [d].
        gated, plain: what scores are estimated from.
        features: float32 [N, 32].
    """

    size: ProblemSize
    x: Tensor
    a: list[Tensor]
    tiles: TokenTiles
    neurons: Tensor
    matrices: list[MergedWeight]
    outputs: list[MergedWeight]
    x_low: Tensor
    a_low: Tensor
    gated: Scoring
    plain: Scoring
    features: Tensor

    @property
    def sample(self) -> Tensor:
        """Some tokens of each tile, [n, t, d]."""
        return self.x[self.tiles.slots[:, :: -(-self.size.slots // _SAMPLED)]]

    def to(self, dtype: torch.dtype) -> "Problem":
        def cast(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.to(dtype)
            if isinstance(value, list | tuple):
                return [cast(each) for each in value]
            if isinstance(value, MergedWeight | EstimatedInput | Scoring):
                return replace(value, **{name: cast(part) for name, part in vars(value).items()})
            return value

        return replace(self, **{name: cast(value) for name, value in vars(self).items() if name != "features"})


def make(size: ProblemSize, dtype: torch.dtype, device: torch.device) -> Problem:
    torch.manual_seed(1)

    def some(*shape: int, spread: float = 1.0) -> Tensor:
        """Normal, of values that `dtype` holds."""
        return (spread * torch.randn(*shape, device=device)).to(dtype)

    n, slots, k, m, d, q = size.tiles, size.slots, size.active, size.neurons, size.width, size.rank
    entries = torch.randperm(n * slots, device=device).view(n, slots)
    tiles = TokenTiles.of(entries, size.tokens)
    neurons = torch.rand(n, m, device=device).argsort(1)[:, :k].sort(1).values
    spare = (entries >= size.tokens).unsqueeze(-1)
    # Updates as large as the rows: an error in them shows.
    factors = [(some(m, q, spread=q**-0.5).float(), some(q, d, spread=d**-0.5).float()) for _ in range(2)]
    matrices = [MergedWeight(some(m, d, spread=d**-0.5), u, v, some(m)) for u, v in factors]
    directions = min(_DIRECTIONS, d)
    estimated = [
        EstimatedInput(some(m, directions, spread=directions**-0.5).float(), u, v, some(m, spread=0.1).float())
        for u, v in factors
    ]
    basis, norms = some(directions, d, spread=d**-0.5).float(), some(m).float().square()
    return Problem(
        size=size,
        x=some(size.tokens, d),
        a=[some(n, slots, k).masked_fill_(spare, _SPARE) for _ in range(2)],
        tiles=tiles,
        neurons=neurons,
        matrices=matrices,
        outputs=[replace(matrix, bias=some(d)) for matrix in matrices],
        x_low=some(size.tokens, q),
        a_low=some(size.tokens, q),
        gated=Scoring(basis, estimated, F.silu, norms),
        plain=Scoring(basis, estimated[:1], F.relu, norms),
        features=torch.randn(size.tokens, min(32, d), device=device),
    )


Operation = Callable[[Backend, Problem], Sequence[Tensor]]


def gathered_up(backend: Backend, p: Problem, count: int) -> list[Tensor]:
    compact, low = backend.gathered_up(p.x, p.tiles, p.neurons, p.matrices[:count])
    return [*compact, low]


def gathered_down(backend: Backend, p: Problem, count: int) -> list[Tensor]:
    return [*backend.gathered_down(p.a[:count], p.tiles, p.neurons, p.outputs[:count])]


def update_gradients(backend: Backend, p: Problem) -> list[Tensor]:
    return [*backend.update_gradients(p.a[0], p.a_low, p.x, p.x_low, p.tiles, p.neurons, p.size.neurons)]


OPERATIONS: dict[str, Operation] = {
    "gathered_up": lambda backend, p: gathered_up(backend, p, 1),
    "gathered_up, two matrices": lambda backend, p: gathered_up(backend, p, 2),
    "gathered_down": lambda backend, p: gathered_down(backend, p, 1),
    "gathered_down, two matrices": lambda backend, p: gathered_down(backend, p, 2),
    "update_gradients": update_gradients,
    "tile_scores, SiLU gated": lambda backend, p: [backend.tile_scores(p.sample, p.gated)],
    "tile_scores, ReLU": lambda backend, p: [backend.tile_scores(p.sample, p.plain)],
}
