"""The activation index: which neurons matter for which tokens, without computing them all.

Built once per MLP from its weights. Two queries: `select` (the k most important neurons of each tile of tokens) and
`report` (per token, every neuron whose pre-activation reaches a threshold: half-space reporting). Both are
approximate up to the sketch of the base weights; the live low-rank updates enter exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import SubquadConfig, TileOrder
from ..errors import WeightsError
from ..ops.backends import Backend, EstimatedInput, MergedWeight, Scoring, backend_for
from ..ops.importance import Activation, combine, importance
from ..ops.token_tiles import TokenTiles, make_tiles
from ..weights.projection import NeuronProjection
from .half_space import Report, ReportingIndex, empty_index
from .sketch import Sketch, add_low_rank, build_sketch

# Measured on two pretrained models: fewer tokens choose worse neurons, more hardly better; 32 directions did best.
_SCORED_TOKENS = 16  # of each tile
_TILE_DIRECTIONS = 32  # leading directions of the sketch by which tokens resemble each other


@dataclass(frozen=True)
class Selection:
    """Tiles of tokens and the neurons each computes.

    Attributes:
        tiles: n tiles of T slots.
        neurons: int64 [n, k], each neuron of a tile once.
    """

    tiles: TokenTiles
    neurons: Tensor


@dataclass(frozen=True)
class SelectionQuality:
    """A selection held against the truth.

    Attributes:
        recall: share of the truly most important neurons that were chosen.
        whole: what all neurons add to the MLP's output, float32 [n, T, d_out].
        missed: what the skipped ones do, float32 [n, T, d_out].
    """

    recall: float
    whole: Tensor
    missed: Tensor


class ActivationIndex:
    """Index over the m neurons of one MLP.

    Args:
        name: of the MLP, for errors.
        inputs: one input projection, or gate and up.
        output: the output projection.
        activation: the MLP's own elementwise activation.
        gated: neurons are activation(gate) * up, with gate and up in two projections or stacked in one.

    Attributes:
        sketch_is_approximate: the sketch has gone through folds since it was built from the weights.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[NeuronProjection],
        output: NeuronProjection,
        activation: Activation,
        gated: bool,
        config: SubquadConfig,
    ) -> None:
        self.name = name
        self.inputs = list(inputs)
        self.output = output
        self.activation = activation
        self.gated = gated
        self.rank = config.sketch_rank
        self.seed = config.seed
        self.factory = config.index_factory
        self.backend_name = config.backend
        self.backend(output.weight.device)  # one that is not there is told now
        self._copied_with: list[Tensor] | None = None  # in a copy: samples of the weights it was built from
        self.build()
        empty_index(self.sketch.basis.shape[0] + config.rank + 1, self.factory)  # a wrong factory is told now

    @property
    def neurons(self) -> int:
        """m."""
        return self.output.weight.shape[0 if self.output.weight_is_rows else 1]

    @torch.no_grad()
    def build(self) -> None:
        """Sketch the base input rows of all input projections, stacked, and measure the output rows.

        Raises:
            WeightsError: an input weight holds NaN or infinite values, as one that was loaded after the patch may.
        """
        stacked = torch.cat([projection.rows() for projection in self.inputs])
        try:
            self.sketch: Sketch = build_sketch(stacked, self.rank, self.seed)
        except torch.linalg.LinAlgError as error:
            raise WeightsError(f"a weight of {self.name} holds NaN or infinite values: load them anew") from error
        self._reporting: tuple[Tensor, ReportingIndex] | None = None  # and the U it was made with
        self._seen = self._base_version()
        self.sketch_is_approximate = False
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Measure ||v_j||^2 of the live output rows anew: float32 [m]."""
        self.output_norms = self._live_output_norms()

    @torch.no_grad()
    def fold(self) -> None:
        """Fold the live updates into the base weights, and into the sketch without reading those weights."""
        self._current()
        blocks = [p.update.factors() for p in self.inputs]
        left = torch.block_diag(*[u for u, _ in blocks])
        right = torch.cat([v for _, v in blocks])
        self.sketch = add_low_rank(self.sketch, left, right)
        for projection in (*self.inputs, self.output):
            projection.set_rows(projection.merged_rows())
            projection.update.restart()
        self._reporting = None
        self._seen = self._base_version()
        self.sketch_is_approximate = True
        self.refresh()

    @torch.no_grad()
    def select(self, x: Tensor, k: int, tile_size: int, order: TileOrder) -> Selection:
        """Tiles of the tokens x [N, d], and the k most important neurons of each.

        A neuron's importance in a tile is |activation|^2 ||v_j||^2, summed over a sample of the tile's tokens, plus
        what a small change of its pre-activations would do to that.
        """
        tiles = self.tile(x, tile_size, order)
        return Selection(tiles, self.choose(x[_sampled(tiles.slots)], k))

    @torch.no_grad()
    def tile(self, x: Tensor, tile_size: int, order: TileOrder) -> TokenTiles:
        """Tiles of the tokens x [N, d] that resemble each other in the leading directions of the sketch."""
        self._current()
        directions = self.sketch.basis[:_TILE_DIRECTIONS].to(x.dtype)
        return make_tiles((x @ directions.t()).float(), tile_size, order, self.backend(x.device).bisect)

    @torch.no_grad()
    def choose(self, tile_tokens: Tensor, k: int) -> Tensor:
        """The k most important neurons of each of the given tiles, tokens [n, T, d]: int64 [n, k], in no order.

        k is rounded up to what costs the same on the device.
        """
        k = self.round_up_k(k)
        if k >= self.neurons:
            return torch.arange(self.neurons, device=tile_tokens.device).expand(len(tile_tokens), -1)
        return self.backend(tile_tokens.device).top_neurons(self.tile_scores(_sampled(tile_tokens)), k)

    def round_up_k(self, k: int) -> int:
        """How many neurons are computed if k are asked for: what costs the same on the device, at most all."""
        return min(self.backend(self.output.weight.device).round_up_k(k), self.neurons)

    @torch.no_grad()
    def ranked(self, tile_tokens: Tensor, k: int) -> Tensor:
        """The k most important neurons of each of the given tiles, tokens [n, T, d], the most important first."""
        return self.tile_scores(_sampled(tile_tokens)).topk(k, dim=1).indices

    @torch.no_grad()
    def tile_scores(self, sample: Tensor) -> Tensor:
        """Importance of every neuron to tiles of which some tokens are given, [n, t, d]: float32 [n, m]."""
        self._current()
        inputs, first = [], 0
        for projection in self.inputs:
            u, v = projection.update.factors()
            for start in range(0, len(u), self.neurons):  # gate and up, if they are stacked in one
                part = slice(start, start + self.neurons)
                bias = None if projection.bias is None else projection.bias.detach()[part]
                inputs.append(EstimatedInput(self.sketch.codes[first : first + self.neurons], u[part], v, bias))
                first += self.neurons
        scoring = Scoring(self.sketch.basis, inputs, self.activation, self.output_norms)
        return self.backend(sample.device).tile_scores(sample, scoring)

    def backend(self, device: torch.device) -> Backend:
        """What computes on a device."""
        return backend_for(self.backend_name, device)

    @torch.no_grad()
    def report(self, x: Tensor, threshold: float) -> Report:
        """Half-space reporting: for each token of x [N, d], the neurons with pre-activation >= threshold.

        The pre-activation is the index's own (sketch, live update and bias; of the gate in gated MLPs). With a flat
        faiss index the answer is all of them, with an inverted file or a graph those it visits.
        """
        self._current()
        gate = self.inputs[0]
        u, v = gate.update.factors()
        if self._reporting is None or not torch.equal(self._reporting[0], u):
            bias = _bias(gate, torch.float32).expand(len(u))[:, None]
            rows = torch.cat([self.sketch.codes[: len(u)], u.float(), bias], 1)[: self.neurons]
            self._reporting = (u.clone(), ReportingIndex(rows, self.factory))
        x = x.float()
        queries = torch.cat([x @ self.sketch.basis.t(), x @ v.float().t(), x.new_ones(len(x), 1)], 1)
        return self._reporting[1].report(queries, threshold)

    @torch.no_grad()
    def recall(self, x: Tensor, k: int, tile_size: int, order: TileOrder = "similar") -> float:
        """Share of the truly k most important neurons of each tile of x [N, d] that `select` finds."""
        selection = self.select(x, k, tile_size, order)
        return self.evaluate_selection(x[selection.tiles.slots], selection.neurons).recall

    @torch.no_grad()
    def evaluate_selection(self, tile_tokens: Tensor, neurons: Tensor) -> SelectionQuality:
        """What a selection finds and what it misses, from the live weights themselves.

        Args:
            tile_tokens: [n, T, d].
            neurons: int64 [n, k], the neurons chosen for each tile.
        """
        count, size, width = tile_tokens.shape
        pre = self._exact(tile_tokens.reshape(-1, width))
        scores = importance(pre, self.activation, self.gated).view(count, size, -1).sum(1) * self._live_output_norms()
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, neurons, True)
        recall = chosen.gather(1, scores.topk(neurons.shape[1], dim=1).indices).float().mean().item()
        activations, rows = self.combine(pre).view(count, size, -1), self.output.merged_rows().float()
        whole = activations @ rows
        return SelectionQuality(recall, whole, activations.masked_fill_(chosen.unsqueeze(1), 0) @ rows)

    @torch.no_grad()
    def outputs(self, tile_tokens: Tensor, neurons: Tensor) -> Tensor:
        """What the given neurons of each tile add to the MLP's output, computed as in the sparse forward.

        Args:
            tile_tokens: [n, T, d] in the compute dtype.
            neurons: int64 [n, k], in any order.

        Returns:
            [n T, d_out] in the compute dtype, without the output's bias.
        """
        count, size, _ = tile_tokens.shape
        x, backend = tile_tokens.flatten(0, 1), self.backend(tile_tokens.device)
        output = MergedWeight(self.output.rows(x.dtype), *self.output.update.factors())
        if not neurons.shape[1]:
            return x.new_zeros(len(x), output.rows.shape[1])
        tiles = TokenTiles.of(torch.arange(len(x), device=x.device).view(count, size), len(x))
        inputs = [MergedWeight(p.rows(x.dtype), *p.update.factors(), p.bias) for p in self.inputs]
        stacked = range(0, len(inputs[0].rows), self.neurons)
        compact, _ = backend.gathered_up(x, tiles, torch.cat([neurons + first for first in stacked], 1), inputs)
        return backend.gathered_down([self.combine(compact)], tiles, neurons, [output])[0]

    def exact_importance(self, x: Tensor) -> Tensor:
        """True importance of all neurons to x [N, d], before output norms: float32 [N, m]."""
        return importance(self._exact(x), self.activation, self.gated)

    def exact_activations(self, x: Tensor) -> Tensor:
        """True activations of all neurons on x [N, d]: float32 [N, m]."""
        return self.combine(self._exact(x))

    def _live_output_norms(self) -> Tensor:
        rows = self.output.merged_rows()
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return torch.linalg.vector_norm(rows, dim=1, dtype=dtype).float().square()

    def _exact(self, x: Tensor) -> list[Tensor]:
        return [torch.addmm(_bias(p, torch.float32), x.float(), p.merged_rows().float().t()) for p in self.inputs]

    def combine(self, pre: list[Tensor]) -> Tensor:
        """Activations [..., m] from the pre-activations of the input projections."""
        return combine(pre, self.activation, self.gated)

    def _base_version(self) -> tuple[Any, ...]:
        return tuple(part for p in (*self.inputs, self.output) for part in p.version())

    def _current(self) -> None:
        """Rebuild if the base weights were changed from outside, as by `load_state_dict`."""
        if self._copied_with is not None:
            projections = zip(self._copied_with, (*self.inputs, self.output), strict=True)
            if all(torch.equal(sample.to(p.weight.device), p.sample()) for sample, p in projections):
                self._seen = self._base_version()
            self._copied_with = None
        if self._seen != self._base_version():
            self.build()

    def __getstate__(self) -> dict[str, Any]:
        samples = [projection.sample() for projection in (*self.inputs, self.output)]
        return {**self.__dict__, "_reporting": None, "_seen": None, "_copied_with": samples}


def _sampled(by_slot: Tensor) -> Tensor:
    """Of [n, T, ...], the slots of each tile that are scored."""
    return by_slot[:, :: -(-by_slot.shape[1] // _SCORED_TOKENS)]


def _bias(projection: NeuronProjection, dtype: torch.dtype) -> Tensor:
    """The bias in `dtype`, or one zero that broadcasts."""
    if projection.bias is None:
        return torch.zeros(1, device=projection.weight.device, dtype=dtype)
    return projection.bias.detach().to(dtype)
