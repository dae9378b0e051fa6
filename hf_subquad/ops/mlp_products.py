"""An MLP's two products on parts of a batch; each part has its own number of neurons.

The tokens of a part either all compute all neurons (plain GEMMs on those rows), or are grouped into tiles that compute
k neurons each, or compute none. With R the weight rows by neuron and U V the low-rank update, its scale in V, a tile
multiplies by the current rows R_S + U_S V of its neurons S. Tokens in no part cost nothing: their output is zero, and
so is their input gradient. The compact activation is one flat tensor that concatenates the parts, each [p, m] or
[n, T, k]; what a model computes between its projections is elementwise and does not depend on the layout.

The two products are adjoints of each other. Gradients flow to tokens, U and V; base rows and biases are constants.
They flow only through a random sample of rows that stands for all (see `row_sampling`). `down_project` knows the output
gradient and writes zeros for all other rows, except in a part whose products would cost no less without them.
`up_project` skips rows of zeros. With a share of 1 only rows with zero gradient are skipped, which is exact; on a GPU
none are skipped then, because counting them would wait for the device.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..config import BackendName
from .backends import Backend, MergedWeight, StoredRows, backend_for
from .group_tokens import Selection
from .row_sampling import keep_probabilities, row_norms, sampled_weights

WORTH_GATHERING = 0.9  # of the rows: where more of them are kept, a copy of them costs more than it saves
# Significant bits of the number of rows that are kept on a CPU, where oneDNN compiles a kernel for each new shape: 1 ms
# for each product in bfloat16, and memory. So one row in 32 is kept in vain at most.
_BITS = 6


@dataclass(frozen=True)
class Part:
    """Tokens that compute the same number of neurons.

    Attributes:
        rows: int64 [p], the part's tokens; None: all of the batch in their order.
        tokens: p.
        selection: tiles of the part's own tokens 0 to p - 1, and their neurons; None: all tokens compute all neurons,
            or none.
        idle: tokens compute no neurons.
    """

    rows: Tensor | None
    tokens: int
    selection: Selection | None = None
    idle: bool = False

    def compact(self, flat: Tensor, neurons: int, backend: Backend) -> Tensor:
        """Its flat compact activation as [p, m], or [n, T, k] in the backend's preferred layout."""
        if self.idle:
            return flat
        if self.selection is None:
            return flat.view(self.tokens, neurons)
        return backend.compact(flat, self.selection.tiles, self.selection.neurons.shape[1])

    def size(self, neurons: int) -> int:
        """Number of elements of its compact activation in an MLP of m neurons."""
        if self.idle:
            return 0
        if self.selection is None:
            return self.tokens * neurons
        return self.selection.tiles.entries.numel() * self.selection.neurons.shape[1]

    def take(self, x: Tensor) -> Tensor:
        """[N, c] -> [p, c]."""
        return x if self.rows is None else x.index_select(0, self.rows)

    def among(self, chosen: Tensor) -> Tensor:
        """Batch rows of some of the part's tokens, int64."""
        return chosen if self.rows is None else self.rows.index_select(0, chosen)


def up_project(
    x: Tensor,
    parts: Sequence[Part],
    matrices: Sequence[MergedWeight],
    gradient: float,
    backend: BackendName,
    joined: bool = False,
) -> tuple[Tensor, ...]:
    """x R^T + (x V^T) U^T + b of every part, by matrix: flat; differentiable in x, U and V.

    Args:
        x: [N, d] in the compute dtype.
        matrices: one, or gate and up, [m, d] each, of equal rank.
        gradient: as in `down_project`.
        joined: return one tensor, that of the first matrix before that of the second.
    """
    found: tuple[Tensor, ...] = _UpProject.apply(x, parts, gradient, backend, joined, *_flat(matrices))
    return found


