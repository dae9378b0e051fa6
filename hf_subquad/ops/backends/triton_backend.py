"""Triton kernels for 16 and 32-bit floats; PyTorch computes what they do not cover (float64, other activations)."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ..activations import name_of
from ..group_tokens import TokenTiles
from . import triton_products, triton_selection, triton_tiles
from .interface import MergedWeight, Scoring
from .torch_backend import TorchBackend

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_STEP = 64  # neurons; kernels whose blocks are all full load without masks


class TritonBackend(TorchBackend):
    """Kernels gather rows as they load them, so that rows are read from device memory once, as in a dense GEMM."""

    most_scored = 16  # that a program of the kernel holds

    def bisect(self, features: Tensor, count: int, size: int) -> Tensor:
        return triton_tiles.bisect(features, count, size)

    def tile_scores(self, sample: Tensor, scoring: Scoring) -> Tensor:
        activation, dtype = name_of(scoring.activation), sample.dtype
        ranks = len(scoring.basis), max(estimated.u.shape[1] for estimated in scoring.inputs)
        if activation is None or not triton_selection.covers(dtype, *ranks):
            return super().tile_scores(sample, scoring)
        sizes = [len(scoring.basis), *(len(estimated.v) for estimated in scoring.inputs)]
        directions = torch.cat([scoring.basis.to(dtype), *(estimated.v.to(dtype) for estimated in scoring.inputs)])
        sketched, *lows = (sample @ directions.t()).split(sizes, dim=-1)
        inputs = [(e.rows, low, e.u, e.bias) for e, low in zip(scoring.inputs, lows, strict=True)]
        return triton_selection.tile_scores(sketched, inputs, activation, scoring.output_norms)

    def top_neurons(self, scores: Tensor, k: int) -> Tensor:
        return triton_selection.top_neurons(scores, k)

    def round_up_k(self, k: int) -> int:
        return -(-k // _STEP) * _STEP

    def compact(self, flat: Tensor, tiles: TokenTiles, active: int) -> Tensor:
        return flat.view(*tiles.shape, active)

    def gathered_up(
        self, x: Tensor, tiles: TokenTiles, neurons: Tensor, matrices: Sequence[MergedWeight], out: Sequence[Tensor]
    ) -> Tensor:
        if x.dtype not in _DTYPES:
            return super().gathered_up(x, tiles, neurons, matrices, out)
        low = x @ torch.cat([matrix.v for matrix in matrices]).to(x.dtype).t()
        rows, biases, us = ([getattr(m, name) for m in matrices] for name in ("rows", "bias", "u"))
        lows = low.chunk(len(matrices), dim=1)
        triton_products.gathered_up(x, tiles.entries, neurons, rows, biases, us, lows, out)
        return low

    def gathered_down(
        self, a: Sequence[Tensor], tiles: TokenTiles, neurons: Tensor, matrices: Sequence[MergedWeight]
    ) -> tuple[Tensor, Tensor]:
        if a[0].dtype not in _DTYPES:
            return super().gathered_down(a, tiles, neurons, matrices)
        lows = [
            triton_products.per_token(values, tiles.entries, neurons, matrix.u, tiles.tokens)
            for values, matrix in zip(a, matrices, strict=True)
        ]
        rows, vs = [matrix.rows for matrix in matrices], [matrix.v for matrix in matrices]
        biases = [matrix.bias for matrix in matrices if matrix.bias is not None]
        bias = reduce(torch.add, biases) if biases else None
        y = triton_products.gathered_down(a, tiles.entries, neurons, rows, lows, vs, bias)
        return y, lows[0] if len(lows) == 1 else torch.cat(lows, 1)

    def update_gradients(
        self, a: Tensor, a_low: Tensor, x: Tensor, x_low: Tensor, tiles: TokenTiles, neurons: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        if a.dtype not in _DTYPES:
            return super().update_gradients(a, a_low, x, x_low, tiles, neurons, count)
        grad_u = triton_products.per_neuron(a, tiles.entries, neurons, x_low, count)
        return grad_u, (a_low.t() @ x).float()
