"""The activation index: which neurons matter for which tokens, without computing them all.

Built once per MLP from its weights. Two queries: `select` (the k most important neurons of each tile of tokens) and
`report` (per token, every neuron whose pre-activation reaches a threshold: half-space reporting). Both are
approximate up to the sketch of the base weights; the live low-rank updates enter exactly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import SubquadConfig, TileOrder
from .errors import WeightsError
from .projection import NeuronProjection
from .reporting import Report, ReportingIndex, empty_index
from .sketch import Sketch, add_low_rank, build_sketch
from .tiling import TokenTiles, make_tiles

# Measured on two pretrained models: fewer tokens choose worse neurons, more hardly better; 32 directions did best.
_SCORED_TOKENS = 16  # of each tile
_MOVE = 0.5  # of pre-activations' root mean square: how far importance looks beyond the estimate
_TILE_DIRECTIONS = 32  # leading directions of the sketch by which tokens resemble each other


@dataclass(frozen=True)
class Selection:
    """Tiles of tokens and the neurons each computes.

    Attributes:
        tiles: n tiles of T slots.
        neurons: int64 [n, k], the most important first; in no particular order if they are all.
    """

    tiles: TokenTiles
    neurons: Tensor


@dataclass(frozen=True)
class Examination:
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
        recompressed: the sketch has gone through folds since it was built from the weights.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[NeuronProjection],
        output: NeuronProjection,
        activation: Callable[[Tensor], Tensor],
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
        self.recompressed = False
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
            projection.set_rows(projection.live_rows())
            projection.update.restart()
        self._reporting = None
        self._seen = self._base_version()
        self.recompressed = True
        self.refresh()

    @torch.no_grad()
    def select(self, x: Tensor, k: int, tile_size: int, order: TileOrder) -> Selection:
        """Tiles of the tokens x [N, d], and the k most important neurons of each.

        A neuron's importance in a tile is |activation|^2 ||v_j||^2, summed over a sample of the tile's tokens, plus
        what a small change of its pre-activations would do to that.
        """
        self._current()
        directions = self.sketch.basis[:_TILE_DIRECTIONS].to(x.dtype)
        tiles = make_tiles((x @ directions.t()).float(), tile_size, order)
        stride = -(-tiles.shape[1] // _SCORED_TOKENS)
        return Selection(tiles, self._choose(x[tiles.slots[:, ::stride]], k))

    @torch.no_grad()
    def choose(self, tile_tokens: Tensor, k: int) -> Tensor:
        """The k most important neurons, int64 [n, k], of each of the given tiles, tokens [n, T, d]."""
        self._current()
        return self._choose(tile_tokens[:, :: -(-tile_tokens.shape[1] // _SCORED_TOKENS)], k)

    def _choose(self, sample: Tensor, k: int) -> Tensor:
        """The k most important neurons of each tile, from a sample of its tokens [n, t, d]."""
        count, _, width = sample.shape
        if k >= self.neurons:
            return torch.arange(self.neurons, device=sample.device).expand(count, -1)
        importance = self._importance(self._estimate(sample.reshape(-1, width)))
        scores = importance.view(*sample.shape[:2], -1).sum(1, dtype=torch.float32) * self.output_norms
        return scores.topk(k, dim=1).indices

    def _importance(self, pre: list[Tensor]) -> Tensor:
        """Squared activation plus its squared change if pre-activations move a little, [S, m].

        The second term keeps neurons that matter little now but can be trained to, since gradients reach a neuron
        through that change; it is also what an error of the estimate can hide.
        """
        if pre[0].dtype is torch.float16:
            pre = [values.float() for values in pre]  # squares leave its range
        if not self.gated:
            now = self._activate(pre[0])
            return (self._activate(pre[0] + _MOVE * _spread(pre[0])) - now).square_().add_(now.square())
        gate, up = pre if len(pre) == 2 else pre[0].chunk(2, dim=-1)
        now, up_squared = self._activate(gate), up.square()
        moved = (self._activate(gate + _MOVE * _spread(gate)) - now).square_().mul_(up_squared)
        return moved.addcmul_(now.square(), up_squared.add_((_MOVE * _spread(up)) ** 2))

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
        return self.examine(x[selection.tiles.slots], selection.neurons).recall

    @torch.no_grad()
    def examine(self, tile_tokens: Tensor, neurons: Tensor) -> Examination:
        """What a selection finds and what it misses, from the live weights themselves.

        Args:
            tile_tokens: [n, T, d].
            neurons: int64 [n, k], the neurons chosen for each tile.
        """
        count, size, width = tile_tokens.shape
        pre = self._exact(tile_tokens.reshape(-1, width))
        scores = self._importance(pre).view(count, size, -1).sum(1) * self._live_output_norms()
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, neurons, True)
        recall = chosen.gather(1, scores.topk(neurons.shape[1], dim=1).indices).float().mean().item()
        activations, rows = self.combine(pre).view(count, size, -1), self.output.live_rows().float()
        whole = activations @ rows
        return Examination(recall, whole, activations.masked_fill_(chosen.unsqueeze(1), 0) @ rows)

    def exact_activations(self, x: Tensor) -> Tensor:
        """True activations of all neurons on x [N, d]: float32 [N, m]."""
        return self.combine(self._exact(x))

    def _live_output_norms(self) -> Tensor:
        rows = self.output.live_rows()
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return torch.linalg.vector_norm(rows, dim=1, dtype=dtype).float().square()

    def _exact(self, x: Tensor) -> list[Tensor]:
        return [torch.addmm(_bias(p, torch.float32), x.float(), p.live_rows().float().t()) for p in self.inputs]

    def _estimate(self, x: Tensor) -> list[Tensor]:
        """Pre-activations by input projection from sketch, live update and bias: [S, rows] each, in x's dtype."""
        estimates, first = [], 0
        for projection in self.inputs:
            u, v = projection.update.factors()
            codes = torch.cat([self.sketch.codes[first : first + len(u)], u.to(self.sketch.codes)], 1).to(x.dtype)
            basis = torch.cat([self.sketch.basis, v.to(self.sketch.basis)]).to(x.dtype)
            estimates.append(torch.addmm(_bias(projection, x.dtype), x @ basis.t(), codes.t()))
            first += len(u)
        return estimates

    def combine(self, pre: list[Tensor]) -> Tensor:
        """Activations [..., m] from the pre-activations of the input projections."""
        if not self.gated:
            return self._activate(pre[0])
        gate, up = pre if len(pre) == 2 else pre[0].chunk(2, dim=-1)
        return self._activate(gate) * up

    def _activate(self, pre: Tensor) -> Tensor:
        """The MLP's activation; one that has parameters runs in their dtype, as some cannot mix."""
        own = next(self.activation.parameters(), pre) if isinstance(self.activation, nn.Module) else pre
        return self.activation(pre.to(own.dtype)).to(pre.dtype)

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


def _spread(values: Tensor) -> Tensor:
    """Root mean square over each token's neurons, [S, 1]."""
    return torch.linalg.vector_norm(values, dim=1, keepdim=True) / values.shape[1] ** 0.5


def _bias(projection: NeuronProjection, dtype: torch.dtype) -> Tensor:
    """The bias in `dtype`, or one zero that broadcasts."""
    if projection.bias is None:
        return torch.zeros(1, device=projection.weight.device, dtype=dtype)
    return projection.bias.detach().to(dtype)
