"""Which tokens share a tile, in Triton: recursive bisection by content, see `group_tokens.py`.

A round splits every group of entries at the median along its leading principal direction. Groups are stored one after
the other in `order`, so a round finds each group's direction, projects its entries on it, and writes every entry to the
place given by its rank. That takes three launches while groups are large, two once one program can hold a group.

Nothing waits for the device, and sums are added in a fixed order: the same features always give the same tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..group_tokens import POWER_ITERATIONS
from .triton_common import cdiv, next_power_of_2

_POWER_ITERATIONS = tl.constexpr(POWER_ITERATIONS)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_LAST = tl.constexpr(0x3FC00001)  # the key of NaN, above infinity's
_NONE = tl.constexpr(0x3FFFFFFF)  # above all keys

_HELD = 32768  # features of one group that one program holds in registers
_SPLIT, _SPLITS = 256, 32  # entries whose moments one program sums, at least; and into how many parts, at most
_SUMMED = 16384  # values of partial moments added at a time
_PROJECTED = 128  # entries projected by one program
_RANKED, _RIVALS = 32, 256  # entries ranked by one program, and those they are compared with at a time


def bisect(features: Tensor, count: int, size: int) -> Tensor:
    """Halve every group across its leading principal direction until there are `count` groups.

    Args:
        features: float32 [N, r], r <= 64; entry e is token e % N.
        count: of groups, a power of two.
        size: of each group, with count * size >= N.

    Returns:
        int64 [count, size], the entries of each group; within its half, a group's entries lie as they rank.
    """
    (tokens, r), entries = features.shape, count * size
    order = torch.arange(entries, device=features.device)
    if count == 1:
        return order.view(count, size)
    features = features.contiguous()
    width = next_power_of_2(r)
    target = torch.empty_like(order)
    keys = torch.empty(entries, device=features.device, dtype=torch.int32)
    group = entries
    with torch.cuda.device_of(features):
        while group > size:
            groups, held = entries // group, next_power_of_2(group)
            if held * width <= _HELD:
                _project_group[(groups,)](
                    features, order, keys, tokens, r, group, held, width, num_warps=_warps(held * width)
                )
            else:
                split, square = max(_SPLIT, next_power_of_2(cdiv(group, _SPLITS))), max(width, 16)
                splits = cdiv(group, split)
                sums = features.new_empty(groups, splits, square)
                seconds = features.new_empty(groups, splits, square, square)
                _moments[(groups, splits)](features, order, sums, seconds, tokens, r, group, split, 64, square)
                summed = min(max(_SUMMED // square**2, 1), next_power_of_2(splits))
                _project[(groups, cdiv(group, _PROJECTED))](
                    features, order, sums, seconds, keys, tokens, r, group, splits,
                    split, summed, _PROJECTED, square, num_warps=8,
                )  # fmt: skip
            _place[(groups, cdiv(group, _RANKED))](order, keys, target, group, _RANKED, _RIVALS)
            order, target = target, order
            group //= 2
    return order.view(count, size)


def _warps(values: int) -> int:
    return min(max(values // 2048, 1), 16)


@triton.jit
def _features(features_ptr, order_ptr, begin, place, inside, tokens, r, WIDTH: tl.constexpr):
    """Features [places, WIDTH] of the entries at some places of the group that begins at `begin`."""
    token = tl.load(order_ptr + begin + place, mask=inside, other=0).to(tl.int32) % tokens
    column = tl.arange(0, WIDTH)
    at = token.to(tl.int64)[:, None] * r + column[None, :]
    return tl.load(features_ptr + at, mask=inside[:, None] & (column < r)[None, :], other=0.0)


@triton.jit
def _key(along):
    """Integers that order as floats do, both zeros alike and NaN last. Their differences fit in 32 bits.

    For that they go without a float's last bit: projections so close count as equal.
    """
    bits = tl.where(along == 0, 0.0, along).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(along == along, bits >> 1, _LAST)


@triton.jit
def _unit(direction):
    """Scaled to a largest component of one, keeping zeros and NaN."""
    largest = tl.max(tl.abs(direction), 0)
    return direction / tl.where(largest < _TINY, _TINY, largest)


@triton.jit
def _project_group(features_ptr, order_ptr, keys_ptr, tokens, r, group, HELD: tl.constexpr, WIDTH: tl.constexpr):
    """Keys of one group's entries. The covariance C^T C of its features is only ever applied, never written out."""
    begin = tl.program_id(0) * group
    place = tl.arange(0, HELD)
    inside = place < group
    features = _features(features_ptr, order_ptr, begin, place, inside, tokens, r, WIDTH)
    mean = tl.sum(features, 0) / group
    centred = tl.where(inside[:, None], features - mean[None, :], 0.0)
    variance = tl.sum(centred * centred, 0)
    scale = tl.sum(variance, 0)
    scale = tl.where(scale < _TINY, _TINY, scale)
    heaviest = tl.argmax(variance, 0)
    along = tl.sum(tl.where(tl.arange(0, WIDTH)[None, :] == heaviest, centred, 0.0), 1)
    direction = tl.sum(centred * along[:, None], 0) / scale
    for _ in tl.static_range(_POWER_ITERATIONS):
        along = tl.sum(centred * direction[None, :], 1)
        direction = _unit(tl.sum(centred * along[:, None], 0) / scale)
    along = tl.sum(centred * direction[None, :], 1)
    tl.store(keys_ptr + begin + place, _key(along), mask=inside)


