"""Products of token tiles with gathered weight rows, with gradients, also in compiled graphs.

A tile t of tokens uses the neurons S = `neurons[t]` only. With R the weight rows by neuron (row i is neuron i),
U V the low-rank update, its scale in V, the live rows of the tile are

    L_t = R_S + U_S V                   [k, d]

and there are two products, each the adjoint of the other:

    gathered_up:  h_t = x_t L_t^T (+ b)     tokens to neurons: into an MLP, and the gradient out of it
    gathered_down:  y_t = a_t L_t   (+ b)     neurons to tokens: out of an MLP, and the gradient into it

Gate and up of a gated MLP are one call with two matrices. Gradients flow to tokens, U and V; base rows and biases are
constants. A backend computes the products. Compiled graphs contain them as operators; without a compiler they are
called directly, which saves the overhead of PyTorch's dispatcher.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import BackendName
from .backends import MergedWeight, backend_for
from .token_tiles import TokenTiles


def gathered_up(
    x: Tensor, tiles: TokenTiles, neurons: Tensor, matrices: Sequence[MergedWeight], backend: BackendName
) -> tuple[Tensor, ...]:
    """h_t = x_t (R_S + U_S V)^T + b_S of every tile, by matrix: [n, T, k]; differentiable in x, U and V.

    Args:
        x: [N, d] in the compute dtype.
        neurons: int64 [n, k].
        matrices: one, or gate and up, of equal rank.
    """
    tensors = tiles.entries, tiles.slots, tiles.places, neurons
    found: tuple[Tensor, ...] = _GatheredUp.apply(x, *tensors, tiles.tokens, backend, *_flat(matrices))
    return found


def gathered_down(a: Tensor, tiles: TokenTiles, neurons: Tensor, matrix: MergedWeight, backend: BackendName) -> Tensor:
    """y_t = a_t (R_S + U_S V) + b of every tile, in token order: [N, d]; differentiable in a, U and V.

    Args:
        a: [n, T, k] in the compute dtype.
        The rest as in `gathered_up`.
    """
    tensors = tiles.entries, tiles.slots, tiles.places, neurons
    y: Tensor = _GatheredDown.apply(a, *tensors, tiles.tokens, backend, *_flat([matrix]))
    return y


def _flat(matrices: Sequence[MergedWeight]) -> list[Tensor | None]:
    """Us, Vs, rows and biases, as autograd takes them."""
    return [getattr(matrix, name) for name in ("u", "v", "rows", "bias") for matrix in matrices]


def _by_matrix(flat: Sequence[Any]) -> tuple[list[Any], ...]:
    """Undo `_flat`: Us, Vs, rows, biases."""
    count = len(flat) // 4
    return tuple(list(flat[i : i + count]) for i in range(0, len(flat), count))


# With gradients ---------------------------------------------------------------------------------------------------


class _GatheredUp(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, x: Tensor, entries, slots, places, neurons, tokens: int, backend: str, *flat
    ) -> tuple[Tensor, ...]:
        us, vs, rows, biases = _by_matrix(flat)
        how = (entries, slots, places, neurons, tokens)
        *compact, low = _run("gathered_up", x, *how, rows, _all_or_none(biases, rows), us, vs, backend)
        ctx.save_for_backward(entries, slots, places, neurons, x, low, *us, *vs, *rows)
        ctx.count, ctx.tokens, ctx.backend = len(us), tokens, backend
        return tuple(compact)

    @staticmethod
    def backward(ctx: Any, *grad_h: Tensor) -> tuple[Any, ...]:
        entries, slots, places, neurons, x, low, *factors = ctx.saved_tensors
        how, (us, vs, rows) = (entries, slots, places, neurons, ctx.tokens), _thirds(factors)
        grad_x, grad_low = _run("gathered_down", list(grad_h), *how, rows, [], us, vs, ctx.backend)
        gradients = _factor_gradients(ctx, how, grad_h, grad_low, x, low, us, vs)
        return grad_x, *(None,) * 6, *gradients, *(None,) * 2 * ctx.count


class _GatheredDown(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, a: Tensor, entries, slots, places, neurons, tokens: int, backend: str, *flat
    ) -> Tensor:
        us, vs, rows, biases = _by_matrix(flat)
        how = (entries, slots, places, neurons, tokens)
        y, low = _run("gathered_down", [a], *how, rows, _all_or_none(biases, rows), us, vs, backend)
        ctx.save_for_backward(entries, slots, places, neurons, a, low, *us, *vs, *rows)
        ctx.count, ctx.tokens, ctx.backend = len(us), tokens, backend
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        entries, slots, places, neurons, a, low, *factors = ctx.saved_tensors
        how, (us, vs, rows) = (entries, slots, places, neurons, ctx.tokens), _thirds(factors)
        grad_a, grad_low = _run("gathered_up", grad_y, *how, rows, [], us, vs, ctx.backend)
        gradients = _factor_gradients(ctx, how, [a], low, grad_y, grad_low, us, vs)
        return grad_a, *(None,) * 6, *gradients, *(None,) * 2 * ctx.count


def _all_or_none(biases: list[Tensor | None], rows: list[Tensor]) -> list[Tensor]:
    if all(bias is None for bias in biases):
        return []
    return [r.new_zeros(len(r)) if bias is None else bias for bias, r in zip(biases, rows, strict=True)]


def _thirds(tensors: list[Tensor]) -> list[list[Tensor]]:
    count = len(tensors) // 3
    return [tensors[:count], tensors[count : 2 * count], tensors[2 * count :]]


def _factor_gradients(  # type: ignore[no-untyped-def]
    ctx: Any, how, a: Sequence[Tensor], a_low: Tensor, x: Tensor, x_low: Tensor, us: list[Tensor], vs: list[Tensor]
) -> list[Tensor]:
    """Gradients of the Us, then of the Vs."""
    grad_us, grad_vs = [], []
    lows = zip(a_low.chunk(ctx.count, dim=1), x_low.chunk(ctx.count, dim=1), strict=True)
    for a_i, (a_low_i, x_low_i), u, v in zip(a, lows, us, vs, strict=True):
        grad_u, grad_v = _run("update_gradients", a_i, a_low_i, x, x_low_i, *how, len(u), ctx.backend)
        grad_us.append(grad_u.to(u.dtype))
        grad_vs.append(grad_v.to(v.dtype))
    return [*grad_us, *grad_vs]


# The operators ----------------------------------------------------------------------------------------------------

_TILES = "Tensor entries, Tensor slots, Tensor places, Tensor neurons, int tokens"
_MATRICES = "Tensor[] rows, Tensor[] biases, Tensor[] us, Tensor[] vs, str backend"

_computed: dict[str, Callable[..., Any]] = {}


def _run(name: str, *args: Any) -> Any:
    """An operator as the compiler sees it, or what it does."""
    return getattr(torch.ops.hf_subquad, name)(*args) if torch.compiler.is_compiling() else _computed[name](*args)


def _operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    def define(compute: Callable[..., Any]) -> Any:
        _computed[name] = compute
        return torch.library.custom_op(f"hf_subquad::{name}", compute, mutates_args=(), schema=schema)

    return define


def _live(rows: list[Tensor], biases: list[Tensor], us: list[Tensor], vs: list[Tensor]) -> list[MergedWeight]:
    each: Sequence[Tensor | None] = biases or [None] * len(rows)
    return [MergedWeight(*matrix) for matrix in zip(rows, us, vs, each, strict=True)]


@_operator("gathered_up", f"(Tensor x, {_TILES}, {_MATRICES}) -> Tensor[]")
def _gathered_up(x, entries, slots, places, neurons, tokens, rows, biases, us, vs, backend):  # type: ignore[no-untyped-def]
    """By matrix h [n, T, k], then x V^T [N, q], those of two matrices side by side."""
    with torch.autocast(x.device.type, enabled=False):
        compact, low = backend_for(backend, x.device).gathered_up(
            x, TokenTiles(entries, slots, places, tokens), neurons, _live(rows, biases, us, vs)
        )
    return [*(h.data for h in compact), low]  # no views to autograd, so that an activation may work in place


@_operator("gathered_down", f"(Tensor[] a, {_TILES}, {_MATRICES}) -> Tensor[]")
def _gathered_down(a, entries, slots, places, neurons, tokens, rows, biases, us, vs, backend):  # type: ignore[no-untyped-def]
    """y [N, d], summed over the matrices, then a_t U_S [N, q], those of two matrices side by side."""
    device = a[0].device
    with torch.autocast(device.type, enabled=False):
        y, low = backend_for(backend, device).gathered_down(
            a, TokenTiles(entries, slots, places, tokens), neurons, _live(rows, biases, us, vs)
        )
    return [y.data, low]  # no view to autograd, so that a residual may be added in place


@_operator(
    "update_gradients",
    f"(Tensor a, Tensor a_low, Tensor x, Tensor x_low, {_TILES}, int count, str backend) -> (Tensor, Tensor)",
)
def _update_gradients(a, a_low, x, x_low, entries, slots, places, neurons, tokens, count, backend):  # type: ignore[no-untyped-def]
    """Gradients with respect to U [m, q] and V [q, d]."""
    with torch.autocast(x.device.type, enabled=False):
        return backend_for(backend, x.device).update_gradients(
            a, a_low, x, x_low, TokenTiles(entries, slots, places, tokens), neurons, count
        )


# Shapes, dtypes and strides of what they return


@_gathered_up.register_fake
def _(x, entries, slots, places, neurons, tokens, rows, biases, us, vs, backend):  # type: ignore[no-untyped-def]
    (count, size), made_by = entries.shape, backend_for(backend, x.device)
    compact = [made_by.new_compact(x, count, size, neurons.shape[1]) for _ in rows]
    return [*compact, x.new_empty(tokens, sum(len(v) for v in vs))]


@_gathered_down.register_fake
def _(a, entries, slots, places, neurons, tokens, rows, biases, us, vs, backend):  # type: ignore[no-untyped-def]
    return [a[0].new_empty(tokens, rows[0].shape[1]), a[0].new_empty(tokens, sum(len(v) for v in vs))]


@_update_gradients.register_fake
def _(a, a_low, x, x_low, entries, slots, places, neurons, tokens, count, backend):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(a.dtype, torch.float32)
    rank, width = a_low.shape[1], x.shape[1]
    return a.new_empty(count, rank, dtype=dtype), a.new_empty(rank, width, dtype=dtype)
