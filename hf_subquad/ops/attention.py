"""Attention on the CPU, sequence by sequence: what the mask leaves out is not computed.

PyTorch's CPU kernel computes every score of a batch and masks most of them: those of padding, and those between the
sequences that share a packed row. Here each sequence attends by itself, which gives the same up to rounding.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

MAY_SKIP = "_subquad_skips_padding"  # set on modules with this attention: another model may have the same config

_WORTHWHILE = 0.9  # of all scores: if more are needed, they are computed together


class Segments(NamedTuple):
    """The sequences of a batch.

    Attributes:
        spans: for each row, first token and end of each of its sequences, in order.
        causal: whether a token attends to its sequence up to itself, rather than to all of it.
    """

    spans: list[list[tuple[int, int]]]
    causal: bool


def segments_of(mask: Tensor) -> Segments | None:
    """The sequences of a mask, or None if it is not exactly that each token sees its sequence, or that up to itself.

    Args:
        mask: bool [B, 1, S, S], or [B, 1, 1, S] for all queries; true where a query (third dimension) sees a key. A
            token that does not see itself is padding, and what it sees does not count.
    """
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] not in (1, mask.shape[3]):
        return None
    seen = mask[:, 0].expand(-1, mask.shape[3], -1)
    real = seen.diagonal(dim1=1, dim2=2)
    size = seen.shape[-1]
    places = torch.arange(size, device=mask.device)
    first = seen.byte().argmax(-1)
    last = size - 1 - seen.flip(-1).byte().argmax(-1)
    between = (places >= first.unsqueeze(-1)) & (places <= last.unsqueeze(-1))
    if bool(((seen != between) & real.unsqueeze(-1)).any()):
        return None
    causal = bool((last == places)[real].all() and (last != first)[real].any())
    follows = real & (first < places)  # a token of its sequence, which must be the one before it
    linked = real.roll(1, 1) & (first == first.roll(1, 1)) & (causal | (last == last.roll(1, 1)))
    is_start, is_end = real & ~follows, real & ~follows.roll(-1, 1)
    if bool((follows & ~linked).any() or (last != places)[is_end].any()):  # as in a sliding window
        return None
    bounds = ([places[row].tolist() for row in each] for each in zip(is_start, is_end, strict=True))
    return Segments([[(start, end + 1) for start, end in zip(*of_row, strict=True)] for of_row in bounds], causal)


def sequence_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers' `AttentionInterface`; where it cannot help, `sdpa_attention_forward`.

    Args:
        query: [B, H, S, D].
        key, value: [B, G, S, D], with H a multiple of G.

    Returns:
        [B, S, H, D]; and None in place of attention weights. For padding it is zero, or what padding would attend to
        in its row, if all of a row is one sequence: queries may be of another text then (cross-attention).
    """
    found = None
    here = query.device.type == "cpu" and not torch.compiler.is_compiling() and MAY_SKIP in vars(module)
    if here and attention_mask is not None and not dropout:
        plain = query.shape[2] == key.shape[2] and all(kwargs.get(name) is None for name in _NOT_HERE)
        found = _worthwhile(attention_mask) if plain else None
    if found is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = getattr(module, "num_key_value_groups", 1)
    rows = zip(query.split(1), key.split(1), value.split(1), found.spans, strict=True)
    outputs = [
        _one_sequence(q, k, v, *spans[0], scaling, groups)
        if len(spans) == 1 and not found.causal
        else _row(q, k, v, spans, found.causal, scaling, groups)
        for q, k, v, spans in rows
    ]
    return torch.cat(outputs), None


_NOT_HERE = ("position_bias", "cache", "softcap")  # what changes scores, or keys


def _one_sequence(q: Tensor, k: Tensor, v: Tensor, start: int, end: int, scaling: float | None, groups: int) -> Tensor:
    """The output of one row [1, S, H, D] whose queries all attend to the same keys."""
    keys, values = (repeat_kv(each[:, :, start:end], groups) for each in (k, v))
    return F.scaled_dot_product_attention(q, keys, values, scale=scaling).transpose(1, 2)


def _row(
    q: Tensor, k: Tensor, v: Tensor, spans: list[tuple[int, int]], causal: bool, scaling: float | None, groups: int
) -> Tensor:
    """The output of one row, [1, S, H, D]."""
    bounds = [0, *(bound for span in spans for bound in span), q.shape[2]]
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    pieces = zip(*(values.split(sizes, 2) for values in (q, k, v)), strict=True)
    outputs = []
    for number, (queries, keys, values) in enumerate(pieces):
        if number % 2:  # a sequence; what lies between two of them is padding, if it is anything
            y = F.scaled_dot_product_attention(
                queries, repeat_kv(keys, groups), repeat_kv(values, groups), is_causal=causal, scale=scaling
            )
        else:
            y = values.new_zeros(1, q.shape[1], queries.shape[2], v.shape[3])
        outputs.append(y.transpose(1, 2))
    return torch.cat(outputs, 1)


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # all layers get the same mask


def _worthwhile(mask: Tensor) -> Segments | None:
    """`segments_of` a mask, if they leave enough out."""
    version = None if mask.is_inference() else mask._version  # its values may be replaced
    known: tuple[int | None, Segments | None] | None = _known.get(mask)
    if known is None or known[0] != version:
        found = segments_of(mask)
        needed = _scores(found, mask.shape[3]) if found else math.inf
        known = version, found if needed <= _WORTHWHILE * mask.shape[0] * mask.shape[3] ** 2 else None
        _known[mask] = known
    return known[1]


def _scores(segments: Segments, size: int) -> int:
    """How many scores are computed in a batch of rows of `size` tokens."""
    together = [not segments.causal and len(spans) == 1 for spans in segments.spans]
    return sum(
        (end - start) * (size if alone else end - start)
        for spans, alone in zip(segments.spans, together, strict=True)
        for start, end in spans
    )
