"""Products of token tiles with gathered weight rows, and their gradients.

A tile t of tokens uses the neurons `neurons[t]` only. With R the weight rows by neuron (row i is neuron i),
U V the low-rank update and s its scale, the live rows of the tile are

    L_t = R[neurons[t]] + s U[neurons[t]] V                 [k, d]

and there are two products, each the adjoint of the other:

    dot_rows:  h_t = x_t L_t^T (+ b)     tokens to neurons: into an MLP, and the gradient out of it
    sum_rows:  y_t = a_t L_t   (+ b)     neurons to tokens: out of an MLP, and the gradient into it

One dense GEMM on gathered rows per tile; nothing of size m is computed. Compact tensors [n, T, k] are stored
neuron-major (as [n, k, T], transposed): the GEMM that writes them then streams the gathered rows without repacking.
"""

import threading
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .tiling import TokenTiles


def dot_rows(
    x: Tensor, tiles: TokenTiles, neurons: Tensor, rows: Tensor, bias: Tensor | None, update: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """h_t = x_t (R_S + U_S V)^T + b_S, for every tile.

    One GEMM a tile, [R_S, U_S, b_S] [x_t, x_t V^T, 1]^T.

    Args:
        x: [N, d] in the compute dtype.
        neurons: int64 [n, k].
        rows: [m, d] in the compute dtype.
        bias: [m] or None.
        update: U [m, q] and s V [q, d], any dtype.

    Returns:
        h [n, T, k] and x (s V)^T [N, q], both in the compute dtype.
    """
    (count, size), (_, width) = tiles.shape, rows.shape
    u, v = (factor.to(x.dtype) for factor in update)
    low = x @ v.t()
    per_row, per_token = u, low
    if bias is not None:
        per_row = torch.cat([u, bias.to(x.dtype).unsqueeze(1)], 1)
        per_token = torch.cat([low, low.new_ones(len(low), 1)], 1)
    by_neuron = x.new_empty(count, neurons.shape[1], size)
    right = _scratch("rows", x, neurons.shape[1], width + per_row.shape[1])
    left = _scratch("tile", x, size, width + per_row.shape[1])
    for t in range(count):
        torch.index_select(rows, 0, neurons[t], out=right[:, :width])
        torch.index_select(per_row, 0, neurons[t], out=right[:, width:])
        torch.index_select(x, 0, tiles.slots[t], out=left[:, :width])
        torch.index_select(per_token, 0, tiles.slots[t], out=left[:, width:])
        torch.mm(right, left.t(), out=by_neuron[t])
    return by_neuron.transpose(1, 2), low


def sum_rows(
    a: Tensor, tiles: TokenTiles, neurons: Tensor, rows: Tensor, bias: Tensor | None, update: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """y_t = a_t (R_S + U_S V) + b, back in token order.

    One GEMM a tile, [a_t, a_t U_S, 1] [R_S; V; b].

    Args:
        a: [n, T, k] in the compute dtype.
        bias: [d] or None.
        The rest as in `dot_rows`.

    Returns:
        y [N, d] and a_t U_S [N, q], both in the compute dtype.
    """
    (count, size), active, width = tiles.shape, neurons.shape[1], rows.shape[1]
    u, v = (factor.to(a.dtype) for factor in update)
    low = torch.bmm(a, u.index_select(0, neurons.reshape(-1)).view(count, active, -1))
    shared = v if bias is None else torch.cat([v, bias.to(a.dtype).unsqueeze(0)])
    right = _scratch("rows", a, active + len(shared), width)
    left = _scratch("tile", a, size, active + len(shared))
    right[active:] = shared
    left[:, active:] = 1  # what stays of it is the bias's column
    y_t = _scratch("output", a, size, width)
    y = a.new_empty(count * size, width)  # the rows past N take the spare slots' output
    for t in range(count):
        torch.index_select(rows, 0, neurons[t], out=right[:active])
        left[:, :active] = a[t]
        left[:, active : active + len(v)] = low[t]
        y.index_copy_(0, tiles.entries[t], torch.mm(left, right, out=y_t))
    return y[: len(tiles.position)], tiles.to_tokens(low)


def update_gradients(
    a: Tensor, a_low: Tensor, x: Tensor, x_low: Tensor, tiles: TokenTiles, neurons: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Gradients of sum_t <a_t, x_t (U_S V s)^T> with respect to U and to s V, in at least float32.

    Args:
        a: [n, T, k], zero in spare slots unless `x` is what is zero there.
        a_low: a_t U_S, [N, q].
        x: [N, d].
        x_low: x (s V)^T, [N, q].
        count: number m of rows of U.

    Returns:
        [m, q] and [q, d].
    """
    dtype = torch.promote_types(a.dtype, torch.float32)
    by_neuron = torch.bmm(a.transpose(1, 2), tiles.to_slots(x_low)).to(dtype)
    grad_u = by_neuron.new_zeros(count, by_neuron.shape[-1])
    grad_u.index_add_(0, neurons.reshape(-1), by_neuron.view(-1, by_neuron.shape[-1]))
    return grad_u, (a_low.t() @ x).to(dtype)


class DotRows(torch.autograd.Function):
    """`dot_rows` with gradients for x, U and V; the base rows and the bias are constants."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, u: Tensor, v: Tensor, rows: Tensor, bias: Tensor | None,
        tiles: TokenTiles, neurons: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        with torch.autocast(x.device.type, enabled=False):
            h, low = dot_rows(x, tiles, neurons, rows, bias, (u, scale * v))
        ctx.save_for_backward(x, u, v, rows, low)
        ctx.tiles, ctx.neurons, ctx.scale = tiles, neurons, scale
        return h.data  # no view to autograd, so that an activation may work in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: Tensor) -> tuple[Tensor | None, ...]:
        x, u, v, rows, x_low = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            grad_x, grad_low = sum_rows(grad_h, ctx.tiles, ctx.neurons, rows, None, (u, ctx.scale * v))
            grad_u, grad_v = update_gradients(grad_h, grad_low, x, x_low, ctx.tiles, ctx.neurons, len(u))
        return grad_x, grad_u.to(u.dtype), grad_v.mul_(ctx.scale).to(v.dtype), None, None, None, None, None


class SumRows(torch.autograd.Function):
    """`sum_rows` with gradients for a, U and V; the base rows and the bias are constants."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, u: Tensor, v: Tensor, rows: Tensor, bias: Tensor | None,
        tiles: TokenTiles, neurons: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        with torch.autocast(a.device.type, enabled=False):
            y, low = sum_rows(a, tiles, neurons, rows, bias, (u, scale * v))
        ctx.save_for_backward(a, u, v, rows, low)
        ctx.tiles, ctx.neurons, ctx.scale = tiles, neurons, scale
        return y.data  # no view to autograd, so that a residual may be added in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        a, u, v, rows, a_low = ctx.saved_tensors
        tiles: TokenTiles = ctx.tiles
        with torch.autocast(a.device.type, enabled=False):
            grad_a, grad_low = dot_rows(grad_y, tiles, ctx.neurons, rows, None, (u, ctx.scale * v))
            if len(tiles.spare):
                size = tiles.shape[1]
                grad_a[tiles.spare // size, tiles.spare % size] = 0
            grad_u, grad_v = update_gradients(a, a_low, grad_y, grad_low, tiles, ctx.neurons, len(u))
        return grad_a, grad_u.to(u.dtype), grad_v.mul_(ctx.scale).to(v.dtype), None, None, None, None, None


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
            memory = torch.empty(rows * pitch, dtype=like.dtype)
        setattr(_held, role, memory)
    padded = memory[: rows * pitch].view(rows, pitch)
    padded[:, columns:] = 0
    return padded[:, :columns]
