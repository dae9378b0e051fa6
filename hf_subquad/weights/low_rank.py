"""The trainable update U V of a frozen weight matrix."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ParallelismError
from .shards import is_shard, whole


class LowRankUpdate(nn.Module):
    """scale * U V added to weight rows R; row i of U belongs to neuron i.

    U is [m, q], V is [q, d], both at least float32 whatever the dtype of R. One of them starts at zero, so the update
    starts at zero; the other starts uniform in +-1/sqrt(fan in), as in LoRA (Hu et al. 2021).

    Args:
        neurons: m.
        width: d.
        zero: which factor starts at zero: the one on the output side of the projection.
    """

    def __init__(
        self, neurons: int, width: int, rank: int, scale: float, zero: Literal["U", "V"], seed: int, like: Tensor
    ) -> None:
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.U = nn.Parameter(torch.zeros(neurons, rank, dtype=dtype, device=like.device))
        self.V = nn.Parameter(torch.zeros(rank, width, dtype=dtype, device=like.device))
        self.scale = scale
        self.zero = zero
        self.seed = seed
        self.restarts = -1
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Set the update to zero, with a new random factor from a new seed."""
        self.restarts += 1
        generator = torch.Generator().manual_seed(self.seed + self.restarts)
        zero, drawn = (self.U, self.V) if self.zero == "U" else (self.V, self.U)
        fan_in = self.V.shape[1] if self.zero == "U" else self.U.shape[0]
        values = torch.rand(drawn.shape, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1
        drawn.copy_(values / math.sqrt(fan_in))
        zero.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """U [m, q] and scale * V [q, d].

        Raises:
            ParallelismError: FSDP holds them in shards now.
        """
        if is_shard(self.U):
            raise ParallelismError(
                "weights of a patched MLP are needed while FSDP holds them in shards: shard decoder layers or whole "
                "MLPs, not single projections, and call what works on weights before fully_shard"
            )
        return self.U, self.V if self.scale == 1 else self.scale * self.V

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Saves nothing: the projection saves its weight with the update merged in."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Loads nothing, and reports nothing missing: a plain checkpoint has no factors."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LowRankUpdate":
        """Follow `model.to(device)` and `model.double()`, but stay at least float32 under `model.bfloat16()`."""

        def keeping_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device)

        return super()._apply(keeping_precision, recurse)

    @torch.no_grad()
    def is_zero(self) -> bool:
        return not (bool(whole(self.U).any()) and bool(whole(self.V).any()))

    @torch.no_grad()
    def norm_squared(self) -> Tensor:
        """||scale U V||_F^2 as trace((U^T U) (V V^T)), without forming the product."""
        u, v = whole(self.U), whole(self.V)
        gram = (u.t() @ u) * (v @ v.t())
        return gram.sum().clamp_min(0) * self.scale**2

    @torch.no_grad()
    def added_to(self, rows: Tensor, sign: int = 1) -> Tensor:
        """rows + sign * scale U V [m, d], accumulated in at least float32, in the dtype of `rows`.

        Bit-identical to `rows` if the update is zero (adding 0.0 would turn -0.0 into 0.0).
        """
        u, v = self.factors()
        if not rows.is_meta and self.is_zero():
            return rows
        return torch.addmm(rows.to(u.dtype), u, v, alpha=sign).to(rows.dtype)
