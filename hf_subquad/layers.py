"""The sparse MLP: leaf projections that hand a compact [n, T, k] tensor through the model's own middle.

The input projections return the activations of the chosen neurons only, in tile order; the model applies its own
activation, gate product and dropout; the output projection consumes the result and restores token order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .config import SubquadConfig
from .errors import EmptyBatchError, SubquadError
from .gathered import DotRows, SumRows
from .index import ActivationIndex, Selection
from .projection import NeuronProjection, compute_dtype

Forward = Literal["auto", "dense", "sparse"]


@dataclass
class Runtime:
    """What all sparse MLPs of a model share.

    Attributes:
        forward: 'auto' is sparse in training (and in evaluation if `sparse_eval`); the others force it.
        warming_up: training is still dense (`dense_steps`).
        sync_seconds: time spent keeping in sync so far.
        synced_step: the step that was synced last.
        seen_calls: sparse forward passes of all MLPs when a training step was last checked for some.
        last_report: what the latest sync measured, for logs.
    """

    config: SubquadConfig
    forward: Forward = "auto"
    warming_up: bool = False
    sync_seconds: float = 0.0
    synced_step: int | None = None
    seen_calls: int = 0
    last_report: Any = field(default=None, repr=False)

    def sparse(self, training: bool) -> bool:
        if self.forward != "auto":
            return self.forward == "sparse"
        return not self.warming_up if training else self.config.sparse_eval


class SparseMLP:
    """One MLP: its projections, its index, and the selection between its first and its last projection.

    Attributes:
        name: path of the MLP in the model.
        parent: the module whose forward calls the projections; its own code runs unchanged.
        sources: the modules that the projections replaced, by path below the parent.
        trainable: which of their parameters were trainable.
        parent_forward: the forward that called the projections when they were patched in.
        k: neurons that a tile computes.
        calls: sparse forward passes so far.
        audit: tokens [tokens, d] of a recent batch, kept if `auditing`, to measure recall on.
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
        self.auditing = False
        self.audit: Tensor | None = None
        self.forced: Selection | None = None
        self._selection: Selection | None = None
        self._batch_shape: torch.Size = torch.Size()
        self._served: set[int] = set()
        for projection in (*self.inputs, output):
            projection.mlp = self

    @property
    def projections(self) -> list[NeuronProjection]:
        return [*self.inputs, self.output]

    def begin(self, projection: "InputProjection", x: Tensor) -> Selection | None:
        """The selection that this call of an input projection uses; None for a dense forward.

        The first input projection called on a batch selects, a second one (up beside gate) follows it. Selection
        depends on x and the weights alone, so a recomputed forward (gradient checkpointing) selects the same.
        """
        if self._selection is None or id(projection) in self._served:
            self._served.clear()
            self._selection = self._select(x) if self.runtime.sparse(projection.training) else None
            self._batch_shape = x.shape[:-1]
        if self._selection is not None:
            self._served.add(id(projection))
        return self._selection

    def end(self) -> tuple[Selection | None, torch.Size]:
        """The selection that the output projection uses, and the batch shape to restore."""
        selection, self._selection = self._selection, None
        return selection, self._batch_shape

    def _select(self, x: Tensor) -> Selection:
        tokens = x.detach().reshape(-1, x.shape[-1]).to(compute_dtype(x))
        if not len(tokens):
            raise EmptyBatchError(f"{self.name} got an empty batch (shape {tuple(x.shape)}): drop it before the model")
        config = self.runtime.config
        self.calls += 1
        if self.auditing:
            self.audit = tokens[: 2 * config.tile_size].clone()
        if self.forced is not None:
            return self.forced
        with torch.autocast(x.device.type, enabled=False):  # so that recall, measured outside of it, judges the same
            return self.index.select(tokens, self.k, config.tile_size, config.tile_order)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_selection": None, "_served": set(), "audit": None}


class InputProjection(NeuronProjection):
    """Projection into neurons: [..., d] to [n, T, k] when sparse, to [..., m] when dense."""

    into_neurons = True
    mlp: SparseMLP
    stacked = False  # gate and up rows in one matrix [2 m, d]

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

    def forward(self, a: Tensor) -> Tensor:
        selection, batch_shape = self.mlp.end()
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
        return y.view(*batch_shape, -1)


def current_forward(module: nn.Module) -> Any:
    """The function that a module runs as its forward, also if it was rebound on the instance or its class."""
    return getattr(module.forward, "__func__", module.forward)
