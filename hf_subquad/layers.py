"""The sparse MLP: leaf projections that hand a compact [n, T, k] tensor through the model's own middle.

The input projections return the activations of the chosen neurons only, in tile order; the model applies its own
activation, gate product and dropout; the output projection consumes the result and restores token order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .compensation import Compensation
from .config import SubquadConfig
from .errors import EmptyBatchError, InactivePatchError, SubquadError
from .gathered import DotRows, SumRows
from .index import ActivationIndex, Selection
from .plan import Plan
from .projection import NeuronProjection, compute_dtype

Forward = Literal["auto", "dense", "sparse"]

# Under torch.compile the projections stay as they are, and what is around them is compiled: which neurons a tile uses
# is known at run time only, and tracing the search for them takes long and ends in graph breaks inside of it.
_not_compiled = torch.compiler.disable

_AUDITED_TILES = 4
_FEW = 4  # times fewer tokens than a tile has


@dataclass
class Runtime:
    """What all sparse MLPs of a model share.

    Attributes:
        forward: 'auto' is sparse in training (and in evaluation if `sparse_eval`); the others force it.
        dense_step: the coming training step runs dense (`dense_share`).
        sync_seconds: time spent keeping in sync so far.
        synced_step: the step that was synced last.
        seen_calls: sparse forward passes of all MLPs when a training step was last checked for some.
        last_report: what the latest sync measured, for logs.
        plan: where the budgets come from, if they were planned; kept up to date as they change.
    """

    config: SubquadConfig
    forward: Forward = "auto"
    dense_step: bool = False
    sync_seconds: float = 0.0
    synced_step: int | None = None
    seen_calls: int = 0
    last_report: Any = field(default=None, repr=False)
    plan: Plan | None = None

    def sparse(self, training: bool) -> bool:
        if self.forward != "auto":
            return self.forward == "sparse"
        return not self.dense_step if training else self.config.sparse_eval


class SparseMLP:
    """One MLP: its projections, its index, and the selection between its first and its last projection.

    Attributes:
        name: path of the MLP in the model.
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
        self._selection: Selection | None = None
        self._x: Tensor | None = None
        self._served: set[int] = set()
        for projection in (*self.inputs, output):
            projection.mlp = self

    @property
    def projections(self) -> list[NeuronProjection]:
        return [*self.inputs, self.output]

    @property
    def bare_name(self) -> str:
        """Name in the bare model, also if the MLP was patched inside PEFT's wrapper."""
        return self.name.removeprefix("base_model.model.")

    @property
    def active(self) -> int:
        """Neurons that a token costs in training: k, or all m."""
        return self.index.neurons if self.dense else self.k

    def set_active(self, k: int) -> None:
        """Compute k neurons a tile from now on; all m of them: run dense."""
        self.dense = k >= self.index.neurons
        if not self.dense:
            self.k = k

    def begin(self, projection: "InputProjection", x: Tensor) -> Selection | None:
        """The selection that this call of an input projection uses; None for a dense forward.

        The first input projection called on a batch selects, a second one (up beside gate) follows it. Selection
        depends on x and the weights alone, so a recomputed forward (gradient checkpointing) selects the same.

        Raises:
            InactivePatchError: the update has no values, and PyTorch would compute garbage with it.
        """
        if projection.update.U.is_meta:
            raise InactivePatchError(
                f"{self.name} is on the meta device (offloaded by accelerate?), where its low-rank updates hold no "
                "values: offload the model that was saved, or call unpatch_model first"
            )
        if self._selection is None or id(projection) in self._served:
            self._served.clear()
            self._selection = self._select(x, projection.training) if self._sparse(projection.training) else None
            self._x = x
        if self._selection is not None:
            self._served.add(id(projection))
        return self._selection

    def end(self) -> tuple[Selection | None, Tensor]:
        """The selection that the output projection uses, and the MLP's input x [..., d]."""
        assert self._x is not None, "an output projection was called before its input projection"
        (selection, x), (self._selection, self._x) = (self._selection, self._x), (None, None)
        return selection, x

    def _sparse(self, training: bool) -> bool:
        return self.runtime.sparse(training) and (not self.dense or self.forced is not None)

    def _select(self, x: Tensor, training: bool) -> Selection:
        tokens = x.detach().reshape(-1, x.shape[-1]).to(compute_dtype(x))
        if not len(tokens):
            raise EmptyBatchError(f"{self.name} got an empty batch (shape {tuple(x.shape)}): drop it before the model")
        self.calls += 1
        if self.forced is not None:
            return self.forced
        config = self.runtime.config
        # So few tokens are those of a generation step, one a sequence: each gets neurons of its own.
        tile_size = 1 if not training and _FEW * len(tokens) <= config.tile_size else config.tile_size
        with torch.autocast(x.device.type, enabled=False):  # so that the audit, made outside of it, judges the same
            selection = self.index.select(tokens, self.k, tile_size, config.tile_order)
        if self.auditing and training:
            some = slice(None, None, -(-len(selection.neurons) // _AUDITED_TILES))
            self.audited = tokens[selection.tiles.slots[some]], selection.neurons[some]
        return selection

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_selection": None, "_x": None, "_served": set(), "audited": None}


class InputProjection(NeuronProjection):
    """Projection into neurons: [..., d] to [n, T, k] when sparse, to [..., m] when dense."""

    into_neurons = True
    mlp: SparseMLP
    stacked = False  # gate and up rows in one matrix [2 m, d]

    @_not_compiled
    def forward(self, x: Tensor) -> Tensor:
        selection = self.mlp.begin(self, x)
        if selection is None:
            return self.dense(x)
        neurons = selection.neurons
        if self.stacked:
            neurons = torch.cat([neurons, neurons + self.mlp.index.neurons], 1)
        tokens = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
        u, v, rows = self.update.U, self.update.V, self.rows(tokens.dtype)
        return DotRows.apply(tokens, u, v, rows, self.bias, selection.tiles, neurons, self.update.scale)


class OutputProjection(NeuronProjection):
    """Projection out of neurons: [n, T, k] back to [..., d] when sparse, [..., m] to [..., d] when dense."""

    into_neurons = False
    mlp: SparseMLP

    @_not_compiled
    def forward(self, a: Tensor) -> Tensor:
        selection, x = self.mlp.end()
        if selection is None:
            return self.dense(a)
        expected = (*selection.tiles.shape, selection.neurons.shape[1])
        if a.shape != expected:
            raise SubquadError(
                f"{self.mlp.name}: the output projection got shape {tuple(a.shape)}, expected the compact {expected}; "
                "something between the projections is not elementwise"
            )
        a = a.to(compute_dtype(a))
        u, v, rows = self.update.U, self.update.V, self.rows(a.dtype)
        y = SumRows.apply(a, u, v, rows, self.bias, selection.tiles, selection.neurons, self.update.scale)
        if self.mlp.compensation is not None:
            y = y + self.mlp.compensation(x.reshape(-1, x.shape[-1]).to(y.dtype))
        return y.view(*x.shape[:-1], -1)


def current_forward(module: nn.Module) -> Any:
    """The function that a module runs as its forward, also if it was rebound on the instance or its class."""
    return getattr(module.forward, "__func__", module.forward)