def down_project(
    a: Tensor,
    parts: Sequence[Part],
    matrix: MergedWeight,
    tokens: int,
    gradient: float,
    backend: BackendName,
) -> Tensor:
    """a R + (a U) V + b of every part, in token order: [N, d]; differentiable in a, U and V.

    Args:
        a: flat, as `up_project` returns it, in the compute dtype.
        tokens: N.
        gradient: gradients reach `a` through a sample of rows, whose expected squared error is 1 minus this share of
            the squared gradient of the result. The gradients of U and V use all rows, which costs next to nothing.
    """
    y: Tensor = _DownProject.apply(a, parts, tokens, gradient, backend, *_flat([matrix]))
    return y


def _flat(matrices: Sequence[MergedWeight]) -> list[Tensor | None]:
    """Us, Vs, rows and biases, as autograd takes them."""
    return [getattr(matrix, name) for name in ("u", "v", "rows", "bias") for matrix in matrices]


def _matrices(flat: Sequence[Any], parts: Sequence[Part]) -> list[MergedWeight]:
    """Undo `_flat`, in the dtype of the rows, with the rows that the parts need loaded."""
    count = len(flat) // 4
    found = [
        MergedWeight(rows, u.to(rows.dtype), v.to(rows.dtype), None if bias is None else bias.to(rows.dtype))
        for u, v, rows, bias in zip(*(flat[i * count : (i + 1) * count] for i in range(4)), strict=True)
    ]
    if not any(isinstance(matrix.rows, StoredRows) for matrix in found):
        return found
    needed = None
    if not any(part.selection is None and not part.idle for part in parts):
        chosen = [part.selection.neurons.flatten() for part in parts if part.selection is not None]
        needed = torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64, device=flat[0].device)
    return [matrix.load(needed) for matrix in found]


def _save(ctx: Any, matrices: Sequence[MergedWeight], flat: Sequence[Any], *tensors: Tensor | None) -> None:
    """Keep what the backward pass needs: factors in the compute dtype, and rows as they are in `flat`, so that those
    held in another form stay in it."""
    count = len(matrices)
    rows = flat[2 * count : 3 * count]
    ctx.stored = [row if isinstance(row, StoredRows) else None for row in rows]
    ctx.dtypes = [factor.dtype for factor in flat[: 2 * count]]
    factors = [*(matrix.u for matrix in matrices), *(matrix.v for matrix in matrices)]
    ctx.save_for_backward(*tensors, *factors, *(None if isinstance(row, StoredRows) else row for row in rows))


