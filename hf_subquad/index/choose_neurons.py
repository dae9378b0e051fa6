"""The activation index: finds which neurons matter for which tokens, without computing them all.

It is built once per MLP from its weights, then fitted to the MLP's inputs. There are two queries: `select` (the k most
important neurons of each tile of tokens) and `report` (for each token, every neuron whose pre-activation reaches a
threshold: half-space reporting). Both approximate the base weights by a sketch; the current low-rank updates are
included exactly.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..config import SubquadConfig, TileOrder
from ..errors import CalibrationError, WeightsError
from ..ops.backends import Backend, MergedWeight, Scoring, backend_for
from ..ops.group_tokens import Selection, TokenTiles, make_tiles
from ..ops.importance import Activation, combine
from ..weights.projection_with_update import NeuronProjection
from ..weights.shards import gathered
from .half_space import Report, ReportingIndex, empty_index
from .sketch import Sketch, build_sketch, summary_of

_SCORED_TOKENS = 16  # of each tile, at least
_SCORING = 0.05  # of a tile's products, forward and backward, that scoring more of its tokens may take
_TILE_DIRECTIONS = 32  # leading directions of the sketch by which tokens resemble each other: measured to do best
_FITTED_TOKENS = 2048  # at most: more hardly fit better
_SUMMARY = 2  # rows of their summary for each of the sketch's


class ActivationIndex:
    """Index over the m neurons of one MLP.

    Args:
        name: of the MLP, for errors.
        inputs: one input projection, or gate and up.
        output: the output projection.
        activation: the MLP's own elementwise activation.
        gated: neurons are activation(gate) * up, with gate and up in two projections or stacked in one.

    `build`, `fit` and `fold` rebuild it, and so does `rebuild_if_stale` after something else changed the base weights.
    A query never does.

    Attributes:
        sketch: of the base input rows of all input projections, stacked.
        output_norms: ||v_j||^2 of the output rows, float32 [m].
        summary: summary of the tokens that the sketch is fitted to, float32 [s, d]; None if it is built from the
            weights alone. Summary and weights determine the sketch, so it can be rebuilt from them.
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
        self.backend(output.weight.device)  # raises if it is not available
        self.summary: Tensor | None = None
        self.sketch: Sketch
        self._seen: tuple[Any, ...] | None = None
        self._reporting: tuple[Tensor, ReportingIndex] | None = None  # and the U it was made with
        self.build()
        empty_index(self.sketch.basis.shape[0] + config.rank + 1, self.factory)  # raises if the factory string is wrong

    @property
    def neurons(self) -> int:
        """m."""
        return self.output.shape[0]

    @torch.no_grad()
    def build(self) -> None:
        """Rebuild the sketch of the base input rows, for the tokens of the last fit, and the norms of the output rows.

        Raises:
            WeightsError: an input weight holds NaN or infinite values, which may come from a checkpoint loaded after
                the patch. The index is unchanged.
        """
        self.adopt(self.summary)

    @torch.no_grad()
    def fit(self, tokens: Tensor) -> None:
        """Fit the sketch to the MLP's inputs, so that it predicts their pre-activations as well as its rank allows.

        Args:
            tokens: [N, d], any float dtype; at most 2048 of them are used.

        Raises:
            CalibrationError: a token holds NaN or infinite values. The index is unchanged.
            WeightsError: an input weight does.
        """
        tokens = tokens.detach().reshape(-1, tokens.shape[-1])
        if len(tokens) > _FITTED_TOKENS:
            generator = torch.Generator().manual_seed(self.seed)
            some = torch.randperm(len(tokens), generator=generator, device="cpu")[:_FITTED_TOKENS].sort().values
            tokens = tokens[some.to(tokens.device)]
        try:
            summary = summary_of(tokens, _SUMMARY * self.rank, self.seed)
        except CalibrationError as error:
            raise CalibrationError(
                f"{self.name} cannot be fitted to its input: {error}; leave that batch out"
            ) from error
        self.adopt(summary)

    def adopt(self, summary: Tensor | None) -> None:
        """Fit the sketch to the tokens of a `summary`, from this or another index of the same MLP."""
        stacked = torch.cat([projection.rows() for projection in self.inputs])
        try:
            sketch = build_sketch(stacked, self.rank, self.seed, summary)
        except WeightsError as error:
            raise WeightsError(f"the index of {self.name} cannot be built: {error}; load them again") from error
        self.sketch = sketch
        self.summary = summary
        self._note_weights()
        self.output_norms = self.output.row_norms()

    def rebuild_if_stale(self) -> bool:
        """`build` if base weights were changed or replaced since the last build. Returns whether they were."""
        if self._is_current():
            return False
        with self.gathered():
            stale = self._is_stale()
            if stale:
                self.build()
        return stale

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Context manager: inside, weights and factors that FSDP2 keeps in shards are whole, on all ranks."""
        current = self._is_current()
        with gathered(self._projections):
            if current:  # the same values in other tensors
                self._seen = self._base_version()
            try:
                yield
            finally:
                current = self._is_current()
        if current:
            self._seen = self._base_version()

    def compare_weights(self) -> None:
        """Weights are other tensors now: treat them as changed only if their values differ."""
        self._seen = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute ||v_j||^2 of the current output rows; `build` if base weights changed without PyTorch noticing."""
        with self.gathered():
            if not all(map(_same, self._samples, self._projections)):
                for projection in self._projections:
                    projection.drop_copy()
                return self.build()
            self.output_norms = self.output.row_norms()

    @torch.no_grad()
    def fold(self) -> None:
        """Fold the current updates into the base weights, and `build`."""
        with self.gathered():
            for projection in self._projections:
                projection.set_rows(projection.merged_rows())
                projection.update.restart()
            self.build()

    @torch.no_grad()
    def select(self, x: Tensor, k: int, tile_size: int, order: TileOrder) -> Selection:
        """Tiles of the tokens x [N, d], and the k most important neurons of each.

        A neuron's importance in a tile is |activation|^2 ||v_j||^2, summed over `scored_tokens` of the tile's tokens,
        plus a term for what a small change of its pre-activations would do to it.
        """
        tiles = self.tile(x, tile_size, order)
        return Selection(tiles, self.choose(x[self._sampled(tiles.slots)], k))

    @torch.no_grad()
    def tile(self, x: Tensor, tile_size: int, order: TileOrder) -> TokenTiles:
        """Group the tokens x [N, d] into tiles of tokens that are similar in the leading directions of the sketch."""
        self._place()
        directions = self.sketch.basis_as(x.dtype)[:_TILE_DIRECTIONS]
        return make_tiles((x @ directions.t()).float(), tile_size, order, self.backend(x.device).bisect)

    @torch.no_grad()
    def choose(self, tile_tokens: Tensor, k: int) -> Tensor:
        """The k most important neurons of each of the given tiles, tokens [n, T, d]: int64 [n, k], in no order.

        k is rounded up to the next number that costs the same on the device.
        """
        k = self.round_up_k(k)
        if k >= self.neurons:
            return torch.arange(self.neurons, device=tile_tokens.device).expand(len(tile_tokens), -1)
        return self.backend(tile_tokens.device).top_neurons(self.tile_scores(self._sampled(tile_tokens)), k)

    def round_up_k(self, k: int) -> int:
        """The number of neurons actually computed: k, rounded up to what costs the same on the device, at most m."""
        return min(self.backend(self.output.weight.device).round_up_k(k), self.neurons)

    @torch.no_grad()
    def ranked(self, tile_tokens: Tensor, k: int) -> Tensor:
        """The k most important neurons of each of the given tiles, tokens [n, T, d], the most important first."""
        return self.tile_scores(self._sampled(tile_tokens)).topk(k, dim=1).indices

    @torch.no_grad()
    def tile_scores(self, sample: Tensor) -> Tensor:
        """Importance of every neuron to every tile, from a sample of its tokens [n, t, d]: float32 [n, m]."""
        self._place()
        inputs: list[MergedWeight] = []
        codes = self.sketch.codes.split([projection.shape[0] for projection in self.inputs])
        for projection, its_codes in zip(self.inputs, codes, strict=True):
            bias = None if projection.bias is None else projection.bias.detach()
            estimated = MergedWeight(its_codes, *projection.update.factors(), bias)
            stacked = len(its_codes) > self.neurons  # gate and up
            inputs += estimated.split(self.neurons) if stacked else [estimated]
        scoring = Scoring(self.sketch.basis_as(sample.dtype), inputs, self.activation, self.output_norms)
        return self.backend(sample.device).tile_scores(sample, scoring)

    def backend(self, device: torch.device) -> Backend:
        """The backend that computes on a device."""
        return backend_for(self.backend_name, device)

    @torch.no_grad()
    def report(self, x: Tensor, threshold: float) -> Report:
        """Half-space reporting: for each token of x [N, d], the neurons with pre-activation >= threshold.

        The pre-activation is the index's estimate (sketch, current update and bias; of the gate in gated MLPs). A flat
        faiss index reports all of these neurons, an inverted file or a graph only those that it visits.
        """
        self._place()
        gate = self.inputs[0]
        u, v = gate.update.factors()
        if self._reporting is None or not torch.equal(self._reporting[0], u):
            bias = u.new_zeros(len(u)) if gate.bias is None else gate.bias
            rows = torch.cat([self.sketch.codes[: len(u)], u.float(), bias.float()[:, None]], 1)[: self.neurons]
            self._reporting = (u.clone(), ReportingIndex(rows, self.factory))
        x = x.float()
        queries = torch.cat([x @ self.sketch.basis.t(), x @ v.float().t(), x.new_ones(len(x), 1)], 1)
        return self._reporting[1].report(queries, threshold)

    def combine(self, pre: list[Tensor]) -> Tensor:
        """Activations [..., m] from the pre-activations of the input projections."""
        return combine(pre, self.activation, self.gated)

    def scored_tokens(self, size: int) -> int:
        """How many tokens of a tile of `size` are scored, evenly spread.

        All of them, if scoring them costs at most a twentieth of a forward and backward pass through half of the
        neurons; otherwise as many as cost a twentieth, but at least 16.
        """
        rank, width = self.sketch.basis.shape
        rows = len(self.sketch.codes)
        scoring, products = rank * (width + rows), (rows + self.neurons) * width
        affordable = max(_SCORED_TOKENS, int(size * _SCORING * products / scoring))
        most = self.backend(self.output.weight.device).most_scored
        return min(size, affordable, most or size)

    def _sampled(self, by_slot: Tensor) -> Tensor:
        """Of [n, T, ...], the slots of each tile that are scored."""
        size = by_slot.shape[1]
        return by_slot[:, :: -(-size // self.scored_tokens(size))]

    def _note_weights(self) -> None:
        """Remember which base weights the index was built from."""
        self._reporting = None
        self._samples = [projection.sample().clone() for projection in self._projections]
        self._seen = self._base_version()
        self._warned = False

    @property
    def _projections(self) -> list[NeuronProjection]:
        return [*self.inputs, self.output]

    def _base_version(self) -> tuple[Any, ...]:
        """Changes with the values of the base weights, but not with their device or dtype."""
        return tuple((id(p.weight), p.weight._version) for p in self._projections)

    def _is_current(self) -> bool:
        return self._seen == self._base_version()

    def _is_stale(self) -> bool:
        if self._seen is None:  # a copy: its weights are others, with the same values
            same = all(map(_same, self._samples, self._projections))
            self._seen = self._base_version() if same else ()
        return not self._is_current()

    def _place(self) -> None:
        """Follow the weights to their device; warn if they are not those that were sketched."""
        device = self.output.weight.device
        if self.sketch.basis.device != device:
            self.sketch = self.sketch.to(device)
            self.output_norms = self.output_norms.to(device)
        # A pass sees the weights that FSDP2 has gathered, in tensors of its own.
        if not self._warned and not self.output.runtime.sharded and self._is_stale():
            self._warned = True
            warnings.warn(
                f"the base weights of {self.name} were changed after its activation index was built, so neurons are "
                "chosen by the old weights: call sync_model (SubquadCallback does in every step) to rebuild it",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reporting": None, "_seen": None}


def _same(sample: Tensor, projection: NeuronProjection) -> bool:
    """Whether a sample is from a projection's base weights, up to a cast of them."""
    now, rounding = projection.sample(), torch.finfo(projection.dtype)
    return torch.allclose(sample.to(now.device), now, rtol=rounding.eps, atol=rounding.smallest_normal)
