"""Products of token tiles with gathered weight rows, as operators that autograd and torch.compile know.

A tile t of tokens uses the neurons S = `neurons[t]` only. With R the weight rows by neuron (row i is neuron i),
U V the low-rank update and s its scale, the live rows of the tile are

    L_t = R_S + s U_S V                 [k, d]

and there are two products, each the adjoint of the other:

    dot_rows:  h_t = x_t L_t^T (+ b)     tokens to neurons: into an MLP, and the gradient out of it
    sum_rows:  y_t = a_t L_t   (+ b)     neurons to tokens: out of an MLP, and the gradient into it

Gate and up of a gated MLP are one call with two matrices. Gradients flow to tokens, U and V; base rows and biases are
constants. The operators take tensors only, so that a compiled graph can hold them; a backend computes them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import LiveRows, backend_for
from .config import BackendName
from .tiling import TokenTiles

_TILES = "Tensor entries, Tensor slots, Tensor places, Tensor neurons, int tokens"
_MATRICES = "Tensor[] rows, Tensor[] biases, Tensor[] us, Tensor[] vs, float scale, str backend"


def dot_rows(
    x: Tensor, tiles: TokenTiles, neurons: Tensor, matrices: Sequence[LiveRows], scale: float, backend: BackendName
) -> list[Tensor]:
    """h_t = x_t (R_S + s U_S V)^T + b_S of every tile, by matrix: [n, T, k]; differentiable in x, U and V.

    Args:
        x: [N, d] in the compute dtype.
        neurons: int64 [n, k].
        matrices: one, or gate and up, of equal rank.
        scale: s.
    """
    outputs: list[Tensor] = torch.ops.hf_subquad.dot_rows(
        x, *_unpacked(tiles), neurons, tiles.tokens, *_columns(matrices), scale, backend
    )
    return outputs[: len(matrices)]


def sum_rows(
    a: Tensor, tiles: TokenTiles, neurons: Tensor, matrix: LiveRows, scale: float, backend: BackendName
) -> Tensor:
    """y_t = a_t (R_S + s U_S V) + b of every tile, in token order: [N, d]; differentiable in a, U and V.

    Args:
        a: [n, T, k] in the compute dtype.
        The rest as in `dot_rows`.
    """
    outputs: list[Tensor] = torch.ops.hf_subquad.sum_rows(
        [a], *_unpacked(tiles), neurons, tiles.tokens, *_columns([matrix]), scale, backend
    )
    return outputs[0]


def _unpacked(tiles: TokenTiles) -> tuple[Tensor, Tensor, Tensor]:
    return tiles.entries, tiles.slots, tiles.places


def _columns(matrices: Sequence[LiveRows]) -> tuple[list[Tensor], ...]:
    """Rows, biases (all or none), Us and Vs."""
    rows, us, vs = ([getattr(matrix, name) for matrix in matrices] for name in ("rows", "u", "v"))
    biases: list[Tensor] = []
    if any(matrix.bias is not None for matrix in matrices):
        biases = [m.rows.new_zeros(len(m.rows)) if m.bias is None else m.bias for m in matrices]
    return rows, biases, us, vs


def _live(rows: list[Tensor], biases: list[Tensor], us: list[Tensor], vs: list[Tensor], scale: float) -> list[LiveRows]:
    by_matrix: Sequence[Tensor | None] = biases or [None] * len(rows)
    return [LiveRows(r, u, scale * v, bias) for r, u, v, bias in zip(rows, us, vs, by_matrix, strict=True)]


# What the operators do -------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "hf_subquad::dot_rows", mutates_args=(), schema=f"(Tensor x, {_TILES}, {_MATRICES}) -> Tensor[]"
)
def _dot_rows(x, entries, slots, places, neurons, tokens, rows, biases, us, vs, scale, backend):  # type: ignore[no-untyped-def]
    """By matrix h [n, T, k], then x (s V)^T [N, q], those of two matrices side by side."""
    with torch.autocast(x.device.type, enabled=False):
        compact, low = backend_for(backend, x.device).dot_rows(
            x, TokenTiles(entries, slots, places, tokens), neurons, _live(rows, biases, us, vs, scale)
        )
    return [*(h.data for h in compact), low]  # no views to autograd, so that an activation may work in place


@torch.library.custom_op(
    "hf_subquad::sum_rows", mutates_args=(), schema=f"(Tensor[] a, {_TILES}, {_MATRICES}) -> Tensor[]"
)
def _sum_rows(a, entries, slots, places, neurons, tokens, rows, biases, us, vs, scale, backend):  # type: ignore[no-untyped-def]
    """y [N, d], summed over the matrices, then a_t U_S [N, q], those of two matrices side by side."""
    device = a[0].device
    with torch.autocast(device.type, enabled=False):
        y, low = backend_for(backend, device).sum_rows(
            a, TokenTiles(entries, slots, places, tokens), neurons, _live(rows, biases, us, vs, scale)
        )
    return [y.data, low]  # no view to autograd, so that a residual may be added in place


@torch.library.custom_op(
    "hf_subquad::update_gradients",
    mutates_args=(),
    schema=f"(Tensor a, Tensor a_low, Tensor x, Tensor x_low, {_TILES}, int count, str backend) -> (Tensor, Tensor)",
)
def _update_gradients(a, a_low, x, x_low, entries, slots, places, neurons, tokens, count, backend):  # type: ignore[no-untyped-def]
    """Gradients with respect to U [m, q] and s V [q, d]."""
    with torch.autocast(x.device.type, enabled=False):
        return backend_for(backend, x.device).update_gradients(
            a, a_low, x, x_low, TokenTiles(entries, slots, places, tokens), neurons, count
        )


# Shapes, dtypes and strides of what they return -------------------------------------------------------------------


@_dot_rows.register_fake
def _(x, entries, slots, places, neurons, tokens, rows, biases, us, vs, scale, backend):  # type: ignore[no-untyped-def]
    (count, size), active = entries.shape, neurons.shape[1]
    compact = [backend_for(backend, x.device).new_compact(x, count, size, active) for _ in rows]
    return [*compact, x.new_empty(tokens, sum(len(v) for v in vs))]


@_sum_rows.register_fake
def _(a, entries, slots, places, neurons, tokens, rows, biases, us, vs, scale, backend):  # type: ignore[no-untyped-def]
    return [a[0].new_empty(tokens, rows[0].shape[1]), a[0].new_empty(tokens, sum(len(v) for v in vs))]


@_update_gradients.register_fake
def _(a, a_low, x, x_low, entries, slots, places, neurons, tokens, count, backend):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(a.dtype, torch.float32)
    rank, width = a_low.shape[1], x.shape[1]
    return a.new_empty(count, rank, dtype=dtype), a.new_empty(rank, width, dtype=dtype)


# Gradients: each product's is the other product ---------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    values, *tiling, tokens, rows, biases, us, vs, scale, backend = inputs
    ctx.count, ctx.biases, ctx.tokens, ctx.how = len(rows), len(biases), tokens, (scale, backend)
    ctx.save_for_backward(*tiling, *rows, *us, *vs, output[-1], *(values if isinstance(values, list) else [values]))


def _kept(ctx: Any) -> tuple[list[Tensor], tuple[list[Tensor], ...], Tensor, list[Tensor]]:
    """Tiling and neurons; rows, Us and Vs by matrix; what was multiplied with one factor, and what was multiplied."""
    saved = list(ctx.saved_tensors)  # checkpointing lets them be unpacked once
    tiling, matrices, (low, *values) = saved[:4], saved[4 : 4 + 3 * ctx.count], saved[4 + 3 * ctx.count :]
    return tiling, tuple(matrices[i : i + ctx.count] for i in range(0, len(matrices), ctx.count)), low, values


def _dot_rows_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    tiling, (rows, us, vs), x_low, (x,) = _kept(ctx)
    grad_h = grads[: ctx.count]
    grad_x, grad_low = torch.ops.hf_subquad.sum_rows(grad_h, *tiling, ctx.tokens, rows, [], us, vs, *ctx.how)
    factors = _factor_gradients(ctx, grad_h, grad_low, x, x_low, tiling, us, vs)
    return grad_x, *_constants(ctx), *factors, None, None


def _sum_rows_backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    tiling, (rows, us, vs), a_low, a = _kept(ctx)
    grad_y = grads[0]
    *grad_a, grad_low = torch.ops.hf_subquad.dot_rows(grad_y, *tiling, ctx.tokens, rows, [], us, vs, *ctx.how)
    factors = _factor_gradients(ctx, a, a_low, grad_y, grad_low, tiling, us, vs)
    return grad_a, *_constants(ctx), *factors, None, None


def _constants(ctx: Any) -> tuple[Any, ...]:
    """No gradients for the tiling, the neurons, the number of tokens, rows and biases."""
    return (None,) * 5 + ([None] * ctx.count, [None] * ctx.biases)


def _factor_gradients(ctx, a, a_low, x, x_low, tiling, us, vs):  # type: ignore[no-untyped-def]
    """By matrix the gradients of U, and those of V."""
    scale, backend = ctx.how
    grad_us, grad_vs = [], []
    lows = zip(a_low.chunk(ctx.count, dim=1), x_low.chunk(ctx.count, dim=1), strict=True)
    for a_i, (a_low_i, x_low_i), u, v in zip(a, lows, us, vs, strict=True):
        grad_u, grad_v = torch.ops.hf_subquad.update_gradients(
            a_i, a_low_i, x, x_low_i, *tiling, ctx.tokens, len(u), backend
        )
        grad_us.append(grad_u.to(u.dtype))
        grad_vs.append((scale * grad_v).to(v.dtype))
    return grad_us, grad_vs


_dot_rows.register_autograd(_dot_rows_backward, setup_context=_keep)
_sum_rows.register_autograd(_sum_rows_backward, setup_context=_keep)