def _saved(ctx: Any, parts: Sequence[Part]) -> tuple[Sequence[Tensor], list[MergedWeight]]:
    """The tensors that `_save` kept, and the matrices, without biases."""
    saved, count = ctx.saved_tensors, len(ctx.stored)
    rows = [row if stored is None else stored for row, stored in zip(saved[-count:], ctx.stored, strict=True)]
    return saved[: -3 * count], _matrices([*saved[-3 * count : -count], *rows, *(None,) * count], parts)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Context manager: inside, products are of the dtype of their operands."""
    enabled = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else nullcontext()


class _UpProject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, parts: Sequence[Part], gradient: float, name: BackendName, joined: bool, *flat: Any
    ) -> Any:
        matrices, backend = _matrices(flat, parts), backend_for(name, x.device)
        neurons = len(matrices[0].rows)
        length = sum(part.size(neurons) for part in parts)
        whole = x.new_empty(len(matrices) * length) if joined else None
        outs = whole.split(length) if whole is not None else [x.new_empty(length) for _ in matrices]
        with without_autocast(x.device):
            lows = [
                None if part.idle else _up(part, part.take(x), matrices, views, backend)
                for part, *views in _by_part(parts, neurons, outs, backend)
            ]
        _save(ctx, matrices, flat, x, *lows)
        ctx.parts, ctx.gradient, ctx.backend, ctx.joined = parts, gradient, backend, joined
        return tuple(outs) if whole is None else (whole,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        parts = ctx.parts
        (x, *lows), matrices = _saved(ctx, parts)
        count, neurons = len(matrices), len(matrices[0].rows)
        # A gradient that came through a sum or a mean may be one number for all.
        grads = gradients[0].contiguous().chunk(count) if ctx.joined else [grad.contiguous() for grad in gradients]
        grad_x = None
        factors = _FactorGradients(matrices)
        with without_autocast(x.device):
            for (part, *views), low in zip(_by_part(parts, neurons, grads, ctx.backend), lows, strict=True):
                if part.idle:
                    continue
                lows_by_matrix = low.chunk(count, dim=1)
                kept = None
                if not _all_pass(x, ctx.gradient) and _worth_gathering(
                    part, neurons, passing := _nonzero_tokens(part, views)
                ):
                    kept = _rows_to_keep(passing)
                if part.selection is not None and kept is None:
                    grad, grad_low = ctx.backend.gathered_down(
                        views, part.selection.tiles, part.selection.neurons, matrices
                    )
                    grad_x = _placed(grad_x, len(x), part, None, grad)
                    chunks = zip(views, grad_low.chunk(count, dim=1), lows_by_matrix, strict=True)
                    tokens = part.take(x)
                    for i, (view, grad_low_i, low_i) in enumerate(chunks):
                        factors.add_tiled(ctx.backend, i, view, grad_low_i, tokens, low_i, part.selection)
                    continue
                x_kept = part.take(x) if kept is None else x.index_select(0, part.among(kept))
                rows = [_rows_of(part, view, kept, neurons) for view in views]
                grad = None
                for i, (row, matrix, low_i) in enumerate(zip(rows, matrices, lows_by_matrix, strict=True)):
                    grad_low_i = row @ matrix.u
                    grad = row @ matrix.rows if grad is None else grad.addmm_(row, matrix.rows)
                    grad.addmm_(grad_low_i, matrix.v)
                    factors.add(i, row.t() @ (low_i if kept is None else low_i[kept]), grad_low_i.t() @ x_kept)
                grad_x = _placed(grad_x, len(x), part, kept, grad)
        grad_x = torch.zeros_like(x) if grad_x is None else grad_x
        return grad_x, *(None,) * 4, *factors.cast(ctx.dtypes), *(None,) * (2 * count)


class _DownProject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, parts: Sequence[Part], tokens: int, gradient: float, name: BackendName, *flat: Any
    ) -> Tensor:
        (matrix,), backend = _matrices(flat, parts), backend_for(name, a.device)
        neurons, width = matrix.rows.shape
        y = None
        lows: list[Tensor | None] = []
        with without_autocast(a.device):
            for part, view in _by_part(parts, neurons, [a], backend):
                low = None
                if part.idle:
                    if matrix.bias is None:  # other parts leave zeros in its rows
                        lows.append(low)
                        continue
                    y_part = matrix.bias.expand(part.tokens, -1).clone()
                elif part.selection is not None:
                    y_part, low = backend.gathered_down([view], part.selection.tiles, part.selection.neurons, [matrix])
                else:
                    low = view @ matrix.u
                    y_part = view @ matrix.rows if matrix.bias is None else torch.addmm(matrix.bias, view, matrix.rows)
                    y_part.addmm_(low, matrix.v)
                lows.append(low)
                y = _placed(y, tokens, part, None, y_part)
        _save(ctx, [matrix], flat, a, *lows)
        ctx.parts, ctx.gradient, ctx.backend = parts, gradient, backend
        return a.new_zeros(tokens, width) if y is None else y.data  # no view, so that a residual may be added in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        parts = ctx.parts
        (a, *lows), matrices = _saved(ctx, parts)
        matrix = matrices[0]
        neurons = len(matrix.rows)
        sampled = ctx.gradient < 1
        probability = None
        if not _all_pass(grad_y, ctx.gradient):
            probability = keep_probabilities(row_norms(grad_y), ctx.gradient)
        grad_a = torch.empty_like(a)
        factors = _FactorGradients(matrices)
        with without_autocast(a.device):
            views = _by_part(parts, neurons, [a, grad_a], ctx.backend)
            for (part, view, grad_view), low in zip(views, lows, strict=True):
                if part.idle:
                    continue
                grad = part.take(grad_y)
                kept = weight = None
                if probability is not None and _worth_gathering(part, neurons, wanted := part.take(probability)):
                    weights = sampled_weights(wanted) if sampled else wanted
                    kept = _rows_to_keep(weights)
                    weight = weights.index_select(0, kept).unsqueeze(1) if sampled else None
                whole = kept is None
                grad_low = _up(part, grad, matrices, [grad_view], ctx.backend) if whole else grad @ matrix.v.t()
                if part.selection is not None:
                    factors.add_tiled(ctx.backend, 0, view, low, grad, grad_low, part.selection)
                else:
                    factors.add(0, view.t() @ grad_low, low.t() @ grad)
                if kept is not None:
                    grad, grad_low = (_weighted(each.index_select(0, kept), weight) for each in (grad, grad_low))
                    found = (grad @ matrix.rows.t()).addmm_(grad_low, matrix.u.t())
                    _place_rows(part, grad_view, kept, found)
        return grad_a, *(None,) * 4, *factors.cast(ctx.dtypes), None, None


class _FactorGradients:
    """Gradients of U and V, summed over parts."""

    def __init__(self, matrices: Sequence[MergedWeight]) -> None:
        self._matrices = matrices
        self._sums: list[list[Tensor | None]] = [[None, None] for _ in matrices]

    def add(self, matrix: int, grad_u: Tensor, grad_v: Tensor) -> None:
        for i, grad in enumerate((grad_u, grad_v)):
            held = self._sums[matrix][i]
            self._sums[matrix][i] = grad if held is None else held + grad

    def add_tiled(
        self, backend: Backend, matrix: int, a: Tensor, a_low: Tensor, x: Tensor, x_low: Tensor, selection: Selection
    ) -> None:
        count, x_low = len(self._matrices[matrix].rows), x_low.contiguous()
        self.add(matrix, *backend.update_gradients(a, a_low, x, x_low, selection.tiles, selection.neurons, count))

    def cast(self, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """Us, then Vs, in the given dtypes."""
        factors = [*(matrix.u for matrix in self._matrices), *(matrix.v for matrix in self._matrices)]
        found = [sums[i] for i in range(2) for sums in self._sums]
        return [
            torch.zeros_like(factor, dtype=dtype) if grad is None else grad.to(dtype)
            for factor, grad, dtype in zip(factors, found, dtypes, strict=True)
        ]


def _up(part: Part, x: Tensor, matrices: list[MergedWeight], views: list[Tensor], backend: Backend) -> Tensor:
    """Write the part's activations; returns x V^T [p, q], those of two matrices side by side."""
    if part.selection is None:
        low = x @ torch.cat([matrix.v for matrix in matrices]).t()
        for view, matrix, low_i in zip(views, matrices, low.chunk(len(matrices), dim=1), strict=True):
            if matrix.bias is None:
                torch.mm(x, matrix.rows.t(), out=view)
            else:
                torch.addmm(matrix.bias, x, matrix.rows.t(), out=view)
            view.addmm_(low_i, matrix.u.t())
        return low
    return backend.gathered_up(x, part.selection.tiles, part.selection.neurons, matrices, views)


