"""The sparse MLP: leaf projections that hand a compact [n, T, k] tensor through the model's own middle.

The input projections return the activations of the chosen neurons only, in tile order; the model applies its own
activation, gate product and dropout; the output projection consumes the result and restores token order.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..errors import EmptyBatchError, InactivePatchError, SubquadError
from ..index.activation_index import ActivationIndex, Selection
from ..ops.products import gathered_down, gathered_up
from ..ops.token_tiles import TokenTiles, tile_shape
from ..weights.projection import NeuronProjection, compute_dtype
from .compensation import Compensation
from .runtime import Runtime

_AUDITED_TILES = 4
_FEW = 4  # times fewer tokens than a tile has

_numbers = itertools.count()
_by_number: WeakValueDictionary[int, "SparseMLP"] = WeakValueDictionary()  # a compiled graph holds numbers only


class SparseMLP:
    """One MLP: its projections, its index, and the selection between its first and its last projection.

    Attributes:
        name: path of the MLP in the model, that of the bare one if it was patched inside PEFT's wrapper.
        parent: the module whose forward calls the projections; its own code runs unchanged.
        sources: the modules that the projections replaced, by path below the parent.
        trainable: which of their parameters were trainable.
        parent_forward: the forward that called the projections when they were patched in.
        k: neurons that a tile computes.
        dense: the forward is dense whatever the mode, as planned or because the watch gave the layer up.
        calls: sparse forward passes so far.
        audited: tokens [n, T, d] and chosen neurons [n, k] of some tiles of a recent batch, kept if `auditing`.
        compensation: what stands in for skipped neurons, once it was fitted.
        forced: if set, the selection that is used in place of the index's.
    """

    def __init__(
        self,
        name: str,
        parent: nn.Module,
        inputs: Sequence["InputProjection"],
        output: "OutputProjection",
        index: ActivationIndex,
        runtime: Runtime,
        sources: dict[str, nn.Module],
    ) -> None:
        self.name = name
        self.parent = parent
        self.inputs = list(inputs)
        self.output = output
        self.index = index
        self.runtime = runtime
        self.sources = sources
        self.trainable = {
            path: {name: value.requires_grad for name, value in source.named_parameters()}
            for path, source in sources.items()
        }
        self.parent_forward = current_forward(parent)
        self.k = runtime.config.active_neurons(index.neurons)
        self.calls = 0
        self.dense = False
        self.auditing = False
        self.audited: tuple[Tensor, Tensor] | None = None
        self.compensation: Compensation | None = None
        self.forced: Selection | None = None
        self._call: _Call | None = None
        self._enroll()
        by_place: list[InputProjection | OutputProjection] = [*self.inputs, output]
        for place, projection in enumerate(by_place):
            projection.mlp, projection.place = self, place

    @property
    def projections(self) -> list[NeuronProjection]:
        return [*self.inputs, self.output]

    @property
    def active(self) -> int:
        """Neurons that a token costs in training: k as the device rounds it up, or all m."""
        return self.index.neurons if self.dense else self.index.round_up_k(self.k)

    def set_active(self, k: int) -> None:
        """Compute k neurons a tile from now on; all m of them: run dense."""
        self.dense = k >= self.index.neurons
        if not self.dense:
            self.k = k

    def up_project(self, projection: "InputProjection", x: Tensor) -> Tensor | None:
        """The compact activations [n, T, k] of an input projection on x [..., d]; None for a dense forward.

        The first input projection called on a batch selects, a second one (up beside gate) follows it. Selection
        depends on x and the weights alone, so a recomputed forward (gradient checkpointing) selects the same.

        Raises:
            EmptyBatchError: x holds no tokens.
            InactivePatchError: the update has no values, and PyTorch would compute garbage with it.
        """
        if projection.update.U.is_meta:
            raise InactivePatchError(
                f"{self.name} is on the meta device (offloaded by accelerate?), where its low-rank updates hold no "
                "values: offload the model that was saved, or call unpatch_model first"
            )
        call = self._call
        if call is None or projection.place in call.served:
            sparse = self.runtime.sparse(projection.training) and (not self.dense or self.forced is not None)
            call = self._call = _Call(x, self._select(x, projection.training) if sparse else None)
        together = self.inputs if x is call.x and not call.served else [projection]
        call.served.append(projection.place)
        if call.selection is None:
            return None
        if projection.place not in call.computed or x is not call.x:  # in some models each input has its own clamp
            tiles, neurons = call.selection.tiles, call.selection.neurons
            if projection.stacked:
                neurons = torch.cat([neurons, neurons + self.index.neurons], 1)
            tokens = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
            matrices = [p.matrix(tokens.dtype) for p in together]
            compact = gathered_up(tokens, tiles, neurons, matrices, self.index.backend_name)
            call.computed.update(zip([p.place for p in together], compact, strict=True))
        return call.computed.pop(projection.place)

    def down_project(self, a: Tensor) -> Tensor | None:
        """The MLP's output [..., d] for compact activations a [n, T, k]; None for a dense forward."""
        assert self._call is not None, "an output projection was called before its input projection"
        x, selection, self._call = self._call.x, self._call.selection, None
        if selection is None:
            return None
        expected = (*selection.tiles.shape, selection.neurons.shape[1])
        if a.shape != expected:
            raise SubquadError(
                f"{self.name}: the output projection got shape {tuple(a.shape)}, expected the compact {expected}; "
                "something between the projections is not elementwise"
            )
        a = a.to(compute_dtype(a))
        matrix = self.output.matrix(a.dtype)
        y = gathered_down(a, selection.tiles, selection.neurons, matrix, self.index.backend_name)
        if self.compensation is not None:
            y = y + self.compensation(x.reshape(-1, x.shape[-1]).to(y.dtype))
        return y.view(*x.shape[:-1], -1)

    def forget_call(self) -> None:
        """Let go of a forward pass that did not end, and of its graph."""
        self._call = None

    def _select(self, x: Tensor, training: bool) -> Selection:
        tokens = x.detach().reshape(-1, x.shape[-1]).to(compute_dtype(x))
        if not len(tokens):
            raise EmptyBatchError(
                f"{self.name} got an empty batch (shape {tuple(x.shape)}): drop it before the model or, if the model "
                "chose no tokens of it for this MLP, leave such MLPs out with exclude_modules"
            )
        if self.forced is not None:
            self.calls += 1
            return self.forced
        size = self.runtime.config.tile_size
        # So few tokens are those of a generation step, one a sequence: each gets neurons of its own.
        size = 1 if not training and _FEW * len(tokens) <= size else size
        if not torch.compiler.is_compiling():
            return self.select(tokens, self.k, size, training)
        entries, slots, places, neurons = torch.ops.hf_subquad.select(tokens, self.number, self.k, size, training)
        return Selection(TokenTiles(entries, slots, places, len(tokens)), neurons)

    def select(self, tokens: Tensor, k: int, tile_size: int, training: bool) -> Selection:
        """Select for tokens [N, d], and keep what an audit of it needs."""
        self.calls += 1
        with torch.autocast(
            tokens.device.type, enabled=False
        ):  # so that the audit, made outside of it, judges the same
            selection = self.index.select(tokens, k, tile_size, self.runtime.config.tile_order)
        if self.auditing and training:
            some = slice(None, None, -(-len(selection.neurons) // _AUDITED_TILES))
            self.audited = tokens[selection.tiles.slots[some]], selection.neurons[some]
        return selection

    def _enroll(self) -> None:
        """Take a number by which compiled graphs find this MLP."""
        self.number = next(_numbers)
        _by_number[self.number] = self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_call": None, "audited": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._enroll()


@dataclass
class _Call:
    """A forward pass under way, from an MLP's first input projection to its output projection.

    Attributes:
        x: the MLP's input [..., d].
        selection: None if the pass is dense.
        served: places of the input projections that were called.
        computed: compact activations that wait for their input projection to be called, by its place.
    """

    x: Tensor
    selection: Selection | None
    served: list[int] = field(default_factory=list)
    computed: dict[int, Tensor] = field(default_factory=dict)


class InputProjection(NeuronProjection):
    """Projection into neurons: [..., d] to [n, T, k] when sparse, to [..., m] when dense.

    Attributes:
        place: among the MLP's projections.
        stacked: gate and up rows are in one matrix [2 m, d].
    """

    is_input = True
    mlp: SparseMLP
    place: int
    stacked = False

    def forward(self, x: Tensor) -> Tensor:
        compact = self.mlp.up_project(self, x)
        return self.dense(x) if compact is None else compact


class OutputProjection(NeuronProjection):
    """Projection out of neurons: [n, T, k] back to [..., d] when sparse, [..., m] to [..., d] when dense."""

    is_input = False
    mlp: SparseMLP
    place: int

    def weights_loaded(self) -> None:
        """Rebuild the index: an MLP's output projection is loaded behind its input projections."""
        self.mlp.index.rebuild_if_stale()

    def forward(self, a: Tensor) -> Tensor:
        y = self.mlp.down_project(a)
        return self.dense(a) if y is None else y


# For compiled graphs, selecting is one operator: what it reads beside the tokens is found by the MLP's number, at the
# time when the graph runs.


@torch.library.custom_op(
    "hf_subquad::select",
    mutates_args=(),
    schema="(Tensor tokens, int number, int k, int tile_size, bool training) -> Tensor[]",
)
def _select(tokens: Tensor, number: int, k: int, tile_size: int, training: bool) -> list[Tensor]:
    selection = _by_number[number].select(tokens, k, tile_size, training)
    tiles = selection.tiles
    return [tiles.entries, tiles.slots, tiles.places, selection.neurons.contiguous()]


@_select.register_fake
def _(tokens: Tensor, number: int, k: int, tile_size: int, training: bool) -> list[Tensor]:
    count, size = tile_shape(len(tokens), tile_size)
    active = _by_number[number].index.round_up_k(k)

    def indices(*shape: int) -> Tensor:
        return tokens.new_empty(shape, dtype=torch.int64)

    return [indices(count, size), indices(count, size), indices(count * size), indices(count, active)]


def current_forward(module: nn.Module) -> Any:
    """The function that a module runs as its forward, also if it was rebound on the instance or its class."""
    return getattr(module.forward, "__func__", module.forward)