@triton.jit
def _moments(
    features_ptr, order_ptr, sums_ptr, seconds_ptr, tokens, r, group,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Sum [WIDTH], and second moments about the mean [WIDTH, WIDTH], of one split of one group.

    Taken about the split's first entry, then moved to its mean: a mean far from zero costs no digits.
    """
    begin, split = tl.program_id(0) * group, tl.program_id(1)
    first = split * SPLIT
    column = tl.arange(0, WIDTH)
    token = tl.load(order_ptr + begin + first).to(tl.int32) % tokens
    origin = tl.load(features_ptr + token.to(tl.int64) * r + column, mask=column < r, other=0.0)
    total = tl.zeros((WIDTH,), tl.float32)
    second = tl.zeros((WIDTH, WIDTH), tl.float32)
    for start in range(first, first + SPLIT, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < group
        features = _features(features_ptr, order_ptr, begin, place, inside, tokens, r, WIDTH)
        moved = tl.where(inside[:, None], features - origin[None, :], 0.0)
        total += tl.sum(moved, 0)
        second = tl.dot(tl.trans(moved), moved, second, input_precision="tf32x3")
    number = tl.minimum(group - first, SPLIT)
    mean = total / number
    second -= number * mean[:, None] * mean[None, :]
    at = tl.program_id(0) * tl.num_programs(1) + split
    tl.store(sums_ptr + at * WIDTH + column, total + number * origin)
    tl.store(seconds_ptr + at * WIDTH * WIDTH + column[:, None] * WIDTH + column[None, :], second)


@triton.jit(do_not_specialize=["splits"])
def _project(
    features_ptr, order_ptr, sums_ptr, seconds_ptr, keys_ptr, tokens, r, group, splits,
    SPLIT: tl.constexpr, SUMMED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Keys of a block of one group's entries; each program finds the group's direction from its moments."""
    begin = tl.program_id(0) * group
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < group
    features = _features(features_ptr, order_ptr, begin, place, inside, tokens, r, WIDTH)
    column = tl.arange(0, WIDTH)
    sums_ptr += tl.program_id(0) * splits * WIDTH
    seconds_ptr += tl.program_id(0) * splits * WIDTH * WIDTH

    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, splits, SUMMED):
        split = start + tl.arange(0, SUMMED)
        sums = tl.load(sums_ptr + split[:, None] * WIDTH + column[None, :], mask=(split < splits)[:, None], other=0.0)
        total += tl.sum(sums, 0)
    mean = total / group

    covariance = tl.zeros((WIDTH, WIDTH), tl.float32)
    square = column[:, None] * WIDTH + column[None, :]
    for start in range(0, splits, SUMMED):
        split = start + tl.arange(0, SUMMED)
        real = split < splits
        number = tl.maximum(tl.minimum(group - split * SPLIT, SPLIT), 1)
        sums = tl.load(sums_ptr + split[:, None] * WIDTH + column[None, :], mask=real[:, None], other=0.0)
        away = tl.where(real[:, None], sums / number[:, None] - mean[None, :], 0.0)
        second = tl.load(
            seconds_ptr + split[:, None, None] * WIDTH * WIDTH + square[None, :, :],
            mask=real[:, None, None], other=0.0,
        )  # fmt: skip
        second += (away * number[:, None])[:, :, None] * away[:, None, :]
        covariance += tl.sum(second, 0)

    diagonal = tl.sum(tl.where(column[:, None] == column[None, :], covariance, 0.0), 0)
    scale = tl.sum(diagonal, 0)
    covariance /= tl.where(scale < _TINY, _TINY, scale)
    heaviest = tl.argmax(diagonal, 0)
    direction = tl.sum(tl.where(column[:, None] == heaviest, covariance, 0.0), 0)
    for _ in tl.static_range(_POWER_ITERATIONS):
        direction = _unit(tl.sum(covariance * direction[None, :], 1))
    along = tl.sum((features - mean[None, :]) * direction[None, :], 1)
    tl.store(keys_ptr + begin + place, _key(along), mask=inside)


@triton.jit
def _place(order_ptr, keys_ptr, target_ptr, group, BLOCK: tl.constexpr, RIVALS: tl.constexpr):
    """Write a block of one group's entries to their places in a stable sort of the group by key.

    An entry's rank is the number of entries before it: with smaller keys, or with the same key at an earlier place.
    """
    begin = tl.program_id(0) * group
    first = tl.program_id(1) * BLOCK
    place = first + tl.arange(0, BLOCK)
    inside = place < group
    key = tl.load(keys_ptr + begin + place, mask=inside, other=_LAST)
    before = tl.zeros((BLOCK, RIVALS), tl.int32)
    for start in range(0, group, RIVALS):
        rival = start + tl.arange(0, RIVALS)
        rivals = tl.load(keys_ptr + begin + rival, mask=rival < group, other=_NONE)
        wins_ties = (start + RIVALS <= first).to(tl.int32)  # all of these lie before the block
        before -= (rivals[None, :] - (key + wins_ties)[:, None]) >> 31  # cheaper than to compare: -1 if it is less
    rival = first // RIVALS * RIVALS + tl.arange(0, RIVALS)  # the block lies among these
    rivals = tl.load(keys_ptr + begin + rival, mask=rival < group, other=_NONE)
    before += ((rivals[None, :] == key[:, None]) & (rival[None, :] < place[:, None])).to(tl.int32)
    entry = tl.load(order_ptr + begin + place, mask=inside, other=0)
    tl.store(target_ptr + begin + tl.sum(before, 1), entry, mask=inside)
