"""Triton kernels: products of token tiles with gathered weight rows, and the gradients of their updates.

N tokens lie in n tiles of T slots; tile t uses the k neurons `neurons[t]` only. With R the weight rows by neuron and
U V the low-rank update (its scale in V), the current rows of a tile are L_t = R[neurons[t]] + U[neurons[t]] V, and

    gathered_up     h_t = x_t L_t^T + b        tokens to neurons; contracts over the d features
    gathered_down     y_t = a_t L_t + b          neurons to tokens; contracts over the k neurons
    per_token    a_t U[neurons[t]]          `gathered_down` of the rows of U: by token, [N, q]
    per_neuron   sum over t of a_t^T low_t  gradient of U: by neuron, [m, q]

The update is never multiplied out: x_t V^T ("low") comes precomputed, and is one more step of the contraction.
`torch_backend` has the same products in PyTorch, which copies each tile's rows together first; here the rows are read
where they are, each by its own pointer, straight into the pipeline's shared memory.

Two matrices that share x (gate and up of a gated MLP) are one product in `gathered_up`, with twice the columns: the
left half takes its row pointers from the one matrix, the right half from the other. In `gathered_down` they share y,
and are contracted one after the other.

Order of programs. A program computes one block of tokens by one block of outputs, and reads all rows of that block of
outputs (`gathered_up`) or all of the tile's rows in that block of columns (`gathered_down`). The rows of all neurons
do not fit the L2 cache, but tiles share neurons, and each tile lists its neurons ascending. So programs are numbered
token block first within a group of token blocks, then output block, then group: those that run at the same time are a
few tiles at about the same place in the rows, and a row that one fetches the others find in L2.

Launchers take tensors and return new ones. They never wait for the device and loop over nothing, so that they can be
captured in a CUDA graph. `entries` (int64 [n, T]) names the token in each slot: entry e < N is token e, any other is
a spare slot, which sees a token of zeros and is not stored by token. Every token is in exactly one slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import INTERPRETING, cdiv, next_power_of_2, precision, shared_memory, unit_stride


@dataclass(frozen=True)
class Blocks:
    """Shape of a program: block sizes along tokens, neurons and features (powers of two, at least 16), and the rest.

    `gathered_up` holds tokens x neurons (twice for two matrices) in registers and steps through features;
    `gathered_down` holds tokens x features and steps through neurons; `per_neuron` holds neurons x ranks and
    steps through tokens.

    Attributes:
        group: token blocks that go through the rows together.
        warps: warps of a program.
        stages: steps of the contraction in flight, counting the one being multiplied.
    """

    tokens: int
    neurons: int
    features: int
    group: int = 16
    warps: int = 8
    stages: int = 3


@triton.jit
def _program_blocks(token_blocks, output_blocks, GROUP: tl.constexpr):
    """Token block and output block of this program: groups of token blocks, in each the token block fastest."""
    program = tl.program_id(0)
    first = program // (GROUP * output_blocks) * GROUP
    size = tl.minimum(token_blocks - first, GROUP)
    within = program % (GROUP * output_blocks)
    return first + within % size, within // size


@triton.jit
def _slots(block, entries, tokens, slots, BLOCK_T: tl.constexpr):
    """Tile (int64) of a token block, its slots and their entries; slots past the tile's end are spare."""
    blocks = tl.cdiv(slots, BLOCK_T)
    tile = (block // blocks).to(tl.int64)
    slot = block % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    return tile, slot, tl.load(entries + tile * slots + slot, mask=slot < slots, other=tokens)


@triton.jit
def _load(pointers, mask, WHOLE: tl.constexpr):
    """Zero where masked; no mask at all if the block is known to lie within, so that loads stay wide."""
    return tl.load(pointers) if WHOLE else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _dot(acc, left, right, PRECISION: tl.constexpr):
    return tl.dot(left, right.to(left.dtype), acc, input_precision=PRECISION)


@triton.jit
def _add_update(
    acc, low, u, bias, token, real, neuron, mine, rank, low_stride, u_stride,
    BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + low[token] u[neuron]^T + bias[neuron] in the columns `mine`, acc in the others."""
    for start in tl.range(0, rank, BLOCK_Q, num_stages=1):
        q = start + tl.arange(0, BLOCK_Q)
        left = tl.load(
            low + token[:, None] * low_stride + q[None, :], mask=real[:, None] & (q < rank)[None, :], other=0.0
        )
        right = tl.load(
            u + neuron[:, None] * u_stride + q[None, :], mask=mine[:, None] & (q < rank)[None, :], other=0.0
        )
        acc = _dot(acc, left, tl.trans(right), PRECISION)
    if bias is not None:
        acc += tl.load(bias + neuron, mask=mine, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["tiles", "tokens", "slots"])
def _gathered_up(
    x, entries, neurons, rows0, rows1, bias0, bias1, u0, u1, low0, low1, h0, h1,
    tiles, tokens, slots, active, width, rank,
    x_stride, rows0_stride, rows1_stride, u0_stride, u1_stride, low0_stride, low1_stride,
    MATRICES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, GROUP: tl.constexpr, WHOLE_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token_block, neuron_block = _program_blocks(tiles * tl.cdiv(slots, BLOCK_T), tl.cdiv(active, BLOCK_K), GROUP)
    tile, slot, entry = _slots(token_block, entries, tokens, slots, BLOCK_T)
    real = entry < tokens
    token = tl.where(real, entry, 0)  # spare slots read a token that is there; their sums are dropped below

    column = tl.arange(0, MATRICES * BLOCK_K)
    second = column >= BLOCK_K
    j = neuron_block * BLOCK_K + column % BLOCK_K
    there = j < active
    neuron = tl.load(neurons + tile * active + tl.minimum(j, active - 1))
    row = rows0 + neuron * rows0_stride
    if MATRICES == 2:
        row = tl.where(second, rows1 + neuron * rows1_stride, row)

    feature = tl.arange(0, BLOCK_D)
    x_pointers = x + token[:, None] * x_stride + feature[None, :]
    row_pointers = row[:, None] + feature[None, :]
    acc = tl.zeros((BLOCK_T, MATRICES * BLOCK_K), tl.float32)
    for start in range(0, width, BLOCK_D):
        within = (feature < width - start)[None, :]
        acc = _dot(acc, _load(x_pointers, within, WHOLE_D), tl.trans(_load(row_pointers, within, WHOLE_D)), PRECISION)
        x_pointers += BLOCK_D
        row_pointers += BLOCK_D
    acc = tl.where(real[:, None], acc, 0.0)

    acc = _add_update(
        acc, low0, u0, bias0, token, real, neuron, there & (column < BLOCK_K), rank, low0_stride, u0_stride,
        BLOCK_Q, PRECISION,
    )  # fmt: skip
    h = h0
    if MATRICES == 2:
        acc = _add_update(
            acc, low1, u1, bias1, token, real, neuron, there & second, rank, low1_stride, u1_stride,
            BLOCK_Q, PRECISION,
        )  # fmt: skip
        h = tl.where(second, h1, h0)[None, :]
    pointers = h + (tile * slots + slot)[:, None] * active + j[None, :]
    tl.store(pointers, acc.to(x.dtype.element_ty), mask=(slot < slots)[:, None] & there[None, :])


@triton.jit
def _add_sum(
    acc, a, tile_neurons, rows, column, in_width, active, row_stride,
    BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr, WHOLE_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + a rows[tile_neurons], in some columns of the rows; `a` points to the first neuron of each slot."""
    j = tl.arange(0, BLOCK_K)
    # Carried a step ahead by hand: loaded where they are used, they would cost the pipeline half of its stages.
    neuron = tl.load(tile_neurons + j, mask=j < active, other=0).to(tl.int32)
    for start in range(0, active, BLOCK_K):
        there = j < active - start
        left = _load(a[:, None] + (start + j)[None, :], there[None, :], WHOLE_K)
        right = _load(
            rows + neuron.to(tl.int64)[:, None] * row_stride + column[None, :],
            there[:, None] & in_width[None, :],
            WHOLE_K and WHOLE_D,
        )
        following = start + BLOCK_K + j
        neuron = tl.load(tile_neurons + following, mask=following < active, other=0).to(tl.int32)
        acc = _dot(acc, left, right, PRECISION)
    return acc


@triton.jit
def _add_low(
    acc, low, v, token, real, column, in_width, rank, low_stride, v_stride, BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + low[token] v, in some columns of v."""
    for start in tl.range(0, rank, BLOCK_Q, num_stages=1):
        q = start + tl.arange(0, BLOCK_Q)
        left = tl.load(
            low + token[:, None] * low_stride + q[None, :], mask=real[:, None] & (q < rank)[None, :], other=0.0
        )
        right = tl.load(
            v + q[:, None] * v_stride + column[None, :], mask=(q < rank)[:, None] & in_width[None, :], other=0.0
        )
        acc = _dot(acc, left, right, PRECISION)
    return acc


@triton.jit(do_not_specialize=["tiles", "tokens", "slots"])
def _gathered_down(
    a0, a1, entries, neurons, rows0, rows1, low0, low1, v0, v1, bias, y,
    tiles, tokens, slots, active, width, rank,
    a0_tile, a0_slot, a1_tile, a1_slot, rows0_stride, rows1_stride, low0_stride, low1_stride, v0_stride, v1_stride,
    MATRICES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, GROUP: tl.constexpr, WHOLE_K: tl.constexpr, WHOLE_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    token_block, column_block = _program_blocks(tiles * tl.cdiv(slots, BLOCK_T), tl.cdiv(width, BLOCK_D), GROUP)
    tile, slot, token = _slots(token_block, entries, tokens, slots, BLOCK_T)
    real = token < tokens
    slot = tl.minimum(slot, slots - 1)  # rows past the tile's end read one that is there, and are not stored
    column = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    in_width = column < width
    tile_neurons = neurons + tile * active

    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    acc = _add_sum(
        acc, a0 + tile * a0_tile + slot.to(tl.int64) * a0_slot, tile_neurons, rows0, column, in_width, active,
        rows0_stride, BLOCK_K, WHOLE_K, WHOLE_D, PRECISION,
    )  # fmt: skip
    if MATRICES == 2:
        acc = _add_sum(
            acc, a1 + tile * a1_tile + slot.to(tl.int64) * a1_slot, tile_neurons, rows1, column, in_width, active,
            rows1_stride, BLOCK_K, WHOLE_K, WHOLE_D, PRECISION,
        )  # fmt: skip
    if low0 is not None:
        acc = _add_low(acc, low0, v0, token, real, column, in_width, rank, low0_stride, v0_stride, BLOCK_Q, PRECISION)
        if MATRICES == 2:
            acc = _add_low(
                acc, low1, v1, token, real, column, in_width, rank, low1_stride, v1_stride, BLOCK_Q, PRECISION
            )
    if bias is not None:
        acc += tl.load(bias + column, mask=in_width, other=0.0).to(tl.float32)[None, :]
    pointers = y + token[:, None] * width + column[None, :]
    tl.store(pointers, acc.to(y.dtype.element_ty), mask=real[:, None] & in_width[None, :])


@triton.jit(do_not_specialize=["tokens", "slots"])
def _per_neuron(
    a, entries, neurons, low, out, tokens, slots, active, rank, a_tile, a_slot, low_stride,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs have different neurons of one tile: their atomic additions do not meet.
    blocks = tl.cdiv(active, BLOCK_K)
    tile = (tl.program_id(0) // blocks).to(tl.int64)
    j = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    there, in_rank = j < active, q < rank
    acc = tl.zeros((BLOCK_K, BLOCK_Q), tl.float32)
    for start in range(0, slots, BLOCK_T):
        slot = start + tl.arange(0, BLOCK_T)
        token = tl.load(entries + tile * slots + slot, mask=slot < slots, other=tokens)
        real = token < tokens
        left = tl.load(
            a + tile * a_tile + slot.to(tl.int64)[:, None] * a_slot + j[None, :],
            mask=real[:, None] & there[None, :],
            other=0.0,
        )
        right = tl.load(
            low + token[:, None] * low_stride + q[None, :], mask=real[:, None] & in_rank[None, :], other=0.0
        )
        acc = _dot(acc, tl.trans(left), right, PRECISION)
    neuron = tl.load(neurons + tile * active + j, mask=there, other=0)
    tl.atomic_add(out + neuron[:, None] * rank + q[None, :], acc, mask=there[:, None] & in_rank[None, :], sem="relaxed")


def gathered_up(
    x: Tensor,
    entries: Tensor,
    neurons: Tensor,
    rows: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    us: Sequence[Tensor],
    lows: Sequence[Tensor],
    out: Sequence[Tensor],
    config: Blocks | None = None,
) -> None:
    """h_i = x_t R_i[S]^T + low_i[t] U_i[S]^T + b_i[S] for each tile t, S = neurons[t], of one matrix i or two.

    Args:
        x: [N, d] in the compute dtype.
        entries: int64 [n, T].
        neurons: int64 [n, k]; fastest if ascending and k is a multiple of 64. Sizes beside a multiple of 16 are slow.
        rows: [m, d] each, in the compute dtype; copied unless contiguous along d.
        biases: [m] or None each, any float dtype.
        us: [m, q] each, any float dtype; multiplied in the compute dtype.
        lows: x (s V_i)^T, [N, q] each, in the compute dtype.
        out: h_i [n, T, k] each to write to, contiguous, in the compute dtype. Spare slots get the bias.
    """
    (count, size), active, (tokens, width) = entries.shape, neurons.shape[1], x.shape
    config = config or _gathered_up_blocks(x, size, active, len(rows))
    x, entries, neurons = unit_stride(x), entries.contiguous(), neurons.contiguous()
    rows, us, lows = (_both([unit_stride(part) for part in parts]) for parts in (rows, us, lows))
    biases = _both([None if bias is None else bias.contiguous() for bias in biases])
    grid = (count * cdiv(size, config.tokens) * cdiv(active, config.neurons),)
    with torch.cuda.device_of(x):
        _gathered_up[grid](
            x, entries, neurons, *rows, *biases, *us, *lows, *_both(out),
            count, tokens, size, active, width, us[0].shape[1],
            x.stride(0), *_row_strides(rows), *_row_strides(us), *_row_strides(lows),
            MATRICES=len(out), BLOCK_T=config.tokens, BLOCK_K=config.neurons, BLOCK_D=config.features,
            BLOCK_Q=_rank_block(us[0].shape[1]), GROUP=config.group, WHOLE_D=width % config.features == 0,
            PRECISION=precision(x.dtype), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


def gathered_down(
    a: Sequence[Tensor],
    entries: Tensor,
    neurons: Tensor,
    rows: Sequence[Tensor],
    lows: Sequence[Tensor],
    vs: Sequence[Tensor],
    bias: Tensor | None,
    config: Blocks | None = None,
) -> Tensor:
    """y[token] = sum over i of (a_i,t R_i[S] + low_i[token] V_i) + b, back in token order.

    Args:
        a: [n, T, k] each, one or two, in the compute dtype.
        entries: int64 [n, T].
        neurons: int64 [n, k].
        rows: [m, d] each, in the compute dtype; copied unless contiguous along d.
        lows: a_i,t U_i[S] by token, [N, q] each, in the compute dtype (of `per_token`).
        vs: s V_i, [q, d] each, any float dtype; multiplied in the compute dtype.
        bias: [d] or None, any float dtype.

    Returns:
        y [N, d] in the compute dtype.
    """
    config = config or _gathered_down_blocks(a[0], entries.shape[1], rows[0].shape[1])
    return _launch_gathered_down(a, entries, neurons, rows, lows, vs, bias, len(lows[0]), config)


def per_token(
    a: Tensor, entries: Tensor, neurons: Tensor, u: Tensor, tokens: int, config: Blocks | None = None
) -> Tensor:
    """a_t U[S] in token order.

    Args:
        a: [n, T, k] in the compute dtype.
        u: [m, q], any float dtype; multiplied in the compute dtype.
        tokens: N, which the shape of `entries` does not give.

    Returns:
        [N, q] in the compute dtype.
    """
    config = config or _per_token_blocks(a, u.shape[1])
    return _launch_gathered_down([a], entries, neurons, [u], [], [], None, tokens, config)


def per_neuron(
    a: Tensor, entries: Tensor, neurons: Tensor, low: Tensor, count: int, config: Blocks | None = None
) -> Tensor:
    """The sum over tiles of a_t^T low_t, added to the rows neurons[t]; spare slots count as zero.

    Tiles add in no fixed order, so that the last bits vary, unless PyTorch is told to be deterministic.

    Args:
        a: [n, T, k] in the compute dtype.
        low: [N, q] by token, in the compute dtype.
        count: number m of neurons.

    Returns:
        float32 [m, q].
    """
    if torch.are_deterministic_algorithms_enabled():
        return _per_neuron_in_order(a, entries, neurons, low, count)
    (tiles, size), active, (tokens, rank) = entries.shape, neurons.shape[1], low.shape
    config = config or _per_neuron_blocks(a, size, rank)
    a, low, entries, neurons = unit_stride(a), unit_stride(low), entries.contiguous(), neurons.contiguous()
    out = a.new_zeros(count, rank, dtype=torch.float32)
    grid = (tiles * cdiv(active, config.neurons), cdiv(rank, config.features))
    with torch.cuda.device_of(a):
        _per_neuron[grid](
            a, entries, neurons, low, out, tokens, size, active, rank, a.stride(0), a.stride(1), low.stride(0),
            BLOCK_T=config.tokens, BLOCK_K=config.neurons, BLOCK_Q=config.features, PRECISION=precision(a.dtype),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return out


def _launch_gathered_down(
    a: Sequence[Tensor], entries: Tensor, neurons: Tensor, rows: Sequence[Tensor], lows: Sequence[Tensor],
    vs: Sequence[Tensor], bias: Tensor | None, tokens: int, config: Blocks,
) -> Tensor:  # fmt: skip
    """`gathered_down`, or without its update if there are no `lows`."""
    (count, size), active, width = entries.shape, neurons.shape[1], rows[0].shape[1]
    matrices, rank = len(a), vs[0].shape[0] if vs else 1
    entries, neurons = entries.contiguous(), neurons.contiguous()
    a, rows, lows, vs = (_both([unit_stride(part) for part in parts]) for parts in (a, rows, lows, vs))
    bias, y = None if bias is None else bias.contiguous(), a[0].new_empty(tokens, width)
    grid = (count * cdiv(size, config.tokens) * cdiv(width, config.features),)
    with torch.cuda.device_of(y):
        _gathered_down[grid](
            *a, entries, neurons, *rows, *lows, *vs, bias, y,
            count, tokens, size, active, width, rank,
            *a[0].stride()[:2], *a[1].stride()[:2], *_row_strides(rows), *_row_strides(lows), *_row_strides(vs),
            MATRICES=matrices, BLOCK_T=config.tokens, BLOCK_K=config.neurons, BLOCK_D=config.features,
            BLOCK_Q=_rank_block(rank), GROUP=config.group, WHOLE_K=active % config.neurons == 0,
            WHOLE_D=width % config.features == 0, PRECISION=precision(y.dtype),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    return y


def _per_neuron_in_order(a: Tensor, entries: Tensor, neurons: Tensor, low: Tensor, count: int) -> Tensor:
    """`per_neuron` by PyTorch operations that have a deterministic version on every device."""
    tokens, rank = low.shape
    spare = entries >= tokens
    low_t = low[entries.masked_fill(spare, 0)].masked_fill(spare.unsqueeze(-1), 0)
    by_neuron = torch.bmm(a.masked_fill(spare.unsqueeze(-1), 0).transpose(1, 2), low_t).float()
    return by_neuron.new_zeros(count, rank).index_add_(0, neurons.reshape(-1), by_neuron.view(-1, rank))


def _both(given: Sequence) -> list:
    """Two of each argument, as kernels take: the only one twice, or None twice (the kernel's branch is left out)."""
    return list(given) if len(given) == 2 else [given[0] if given else None] * 2


def _row_strides(pair: Sequence[Tensor | None]) -> list[int]:
    return [1 if values is None else values.stride(0) for values in pair]


# What a token costs in a block of so many, beside one of the largest block: fewer share each weight row that is read.
# Estimates, good enough to tell padding that is worth it (94 tokens in 128) from padding that is not (20 in 128).
_TOKEN_COST = {128: 1.0, 64: 1.15, 32: 1.6, 16: 2.5}

# Columns of a program's output, step of the contraction in bytes, and stages; the first that fits is taken. In order:
# Hopper's 227 KB, the A100's 163 KB, the 99 KB of smaller cards (two programs at a time).
_SHAPES = ((256, 128, 4), (256, 128, 3), (128, 64, 4), (64, 64, 3), (64, 32, 2))
# Without tensor cores, or with rows that cannot be read 16 bytes at a time, operands pass through registers.
_SMALL_SHAPES = ((64, 128, 3), (64, 64, 2))


def _token_block(size: int, largest: int) -> int:
    """Block of a tile's T slots: what is wasted in the last block against what smaller blocks cost."""
    candidates = [block for block in _TOKEN_COST if block <= largest]
    return min(candidates, key=lambda block: cdiv(size, block) * block * _TOKEN_COST[block])


@lru_cache(maxsize=1024)
def _shape(
    dtype: torch.dtype, precision: str, device: torch.device, size: int, outputs: int, aligned: bool
) -> tuple[int, int, int, int, int]:
    """Tokens, output columns, step, warps and stages of a product of tiles of `size` with so many outputs."""
    small = not aligned or (dtype == torch.float32 and precision == "ieee")
    tokens = _token_block(size, 64 if small else 128)
    for columns, step_bytes, stages in _SMALL_SHAPES if small else _SHAPES:
        step = max(16, step_bytes // dtype.itemsize)
        fits = stages * (tokens + columns) * step * dtype.itemsize <= shared_memory(device)
        if fits and columns < 2 * outputs:
            break
    return tokens, columns, step, min(max(tokens * columns // 4096, 4), 8), stages


def _gathered_up_blocks(x: Tensor, size: int, active: int, matrices: int) -> Blocks:
    if INTERPRETING:
        return _INTERPRETED
    aligned = x.shape[1] % 16 == 0
    tokens, columns, step, warps, stages = _shape(
        x.dtype, precision(x.dtype), x.device, size, matrices * active, aligned
    )
    return Blocks(tokens, columns // matrices, step, warps=warps, stages=stages)


def _gathered_down_blocks(a: Tensor, size: int, width: int) -> Blocks:
    if INTERPRETING:
        return _INTERPRETED
    aligned = a.shape[2] % 16 == 0 and width % 16 == 0  # Triton knows this of a size, or nothing
    tokens, columns, step, warps, stages = _shape(a.dtype, precision(a.dtype), a.device, size, width, aligned)
    return Blocks(tokens, step, columns, warps=warps, stages=stages)


def _per_token_blocks(a: Tensor, rank: int) -> Blocks:
    """Little arithmetic: small blocks of tokens, so that there are enough programs to keep the memory busy."""
    if INTERPRETING:
        return _INTERPRETED
    neurons = 128 if a.itemsize == 2 and rank <= 32 else 64
    return Blocks(tokens=32, neurons=neurons, features=_rank_block(rank), warps=4, stages=4)


def _per_neuron_blocks(a: Tensor, size: int, rank: int) -> Blocks:
    if INTERPRETING:
        return _INTERPRETED
    tokens = min(max(16, next_power_of_2(size)), 64)
    return Blocks(tokens, neurons=128 if a.itemsize == 2 else 64, features=_rank_block(rank), warps=4, stages=3)


_INTERPRETED = Blocks(tokens=32, neurons=32, features=32, group=2)  # the interpreter's time goes by operations


def _rank_block(rank: int) -> int:
    """Block along the rank; a higher rank takes several."""
    return min(max(16, next_power_of_2(rank)), 64)
