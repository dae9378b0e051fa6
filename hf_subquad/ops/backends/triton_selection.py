"""Which neurons each tile computes, in Triton: importance of all neurons to a tile, and the k most important.

Estimated pre-activations are computed twice, once for their root mean square over the neurons and once for the
importance that needs it; neither time are they written to memory. Nothing waits for the device, and sums are added in
a fixed order: the same tokens always choose the same neurons.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..importance import MOVE
from .triton_common import INTERPRETING, cdiv, next_power_of_2, precision, shared_memory, unit_stride

ProjectedInput = tuple[Tensor, Tensor, Tensor, Tensor | None]

_MOVE = tl.constexpr(MOVE)
_ROW = 16384  # scores of a tile that one program holds in registers
_GATHERED = 4096  # scores of a tile that one program looks at together when it writes what it chose
_Block = dict[str, int]
# Blocks of pre-activations in the two passes over them, by the largest r + q (powers of two, counted twice in float32)
# that fits. With fewer tokens more programs fit on a multiprocessor, or higher ranks into one, but codes are read more
# often.
_BLOCKS: dict[int, tuple[_Block, _Block]] = {
    96: (
        {"NEURONS": 64, "TOKENS": 128, "num_warps": 8, "num_stages": 3},
        {"NEURONS": 64, "TOKENS": 64, "num_warps": 4, "num_stages": 2},
    ),
    384: ({"NEURONS": 64, "TOKENS": 32, "num_warps": 8, "num_stages": 1},) * 2,
    640: ({"NEURONS": 32, "TOKENS": 16, "num_warps": 8, "num_stages": 1},) * 2,
}
_THREE_STAGES = 128 * 1024  # bytes of shared memory, at most: cards with 99 KB get two
_THIRD = 168  # registers a thread if a multiprocessor is to run three programs of the second pass, not two


def covers(dtype: torch.dtype, r: int, q: int) -> bool:
    """Whether `tile_scores` takes tokens of this dtype, a sketch of rank r and updates of rank q."""
    return dtype in (torch.float32, torch.bfloat16, torch.float16) and _columns(dtype, r, q) <= max(_BLOCKS)


def _columns(dtype: torch.dtype, r: int, q: int) -> int:
    return (_padded(r) + _padded(q)) * dtype.itemsize // 2


def _padded(rank: int) -> int:
    return max(next_power_of_2(rank), 16)


def tile_scores(sketched: Tensor, inputs: Sequence[ProjectedInput], activation: str, output_norms: Tensor) -> Tensor:
    """Importance of every neuron to every tile, from a sample of its tokens.

    Each token contributes the squared activation, plus its squared change for a small change of the pre-activations,
    times the squared norm of the neuron's output row.

    Args:
        sketched: [n, t, r], t <= 16; coordinates x A^T of the sampled tokens in the sketch. `covers` says which dtypes
            and ranks.
        inputs: one input projection, or gate and up: (codes float32 [m, r], low [n, t, q] = x (s V)^T, u [m, q],
            bias [m] or None), with pre-activations codes x_sketched + u x_low + bias.
        activation: a name in `activations.ACTIVATIONS`; of the gate, if there are two inputs.
        output_norms: float32 [m].

    Returns:
        float32 [n, m].
    """
    (tiles, sampled, r), m = sketched.shape, len(output_norms)
    sketched, output_norms = unit_stride(sketched), output_norms.contiguous()
    padded, multiprocessors = next_power_of_2(sampled), _multiprocessors(sketched.device)
    q = max(u.shape[1] for _, _, u, _ in inputs)
    ranks = {
        "GATED": len(inputs) == 2, "SAMPLED": padded, "R": _padded(r), "Q": _padded(q),
        "PRECISION": precision(sketched.dtype),
    }  # fmt: skip
    columns = _columns(sketched.dtype, r, q)
    first, second = next(blocks for most, blocks in _BLOCKS.items() if columns <= most)
    if not INTERPRETING and shared_memory(sketched.device) < _THREE_STAGES:
        first = {**first, "num_stages": min(first["num_stages"], 2)}
    # Operands of four bytes, higher ranks and the error function need more registers than a third.
    third = columns <= min(_BLOCKS) and sketched.element_size() == 2 and activation != "gelu"
    squares_grid, squares_span = _grid(tiles * padded, m, first, multiprocessors)
    scores_grid, scores_span = _grid(tiles * padded, m, second, (3 if third else 2) * multiprocessors)
    length = squares_grid[0] * first["TOKENS"]
    squares = torch.empty(len(inputs), squares_grid[1], length, device=sketched.device, dtype=torch.float32)
    scores = torch.empty(tiles, m, device=sketched.device, dtype=torch.float32)
    gate, up = _described(*inputs[0]), _described(*inputs[-1])
    arguments = (sketched, *sketched.stride()[:2], tiles, sampled, m, r, *gate, *up, squares, length)
    with torch.cuda.device_of(sketched):
        _squares[squares_grid](*arguments, squares_span, **ranks, **first)
        _scores[scores_grid](
            *arguments, scores_span, squares_grid[1], output_norms, scores,
            SHARES=next_power_of_2(squares_grid[1]), ACTIVATION=activation,
            **ranks, **second, maxnreg=_THIRD if third else None,
        )  # fmt: skip
    return scores


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _grid(tokens: int, m: int, block: _Block, programs: int) -> tuple[tuple[int, int], int]:
    """Blocks of tokens by shares of the neurons, at most about `programs` in all; and the neurons of a share.

    A program keeps its tokens and walks through its neurons.
    """
    blocks, steps = cdiv(tokens, block["TOKENS"]), cdiv(m, block["NEURONS"])
    span = cdiv(steps, max(programs // blocks, 1)) * block["NEURONS"]
    return (blocks, cdiv(m, span)), span


def top_neurons(scores: Tensor, k: int) -> Tensor:
    """The k largest of each row of scores float32 [n, m]: int64 [n, k], ascending.

    Of equal scores, the first counts as larger; NaN counts as larger than all.
    """
    (tiles, m), scores = scores.shape, unit_stride(scores)
    neurons = torch.empty(tiles, k, device=scores.device, dtype=torch.int64)
    block = min(max(next_power_of_2(m), 16), _ROW)
    gathered, warps = min(block, _GATHERED), min(max(block // 1024, 1), 16)
    with torch.cuda.device_of(scores):
        _top[(tiles,)](scores, scores.stride(0), neurons, m, k, block, gathered, m <= block, num_warps=warps)
    return neurons


def _described(codes: Tensor, low: Tensor, u: Tensor, bias: Tensor | None) -> tuple[Tensor | int | None, ...]:
    """An input projection as the kernels take it."""
    codes, low, u = unit_stride(codes), unit_stride(low), unit_stride(u)
    bias = None if bias is None else bias.contiguous()
    return codes, codes.stride(0), low, *low.stride()[:2], u, u.stride(0), bias, u.shape[1]


@triton.jit
def _times_sigmoid(x, y):
    """x sigmoid(y)."""
    return x / (1 + tl.exp2(-1.4426950408889634 * y))


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The function of that name in `activations.ACTIVATIONS`, of float32."""
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x)  # NaN stays NaN
    elif ACTIVATION == "silu":
        return _times_sigmoid(x, x)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1 + tl.erf(0.7071067811865476 * x))
    elif ACTIVATION == "gelu_tanh":  # 1 + tanh(y) = 2 sigmoid(2 y)
        return _times_sigmoid(x, 1.5957691216057308 * x * (1 + 0.044715 * x * x))
    elif ACTIVATION == "quick_gelu":
        return _times_sigmoid(x, 1.702 * x)
    elif ACTIVATION == "relu_squared":
        return tl.where(x < 0, 0.0, x * x)
    elif ACTIVATION == "sigmoid":
        return _times_sigmoid(1, x)
    else:
        tl.static_assert(ACTIVATION == "tanh")
        return _times_sigmoid(2, 2 * x) - 1


