"""What is measured of every MLP beside a dense pass: output errors by k, what compensates them, and times."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from ..layers.compensation import Compensation, CompensationFit
from ..layers.modes import dense_forward
from ..layers.sparse_mlp import SparseMLP
from ..weights.projection import compute_dtype
from .mlp_timing import MLPTiming, time_mlp

_SHARES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
_TIMED_SHARES = (1 / 8, 1 / 2)
_TILES_AT_ONCE = 8


class MLPMeasurements:
    """One MLP's output errors, and the compensations they count on: fitted to some batches, judged on another.

    Both lie on straight lines against log k between the shares that were measured, and are zero at k = m.

    Attributes:
        errors: by measured k.
    """

    def __init__(self, mlp: SparseMLP) -> None:
        self.mlp = mlp
        self._fits = {share_of(mlp, share): CompensationFit(mlp.index.sketch.basis) for share in _SHARES}
        self._compensations: dict[int, Compensation] = {}
        self.errors: dict[int, float] = {}

    def fit(self, tokens: Tensor) -> None:
        """Fit to the MLP's input tokens [N, d] of a batch."""
        for x, _, missed in outputs_by_tiles(self.mlp, tokens, [*self._fits]):
            for k, fit in self._fits.items():
                fit.add(x, missed[k])

    def judge(self, tokens: Tensor) -> None:
        """Measure the errors that remain on the tokens of another batch, after all fitting.

        Raises:
            CalibrationError: the MLP's output is too large to be squared in float32.
        """
        self._compensations = {k: fit.solve() for k, fit in self._fits.items()}
        self.errors = self.errors_on(tokens)

    def errors_on(self, tokens: Tensor) -> dict[int, float]:
        """By measured k, the error on tokens [N, d], with the compensations that `judge` used."""
        whole, missing = 0.0, dict.fromkeys(self._fits, 0.0)
        for x, added, missed in outputs_by_tiles(self.mlp, tokens, [*self._fits]):
            whole += added.square().sum().item()
            for k, compensation in self._compensations.items():
                missing[k] += (missed[k] - compensation(x.float())).square().sum().item()
        if not math.isfinite(whole):
            raise CalibrationError(f"the output of {self.mlp.name} is too large to be measured: the model has diverged")
        return {k: math.sqrt(missing[k] / whole) if whole else 0.0 for k in missing}

    def error(self, k: int) -> float:
        """Relative error of the MLP's output with k neurons, compensated."""
        low, high, share = self._between(k)
        return self.errors[low] * (1 - share) + self.errors.get(high, 0.0) * share

    def compensation(self, k: int) -> Compensation:
        low, high, share = self._between(k)
        known = self._compensations[low]
        return known.towards(self._compensations.get(high, known), share)

    def _between(self, k: int) -> tuple[int, int, float]:
        """The measured budgets (or m) around k, and how far between them it is."""
        points = [*sorted(self.errors), self.mlp.index.neurons]
        k = max(k, points[0])
        low, high = next(pair for pair in itertools.pairwise(points) if k <= pair[1])
        return low, high, math.log(k / low) / math.log(high / low)


class MLPTimes:
    """Times of MLPs; those of one shape, dtype and number of tokens are timed once."""

    def __init__(self) -> None:
        self._keys: dict[str, tuple[Any, ...]] = {}
        self._samples: dict[tuple[Any, ...], Tensor] = {}
        self._times: dict[tuple[Any, ...], MLPTiming] = {}

    def add(self, mlp: SparseMLP, tokens: Tensor) -> None:
        """The tokens [N, d] that an MLP is to be timed on."""
        shapes = tuple((p.weight.shape, p.weight.dtype, p.source_class) for p in mlp.projections)
        self._keys[mlp.name] = key = (shapes, len(tokens), tokens.dtype)
        self._samples.setdefault(key, tokens)

    def tokens_of(self, mlp: SparseMLP) -> Tensor:
        """Tokens such as the MLP sees."""
        return self._samples[self._keys[mlp.name]]

    def of(self, mlp: SparseMLP) -> MLPTiming:
        key, tokens = self._keys[mlp.name], self.tokens_of(mlp)
        if key not in self._times:
            autocast = tokens.dtype != mlp.output.weight.dtype
            with torch.autocast(tokens.device.type, dtype=tokens.dtype, enabled=autocast):
                ks = sorted({share_of(mlp, share) for share in _TIMED_SHARES})
                self._times[key] = time_mlp(mlp, tokens, ks)
        return self._times[key]


def share_of(mlp: SparseMLP, share: float) -> int:
    """k of a share of an MLP's neurons."""
    return max(1, round(share * mlp.index.neurons))


def outputs_by_tiles(
    mlp: SparseMLP, tokens: Tensor, ks: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, dict[int, Tensor]]]:
    """By some tiles at a time: tokens [S, d]; what all neurons add to the MLP's output on them, [S, d_out]; and
    by k what those do that a selection of k skips, [S, d_out], both float32.

    Each neuron is computed once a tile: with the others between two consecutive k.
    """
    config, ks = mlp.runtime.config, sorted(ks)
    tiles = mlp.index.tile(tokens, config.tile_size, config.tile_order)
    for slots in tiles.slots.split(_TILES_AT_ONCE):
        tile_tokens = tokens[slots]
        ranked = mlp.index.ranked(tile_tokens, ks[-1])
        others = torch.ones(len(slots), mlp.index.neurons, device=ranked.device).scatter_(1, ranked, 0).nonzero()
        parts = [*ranked.tensor_split(ks[:-1], 1), others[:, 1].view(len(slots), -1)]
        kept, *skipped = [mlp.index.outputs(tile_tokens, part).float() for part in parts]
        missed = dict(zip(reversed(ks), itertools.accumulate(reversed(skipped)), strict=True))
        yield tile_tokens.flatten(0, 1), kept + missed[ks[0]], missed


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
