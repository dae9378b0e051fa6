"""Measures a selection of neurons against all neurons, computed from the current weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.backends import MergedWeight
from ..ops.group_tokens import TokenTiles
from ..ops.importance import importance
from .choose_neurons import ActivationIndex


@dataclass(frozen=True)
class SelectionQuality:
    """A selection compared with the exact output.

    Attributes:
        recall: share of the truly most important neurons that were chosen.
        whole: what all neurons add to the MLP's output, float32 [n, T, d_out].
        missed: what the skipped neurons add to it, float32 [n, T, d_out].
    """

    recall: float
    whole: Tensor
    missed: Tensor


@torch.no_grad()
def evaluate_selection(index: ActivationIndex, tile_tokens: Tensor, neurons: Tensor) -> SelectionQuality:
    """Compare a selection with all neurons.

    Args:
        tile_tokens: [n, T, d].
        neurons: int64 [n, k], the neurons chosen for each tile.
    """
    count, size, width = tile_tokens.shape
    tokens = tile_tokens.reshape(-1, width)
    pre, rows = _pre_activations(index, tokens), index.output.merged_rows().float()
    by_token = importance(pre, index.activation, index.gated)
    scores = by_token.view(count, size, -1).sum(1) * torch.linalg.vector_norm(rows, dim=1).square()
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, neurons, True)
    found = chosen.gather(1, scores.topk(neurons.shape[1], dim=1).indices).float().mean().item()
    activations = index.combine(pre).view(count, size, -1)
    whole = activations @ rows
    return SelectionQuality(found, whole, activations.masked_fill_(chosen.unsqueeze(1), 0) @ rows)


@torch.no_grad()
def outputs(index: ActivationIndex, tile_tokens: Tensor, neurons: Tensor) -> Tensor:
    """What the given neurons of each tile add to the MLP's output, computed as in the sparse forward.

    Args:
        tile_tokens: [n, T, d] in the compute dtype.
        neurons: int64 [n, k], in any order.

    Returns:
        [n T, d_out] in the compute dtype, without the output's bias.
    """
    count, size, _ = tile_tokens.shape
    x, backend = tile_tokens.flatten(0, 1), index.backend(tile_tokens.device)
    output = MergedWeight(index.output.rows(x.dtype, contiguous=True), *index.output.update.factors())
    if not neurons.shape[1]:
        return x.new_zeros(len(x), output.rows.shape[1])
    tiles = TokenTiles(torch.arange(len(x), device=x.device).view(count, size), len(x))
    inputs = [p.matrix(x.dtype, contiguous=True).load() for p in index.inputs]
    stacked = range(0, len(inputs[0].rows), index.neurons)
    neurons_in = torch.cat([neurons + first for first in stacked], 1)
    compact = [backend.compact(x.new_empty(len(x) * neurons_in.shape[1]), tiles, neurons_in.shape[1]) for _ in inputs]
    backend.gathered_up(x, tiles, neurons_in, inputs, compact)
    return backend.gathered_down([index.combine(compact)], tiles, neurons, [output])[0]


def exact_activations(index: ActivationIndex, x: Tensor) -> Tensor:
    """True activations of all neurons on x [N, d]: float32 [N, m]."""
    return index.combine(_pre_activations(index, x))


def _pre_activations(index: ActivationIndex, x: Tensor) -> list[Tensor]:
    pre = [x.float() @ projection.merged_rows().float().t() for projection in index.inputs]
    return [h if p.bias is None else h + p.bias.detach().float() for h, p in zip(pre, index.inputs, strict=True)]