def _by_part(parts: Sequence[Part], neurons: int, flats: Sequence[Tensor], backend: Backend) -> list[tuple[Any, ...]]:
    """Each part with its views of flat tensors."""
    sizes = [part.size(neurons) for part in parts]
    pieces = zip(*(flat.split_with_sizes(sizes) for flat in flats), strict=True)
    return [
        (part, *(part.compact(piece, neurons, backend) for piece in of_part))
        for part, of_part in zip(parts, pieces, strict=True)
    ]


def _all_pass(gradient: Tensor, share: float) -> bool:
    """Whether no rows are skipped, so that the host need not wait for the device to count them."""
    return share >= 1 and gradient.device.type != "cpu"


def _worth_gathering(part: Part, neurons: int, probability: Tensor) -> bool:
    """Whether products of the part's tokens that are expected to pass gradients cost less than those of all.

    A tile's products do not get cheaper with fewer tokens in it, so its few passing ones are multiplied with all
    neurons, and what is not theirs is dropped. The expectation decides, not the draw: that would be a bias.
    """
    return probability.sum().item() * neurons < WORTH_GATHERING * part.size(neurons)


def _rows_to_keep(weights: Tensor) -> Tensor:
    """Rows whose weight is not zero, and on a CPU a few others, up to a number of `_BITS` significant bits: int64."""
    kept = weights.nonzero().squeeze(1)
    missing = -len(kept) % (1 << max(0, len(kept).bit_length() - _BITS))
    if not missing or weights.device.type != "cpu":
        return kept
    return torch.cat([kept, (weights == 0).nonzero().squeeze(1)[:missing]])


