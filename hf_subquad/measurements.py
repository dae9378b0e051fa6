"""What is measured of every MLP beside a dense pass: output errors by k, what compensates them, and times."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .compensation import Compensation, fit_compensation
from .errors import CalibrationError
from .index import Selection
from .layers import SparseMLP
from .mlp_timing import MLPTiming, time_mlp
from .patching import dense_forward
from .projection import compute_dtype
from .watch import relative_norm

_SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
_TIMED_SHARES = (1 / 8, 1 / 2)
_TILES = 8  # of each batch and MLP
_HELD_OUT = 4  # every so many-th token of a tile judges what was fitted on the others


class MLPMeasurements:
    """One MLP's output errors, and the compensations they count on.

    Both lie on straight lines against log k between the shares that were measured, and are zero at k = m.
    """

    def __init__(self, mlp: SparseMLP) -> None:
        self.mlp = mlp
        self._batches = 0
        self._errors: dict[int, float] = {}
        self._compensations: dict[int, Compensation] = {}

    def add(self, tokens: Tensor) -> None:
        """Measure on the MLP's input tokens [N, d] of one more batch."""
        self._batches += 1
        config = self.mlp.runtime.config
        for k in sorted({share_of(self.mlp, share) for share in _SHARES}):
            selection = self.mlp.index.select(tokens, k, config.tile_size, config.tile_order)
            x, whole, missed = outputs_of_some(self.mlp, tokens, selection, _TILES)
            held_out = torch.arange(len(x), device=x.device) % _HELD_OUT == 0
            fitted = fit_compensation(self.mlp.index.sketch.basis, x[~held_out], missed[~held_out])
            error = relative_norm(missed[held_out] - fitted(x[held_out].float()), whole[held_out])
            known, share = self._compensations.get(k, fitted), 1 / self._batches
            self._errors[k] = self._errors.get(k, 0.0) * (1 - share) + error * share
            self._compensations[k] = known.towards(fitted, share)

    def error(self, k: int) -> float:
        """Relative error of the MLP's output with k neurons, compensated."""
        low, high, share = self._between(k)
        return self._errors[low] * (1 - share) + self._errors.get(high, 0.0) * share

    def compensation(self, k: int) -> Compensation:
        low, high, share = self._between(k)
        known = self._compensations[low]
        return known.towards(self._compensations.get(high, known), share)

    def _between(self, k: int) -> tuple[int, int, float]:
        """The measured budgets (or m) around k, and how far between them it is."""
        points = [*sorted(self._errors), self.mlp.index.neurons]
        k = max(k, points[0])
        low, high = next(pair for pair in itertools.pairwise(points) if k <= pair[1])
        return low, high, math.log(k / low) / math.log(high / low)


class MLPTimes:
    """Times of MLPs; those of one shape, dtype and number of tokens are timed once."""

    def __init__(self) -> None:
        self._times: dict[tuple[Any, ...], MLPTiming] = {}

    def of(self, mlp: SparseMLP, tokens: Tensor) -> MLPTiming:
        shapes = tuple((p.weight.shape, p.weight.dtype, p.source_class) for p in mlp.projections)
        key = (shapes, len(tokens), tokens.dtype)
        if key not in self._times:
            autocast = tokens.dtype != mlp.output.weight.dtype
            with torch.autocast(tokens.device.type, dtype=tokens.dtype, enabled=autocast):
                ks = sorted({share_of(mlp, share) for share in _TIMED_SHARES})
                self._times[key] = time_mlp(mlp, tokens, ks)
        return self._times[key]


def share_of(mlp: SparseMLP, share: float) -> int:
    """k of a share of an MLP's neurons."""
    return max(1, round(share * mlp.index.neurons))


def outputs_of_some(mlp: SparseMLP, tokens: Tensor, selection: Selection, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """On some tiles of a selection, spread evenly: their tokens [S, d], what all neurons add to the output on them, and
    what the skipped ones do, both [S, d_out]."""
    some = slice(None, None, -(-len(selection.neurons) // tiles))
    tile_tokens = tokens[selection.tiles.slots[some]]
    whole, missed = mlp.index.outputs(tile_tokens, selection.neurons[some])
    return tile_tokens.flatten(0, 1), whole.flatten(0, 1), missed.flatten(0, 1)


@contextmanager
def seeing_tokens(model: nn.Module, mlps: Sequence[SparseMLP], see: Any) -> Iterator[None]:
    """Inside, the model runs dense, and `see(mlp, tokens)` gets the input tokens [N, d] of every MLP that runs, in the
    dtype that it computes in.

    Raises:
        CalibrationError: tokens are not finite, or an MLP did not run.
    """
    missing = {mlp.name for mlp in mlps}

    def hook(mlp: SparseMLP, x: Tensor) -> None:
        tokens = x.detach().reshape(-1, x.shape[-1])
        if not torch.isfinite(tokens).all():
            raise CalibrationError(f"the input of {mlp.name} holds NaN or infinite values")
        missing.discard(mlp.name)
        tokens = tokens.to(compute_dtype(tokens))
        with torch.autocast(x.device.type, enabled=False):
            see(mlp, tokens)

    handles = [
        mlp.inputs[0].register_forward_pre_hook(lambda module, args, mlp=mlp: hook(mlp, args[0])) for mlp in mlps
    ]
    try:
        with dense_forward(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
    if missing:
        raise CalibrationError(f"the model did not run {', '.join(sorted(missing)[:4])} on these batches")