@triton.jit
def _tokens(
    ptr, tile_stride, token_stride, tiles, sampled, width,
    SAMPLED: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A block of the tiles' tokens, as columns [WIDTH, TOKENS], and which of them exist [TOKENS]."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    tile, sample = token // SAMPLED, token % SAMPLED
    exists = (tile < tiles) & (sample < sampled)
    at = tile.to(tl.int64) * tile_stride + sample * token_stride
    column = tl.arange(0, WIDTH)
    values = tl.load(
        ptr + at[None, :] + column[:, None], mask=exists[None, :] & (column < width)[:, None], other=0.0
    )  # fmt: skip
    return values, exists


@triton.jit
def _estimate(
    sketched, low, neuron, m, r, codes_ptr, codes_stride, u_ptr, u_stride, bias_ptr, q,
    R: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pre-activations float32 [neurons, TOKENS] of a block of neurons."""
    row, real = neuron.to(tl.int64)[:, None], (neuron < m)[:, None]
    column = tl.arange(0, R)[None, :]
    codes = tl.load(codes_ptr + row * codes_stride + column, mask=real & (column < r), other=0.0)
    pre = tl.dot(codes.to(sketched.dtype), sketched, input_precision=PRECISION)
    column = tl.arange(0, Q)[None, :]
    u = tl.load(u_ptr + row * u_stride + column, mask=real & (column < q), other=0.0)
    pre = tl.dot(u.to(low.dtype), low, pre, input_precision=PRECISION)
    if bias_ptr is not None:
        pre += tl.load(bias_ptr + neuron, mask=neuron < m, other=0.0).to(tl.float32)[:, None]
    return pre


@triton.jit
def _squares(
    sketched_ptr, tile_stride, token_stride, tiles, sampled, m, r,
    codes_ptr, codes_stride, low_ptr, low_tile_stride, low_token_stride, u_ptr, u_stride, bias_ptr, q,
    up_codes_ptr, up_codes_stride, up_low_ptr, up_low_tile_stride, up_low_token_stride, up_u_ptr, up_u_stride,
    up_bias_ptr, up_q,
    squares_ptr, length, span,
    GATED: tl.constexpr, SAMPLED: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr,
    NEURONS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Sums of squared pre-activations over a share of the neurons, by token: squares [inputs, shares, length]."""
    sketched, _ = _tokens(sketched_ptr, tile_stride, token_stride, tiles, sampled, r, SAMPLED, TOKENS, R)
    low, _ = _tokens(low_ptr, low_tile_stride, low_token_stride, tiles, sampled, q, SAMPLED, TOKENS, Q)
    total = tl.zeros((NEURONS, TOKENS), tl.float32)
    if GATED:
        up_low, _ = _tokens(
            up_low_ptr, up_low_tile_stride, up_low_token_stride, tiles, sampled, up_q, SAMPLED, TOKENS, Q
        )  # fmt: skip
        up_total = tl.zeros((NEURONS, TOKENS), tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, m), NEURONS):
        neuron = start + tl.arange(0, NEURONS)
        pre = _estimate(
            sketched, low, neuron, m, r, codes_ptr, codes_stride, u_ptr, u_stride, bias_ptr, q, R, Q, PRECISION
        )  # fmt: skip
        total += pre * pre
        if GATED:
            up = _estimate(
                sketched, up_low, neuron, m, r,
                up_codes_ptr, up_codes_stride, up_u_ptr, up_u_stride, up_bias_ptr, up_q, R, Q, PRECISION,
            )  # fmt: skip
            up_total += up * up
    at = tl.program_id(1) * length + tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    tl.store(squares_ptr + at, tl.sum(total, 0))
    if GATED:
        tl.store(squares_ptr + tl.num_programs(1) * length + at, tl.sum(up_total, 0))


@triton.jit
def _spread(squares_ptr, length, shares, m, SHARES: tl.constexpr, TOKENS: tl.constexpr):
    """Root mean square of a block of tokens' pre-activations over the m neurons, [1, TOKENS]."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    share = tl.arange(0, SHARES)[:, None]
    squares = tl.load(squares_ptr + share * length + token[None, :], mask=share < shares, other=0.0)
    return tl.sqrt(tl.sum(squares, 0) / m)[None, :]


@triton.jit
def _scores(
    sketched_ptr, tile_stride, token_stride, tiles, sampled, m, r,
    codes_ptr, codes_stride, low_ptr, low_tile_stride, low_token_stride, u_ptr, u_stride, bias_ptr, q,
    up_codes_ptr, up_codes_stride, up_low_ptr, up_low_tile_stride, up_low_token_stride, up_u_ptr, up_u_stride,
    up_bias_ptr, up_q,
    squares_ptr, length, span, shares, norms_ptr, scores_ptr,
    SHARES: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, SAMPLED: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, PRECISION: tl.constexpr,
    NEURONS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Importance of a share of the neurons to the tiles of a block of tokens."""
    sketched, exists = _tokens(sketched_ptr, tile_stride, token_stride, tiles, sampled, r, SAMPLED, TOKENS, R)
    low, _ = _tokens(low_ptr, low_tile_stride, low_token_stride, tiles, sampled, q, SAMPLED, TOKENS, Q)
    move = _MOVE * _spread(squares_ptr, length, shares, m, SHARES, TOKENS)
    if GATED:
        up_low, _ = _tokens(
            up_low_ptr, up_low_tile_stride, up_low_token_stride, tiles, sampled, up_q, SAMPLED, TOKENS, Q
        )  # fmt: skip
        up_move = _MOVE * _spread(squares_ptr + shares * length, length, shares, m, SHARES, TOKENS)
    tile = tl.program_id(0) * (TOKENS // SAMPLED) + tl.arange(0, TOKENS // SAMPLED)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, m), NEURONS):
        neuron = start + tl.arange(0, NEURONS)
        pre = _estimate(
            sketched, low, neuron, m, r, codes_ptr, codes_stride, u_ptr, u_stride, bias_ptr, q, R, Q, PRECISION
        )  # fmt: skip
        now = _activate(pre, ACTIVATION)
        change = _activate(pre + move, ACTIVATION) - now
        if GATED:
            up = _estimate(
                sketched, up_low, neuron, m, r,
                up_codes_ptr, up_codes_stride, up_u_ptr, up_u_stride, up_bias_ptr, up_q, R, Q, PRECISION,
            )  # fmt: skip
            up = up * up
            importance = change * change * up + now * now * (up + up_move * up_move)
        else:
            importance = now * now + change * change
        importance = tl.where(exists[None, :], importance, 0.0)
        by_tile = tl.sum(tl.reshape(importance, (NEURONS, TOKENS // SAMPLED, SAMPLED)), 2)
        norms = tl.load(norms_ptr + neuron, mask=neuron < m, other=0.0)
        at = tile.to(tl.int64)[None, :] * m + neuron[:, None]
        tl.store(
            scores_ptr + at, by_tile * norms[:, None], mask=(tile < tiles)[None, :] & (neuron < m)[:, None]
        )  # fmt: skip


@triton.jit
def _keys(scores_ptr, start, m, BLOCK: tl.constexpr):
    """Scores of a block as integers that order as they do: both zeros alike, NaN first, what is no neuron last."""
    neuron = start + tl.arange(0, BLOCK)
    scores = tl.load(scores_ptr + neuron, mask=neuron < m, other=0.0)
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    keys = tl.where(scores == scores, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7F800001)
    return tl.where(neuron < m, keys, -0x80000000)  # below minus infinity's


@triton.jit
def _reached(keys, least, scores_ptr, m, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """How many neurons of a tile have at least the key `least`; `keys` holds the first block, or all of them."""
    if HELD:
        reached = tl.sum((keys >= least).to(tl.int32), 0)
    else:
        reached = 0
        for start in range(0, m, BLOCK):
            reached += tl.sum((_keys(scores_ptr, start, m, BLOCK) >= least).to(tl.int32), 0)
    return reached


@triton.jit
def _top(
    scores_ptr, scores_stride, neurons_ptr, m, k, BLOCK: tl.constexpr, GATHERED: tl.constexpr, HELD: tl.constexpr
):  # fmt: skip
    """The k most important neurons of one tile: bisect for the largest key that k neurons reach, then gather them."""
    scores_ptr += tl.program_id(0).to(tl.int64) * scores_stride
    neurons_ptr += tl.program_id(0).to(tl.int64) * k
    keys = _keys(scores_ptr, 0, m, BLOCK)
    reached = _reached(keys, 0, scores_ptr, m, BLOCK, HELD)
    least = tl.where(reached >= k, 0, -0x80000000)
    reached = tl.where(reached >= k, reached, m)
    bit = 30
    while (bit >= 0) & (reached != k):
        raised = least + (1 << bit)
        fewer = _reached(keys, raised, scores_ptr, m, BLOCK, HELD)
        least = tl.where(fewer >= k, raised, least)
        reached = tl.where(fewer >= k, fewer, reached)
        bit -= 1
    # Of the neurons at the threshold itself the first are taken, as many as those above leave to take.
    wanted = k - _reached(keys, least + 1, scores_ptr, m, BLOCK, HELD)
    above_before, equal_before = 0, 0
    for start in range(0, m, GATHERED):
        block = _keys(scores_ptr, start, m, GATHERED)
        above, equal = (block > least).to(tl.int32), (block == least).to(tl.int32)
        above_to, equal_to = above_before + tl.cumsum(above, 0), equal_before + tl.cumsum(equal, 0)
        taken = (above > 0) | ((equal > 0) & (equal_to <= wanted))
        place = above_to + tl.minimum(equal_to, wanted) - 1
        tl.store(neurons_ptr + place, (start + tl.arange(0, GATHERED)).to(tl.int64), mask=taken)
        above_before += tl.sum(above, 0)
        equal_before += tl.sum(equal, 0)