def _weighted(rows: Tensor, weight: Tensor | None) -> Tensor:
    """Rows times their weights [r, 1], which may leave the range of half precision where the product does not."""
    return rows if weight is None else (rows * weight).to(rows.dtype)


def _nonzero_tokens(part: Part, views: Sequence[Tensor]) -> Tensor:
    """bool [p]: tokens for which any of the gradients [p, m] or [n, T, k] is not zero."""
    if part.selection is None and views[0].device.type == "cpu":  # where reading all of it takes a while
        passing = views[0][:, 0] != 0  # one number tells of most rows
        unclear = passing.logical_not().nonzero().squeeze(1)
        passing[unclear] = torch.stack([view.index_select(0, unclear).any(1) for view in views]).any(0)
        return passing
    passing = torch.stack([torch.linalg.vector_norm(view, math.inf, -1) for view in views]).amax(0) != 0
    return passing if part.selection is None else passing.view(-1).index_select(0, part.selection.tiles.position)


def _slots(selection: Selection, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Tile and slot of some tokens."""
    slots = selection.tiles.position.index_select(0, kept)
    return slots // selection.tiles.shape[1], slots % selection.tiles.shape[1]


def _rows_of(part: Part, view: Tensor, kept: Tensor | None, neurons: int) -> Tensor:
    """Rows of a gradient for some of the part's tokens, [r, m]; zero for neurons that are not their tile's."""
    if kept is None:
        return view
    if part.selection is None:
        return view.index_select(0, kept)
    tile, slot = _slots(part.selection, kept)
    found = view.new_zeros(len(kept), neurons)
    return found.scatter_(1, part.selection.neurons.index_select(0, tile), view[tile, slot])


def _place_rows(part: Part, view: Tensor, kept: Tensor, rows: Tensor) -> None:
    """Undo `_rows_of`: write rows [r, m] of the part's tokens `kept`, zeros for its others."""
    view.zero_()
    if part.selection is None:
        view.index_copy_(0, kept, rows)
        return
    tile, slot = _slots(part.selection, kept)
    view[tile, slot] = rows.gather(1, part.selection.neurons.index_select(0, tile))


def _placed(into: Tensor | None, tokens: int, part: Part, kept: Tensor | None, values: Tensor) -> Tensor:
    """Values [p, c] of a part's tokens, or [r, c] of some of them, in their rows of the batch [N, c].

    Args:
        into: the batch's rows so far, written to; None: zeros.
    """
    rows = part.rows if kept is None else part.among(kept)
    if rows is None:
        return values
    if into is None:
        into = values.new_zeros(tokens, values.shape[1])
    return into.index_copy_(0, rows, values)
