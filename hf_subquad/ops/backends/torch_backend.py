"""The reference: PyTorch operations, on any device and in any dtype, tuned for CPUs.

With s the scale that is in V, the products of a tile are single dense GEMMs over its gathered rows:

    gathered_up:  [R_S, U_S, b_S] [x_t, x_t V^T, 1]^T
    gathered_down:  [a_t, a_t U_S, 1] [R_S; V; b]

Compact tensors [n, T, k] are stored neuron-major (as [n, k, T], transposed): the GEMM that writes them then streams the
gathered rows without repacking.
"""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import group_tokens as tiling
from ..group_tokens import TokenTiles
from ..importance import importance
from .interface import Backend, MergedWeight, Scoring


class TorchBackend(Backend):
    """One GEMM on gathered rows per tile and matrix; nothing of size m is computed."""

    def bisect(self, features: Tensor, count: int, size: int) -> Tensor:
        return tiling.bisect(features, count, size)

    def tile_scores(self, sample: Tensor, scoring: Scoring) -> Tensor:
        tokens = sample.flatten(0, 1)
        sketched = tokens @ scoring.basis.to(tokens.dtype).t()
        pre = []
        for estimated in scoring.inputs:
            codes = torch.cat([estimated.rows, estimated.u.to(estimated.rows)], 1).to(tokens.dtype)
            features = torch.cat([sketched, tokens @ estimated.v.to(tokens.dtype).t()], 1)
            bias = features.new_zeros(1) if estimated.bias is None else estimated.bias.to(features.dtype)
            pre.append(torch.addmm(bias, features, codes.t()))
        scores = importance(pre, scoring.activation, gated=len(pre) == 2)
        return scores.view(*sample.shape[:2], -1).sum(1, dtype=torch.float32) * scoring.output_norms

    def top_neurons(self, scores: Tensor, k: int) -> Tensor:
        return scores.topk(k, dim=1, sorted=False).indices

    def round_up_k(self, k: int) -> int:
        return k

    def compact(self, flat: Tensor, tiles: TokenTiles, active: int) -> Tensor:
        return flat.view(tiles.shape[0], active, tiles.shape[1]).transpose(1, 2)

    def gathered_up(
        self, x: Tensor, tiles: TokenTiles, neurons: Tensor, matrices: Sequence[MergedWeight], out: Sequence[Tensor]
    ) -> Tensor:
        (count, size), width, active = tiles.shape, x.shape[1], neurons.shape[1]
        low = x @ torch.cat([matrix.v.to(x.dtype) for matrix in matrices]).t()
        per_row, per_token = [matrix.u.to(x.dtype) for matrix in matrices], list(low.chunk(len(matrices), dim=1))
        if any(matrix.bias is not None for matrix in matrices):
            ones, zeros = x.new_ones(len(x), 1), x.new_zeros(len(per_row[0]))
            biases = [zeros if matrix.bias is None else matrix.bias.to(x.dtype) for matrix in matrices]
            per_row = [torch.cat([u, bias.unsqueeze(1)], 1) for u, bias in zip(per_row, biases, strict=True)]
            per_token = [torch.cat([part, ones], 1) for part in per_token]
        right = _scratch("rows", x, active, width + per_row[0].shape[1])
        left = _scratch("tile", x, size, width + per_row[0].shape[1])
        for t in range(count):
            torch.index_select(x, 0, tiles.slots[t], out=left[:, :width])
            for i, matrix in enumerate(matrices):
                torch.index_select(per_token[i], 0, tiles.slots[t], out=left[:, width:])
                torch.index_select(matrix.rows, 0, neurons[t], out=right[:, :width])
                torch.index_select(per_row[i], 0, neurons[t], out=right[:, width:])
                torch.mm(right, left.t(), out=out[i][t].t())
        if count * size > tiles.tokens:
            spare = tiles.spare
            for matrix, h in zip(matrices, out, strict=True):
                bias = x.new_zeros(1) if matrix.bias is None else matrix.bias.to(x.dtype)[neurons[spare // size]]
                h[spare // size, spare % size] = bias
        return low

    def gathered_down(
        self, a: Sequence[Tensor], tiles: TokenTiles, neurons: Tensor, matrices: Sequence[MergedWeight]
    ) -> tuple[Tensor, Tensor]:
        (count, size), active, like = tiles.shape, neurons.shape[1], a[0]
        width = matrices[0].rows.shape[1]
        us, vs = (
            [factor.to(like.dtype) for factor in factors]
            for factors in zip(*((m.u, m.v) for m in matrices), strict=True)
        )
        chosen = neurons.reshape(-1)
        low = torch.cat(
            [torch.bmm(a_i, u.index_select(0, chosen).view(count, active, -1)) for a_i, u in zip(a, us, strict=True)], 2
        )
        biases = [matrix.bias.to(like.dtype).unsqueeze(0) for matrix in matrices if matrix.bias is not None]
        shared = torch.cat([*vs, *biases])
        split, depth = len(matrices) * active, len(matrices) * active + len(shared)
        right = _scratch("rows", like, depth, width)
        left = _scratch("tile", like, size, depth)
        right[split:] = shared
        left[:, split:] = 1  # what stays of it are the biases' columns
        y_t = _scratch("output", like, size, width)
        y = like.new_empty(count * size, width)  # the rows past N take the spare slots' output
        for t in range(count):
            for i, matrix in enumerate(matrices):
                part = slice(i * active, (i + 1) * active)
                torch.index_select(matrix.rows, 0, neurons[t], out=right[part])
                left[:, part] = a[i][t]
            left[:, split : split + low.shape[2]] = low[t]
            y.index_copy_(0, tiles.entries[t], torch.mm(left, right, out=y_t))
        return y[: tiles.tokens], tiles.to_tokens(low)

    def update_gradients(
        self, a: Tensor, a_low: Tensor, x: Tensor, x_low: Tensor, tiles: TokenTiles, neurons: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(a.dtype, torch.float32)
        by_neuron = torch.bmm(a.transpose(1, 2), tiles.to_slots(x_low)).to(dtype)
        grad_u = by_neuron.new_zeros(count, by_neuron.shape[-1])
        grad_u.index_add_(0, neurons.reshape(-1), by_neuron.view(-1, by_neuron.shape[-1]))
        return grad_u, (a_low.t() @ x).to(dtype)


_held = threading.local()


def _scratch(role: str, like: Tensor, rows: int, columns: int) -> Tensor:
    """An uninitialised [rows, columns] for use within one call; on the CPU the same memory again on each call.

    Fresh memory of this size may be mapped by the system page by page, which can cost more than filling it.
    Rows start at multiples of 64 bytes, which GEMMs want. What lies between them is zero: oneDNN's low-precision GEMM
    multiplies the first of it by zero, and would make NaN of what an earlier call left there.
    """
    pitch = -(-columns * like.itemsize // 64) * 64 // like.itemsize
    if like.device.type != "cpu":
        return like.new_zeros(rows, pitch)[:, :columns]
    memory: Tensor | None = getattr(_held, role, None)
    if memory is None or memory.dtype != like.dtype or len(memory) < rows * pitch:
        with torch.inference_mode(False):  # inference tensors could not be used in training later
            memory = torch.empty(rows * pitch, dtype=like.dtype, device=like.device)
        setattr(_held, role, memory)
    padded = memory[: rows * pitch].view(rows, pitch)
    padded[:, columns:] = 0
    return padded[:, :columns]
