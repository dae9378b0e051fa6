"""The sparse MLP: projections that pass a compact tensor through the model's own code between them.

The input projections return the pre-activations of the chosen neurons only, part by part; the model applies its own
activation, gate product and dropout; the output projection consumes the result and restores token order.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..errors import InactivePatchError, SubquadError
from ..index.choose_neurons import ActivationIndex
from ..ops.mlp_products import Part, down_project, up_project, without_autocast
from ..weights.projection_with_update import NeuronProjection, compute_dtype
from ..weights.shards import is_fsdp
from .budget import Budget, TokenClass
from .classify_tokens import TokenClasses
from .compensation import Compensation
from .shared_state import Runtime

logger = logging.get_logger(__name__)

_AUDITED_TILES = 4
_FEW = 4  # times fewer tokens than a tile has


@dataclass(eq=False, repr=False)
class SparseMLP:
    """One MLP: its projections, its index, its budget, and the current forward pass.

    Attributes:
        name: path of the MLP in the model (in the inner model, if PEFT wraps it).
        parent: the module whose forward calls the projections; its own code runs unchanged.
        sources: the modules that the projections replaced, by path below the parent.
        budget: how much it computes for a token of each class. Change it with `set_budget`, or temporarily with
            `using`.
        corrections: corrections for skipped neurons, by class, once they are fitted.
        calls: number of forward passes so far with fewer than all neurons or less than the whole gradient.
        audited: by class, tokens [n, T, d] and chosen neurons [n, k] of some tiles of a recent batch, kept if
            `auditing`.
        selection_override: if set, the parts to use instead of those that the index makes.
        shares_input: all input projections are called on the same tensor.
        projections: the input projections and the output projection.
        opens: the input projection that the model calls first.
        between: modules without parameters in the parent, such as its activation, which get compact activations.
        parent_forward: the parent's forward at the time of the patch.
    """

    name: str
    parent: nn.Module
    inputs: Sequence["InputProjection"]
    output: "OutputProjection"
    index: ActivationIndex
    runtime: Runtime
    sources: dict[str, nn.Module]
    budget: Budget = Budget()
    corrections: dict[TokenClass, Compensation] = field(default_factory=dict)
    calls: int = 0
    auditing: bool = False
    audited: dict[TokenClass, tuple[Tensor, Tensor]] = field(default_factory=dict)
    selection_override: Sequence[Part] | None = None
    shares_input: bool = False
    _calls: dict[int, "_Call"] = field(default_factory=dict)  # by thread, as several may evaluate a model
    _cast: dict[TokenClass, tuple[Compensation, Compensation]] = field(default_factory=dict)  # also in compute dtype

    def __post_init__(self) -> None:
        self.projections: list[NeuronProjection] = [*self.inputs, self.output]
        self.opens = self.inputs[0]
        leaves = (module for module in self.parent.modules() if not list(module.children()))
        self.between = [leaf for leaf in leaves if not list(leaf.parameters())]
        self.parent_forward = current_forward(self.parent)
        k = self.runtime.config.active_neurons(self.index.neurons)
        self.set_budget(Budget(k, k))
        self.output.mlp = self
        for projection in self.inputs:
            projection.mlp = self

    @property
    def k(self) -> int:
        """The budget's number of neurons for predicted tokens."""
        return self.index.neurons if self.budget.predicted is None else self.budget.predicted

    @property
    def dense(self) -> bool:
        """Whether all neurons are computed for all tokens."""
        return self.budget.all_neurons

    def work_share(self) -> float:
        """Share of all token-neuron products that a sparse forward computes, for the classes of the latest batch."""
        predicted, context = (
            self.index.round_up_k(k) / self.index.neurons if k else 0.0 for k in self.budget.counts(self.index.neurons)
        )
        classes = self.runtime.latest_classes_of(self.name)
        if classes is None or not classes.tokens:
            return predicted
        return (predicted * len(classes.predicted) + context * len(classes.context)) / classes.tokens

    def set_budget(self, budget: Budget) -> None:
        """Use this budget from now on; numbers of m or more mean all neurons."""
        m = self.index.neurons
        predicted, context = (None if k is None or k >= m else k for k in (budget.predicted, budget.context))
        self.budget = Budget(predicted, context, budget.gradient)
        if not (predicted or context):  # nothing is gathered
            for projection in self.projections:
                projection.drop_copy()

    @contextmanager
    def using(
        self,
        budget: Budget | None = None,
        corrections: Mapping[TokenClass, Compensation] | None = None,
        selection: Sequence[Part] | None = None,
    ) -> Iterator[None]:
        """Context manager: inside, run with another budget, other corrections or given parts. On exit everything is
        restored, including `calls` and `audited`."""
        before = self.budget, self.corrections, self.selection_override, self.calls, self.audited
        try:
            if budget is not None:
                self.budget = budget  # whatever copies of weights there are will be needed again
            if corrections is not None:
                self.corrections = dict(corrections)
            self.selection_override = selection
            yield
        finally:
            self.budget, self.corrections, self.selection_override, self.calls, self.audited = before
            self.forget_call()

    def up_project(self, projection: "InputProjection", x: Tensor) -> Tensor | None:
        """The compact activations of an input projection on x [..., d]; None for a dense forward.

        They are one flat tensor, part by part (see `ops.mlp_products`).

        The input projection that the model calls first makes the selection, and a second one (up, in a gated MLP) uses
        it. The selection depends only on x and the weights, so a recomputed forward (gradient checkpointing) makes the
        same one.

        Raises:
            InactivePatchError: the update is on the meta device and has no values.
        """
        if projection.update.U.is_meta:
            raise InactivePatchError(
                f"{self.name} is on the meta device (offloaded by accelerate?), where its low-rank updates hold no "
                "values: offload the saved model instead, or call unpatch_model first"
            )
        if projection is self.opens:
            self._calls[get_ident()] = self._open(x, projection.training)
        call = self._calls.get(get_ident())
        assert call is not None, "a second input projection was called before the first"
        if call.parts is None:
            return None
        if projection not in call.waiting or x is not call.x:  # a wrapper may give each its own
            together = self.inputs if self.shares_input and x is call.x else [projection]
            call.waiting.update(zip(together, self._up(together, call, x), strict=True))
        return call.waiting.pop(projection)

    def down_project(self, a: Tensor) -> Tensor | None:
        """The MLP's output [..., d] for compact activations a; None for a dense forward."""
        call = self._calls.pop(get_ident(), None)
        assert call is not None, "an output projection was called before its input projection"
        if call.parts is None:
            return None
        m, leading = self.index.neurons, call.x.shape[:-1]
        expected = (sum(part.size(m) for part in call.parts),)
        if a.shape != expected:
            raise SubquadError(
                f"{self.name}: the output projection got shape {tuple(a.shape)}, expected the compact {expected}; "
                "something between the projections is not elementwise"
            )
        a = a.to(compute_dtype(a))
        matrix, name = self.output.matrix(a.dtype, call.tiled), self.index.backend_name
        y = down_project(a, call.parts, matrix, leading.numel(), call.gradient, name)
        for token_class, part in zip(call.classes, call.parts, strict=True):
            correction = self._correction(token_class, y) if part.idle or part.selection is not None else None
            if correction is not None:
                stand_in = correction(part.take(call.x.reshape(-1, call.x.shape[-1])).to(y.dtype))
                y = y + stand_in if part.rows is None else y.index_add_(0, part.rows, stand_in)
        if call.padded is not None:
            self.runtime.padding.watch(y, call.padded)
        return y.view(*leading, -1)

    def _correction(self, token_class: TokenClass, like: Tensor) -> Compensation | None:
        """The correction of a class in the dtype and on the device of a tensor."""
        fitted = self.corrections.get(token_class)
        if fitted is None:
            return None
        source, found = self._cast.get(token_class, (None, fitted))
        if source is not fitted or (found.bias.dtype, found.bias.device) != (like.dtype, like.device):
            with torch.inference_mode(False):  # inference tensors could not be used in training later
                found = fitted.to(like)
            self._cast[token_class] = fitted, found
        return found

    def forget_call(self) -> None:
        """Discard unfinished forward passes and their graphs."""
        self._calls.clear()

    def _up(self, together: Sequence["InputProjection"], call: "_Call", x: Tensor) -> Sequence[Tensor]:
        tokens = x.reshape(-1, x.shape[-1]).to(compute_dtype(x))
        matrices = [projection.matrix(tokens.dtype, call.tiled) for projection in together]
        stacked = together[0].shape[0] > self.index.neurons
        if stacked:
            matrices = matrices[0].split(self.index.neurons)
        return up_project(tokens, call.parts or (), matrices, call.gradient, self.index.backend_name, joined=stacked)

    def _open(self, x: Tensor, training: bool) -> "_Call":
        """Begin a forward pass: which tokens compute which neurons."""
        if not x.numel():  # the model may have routed all tokens elsewhere
            return _Call(x, None)
        batch = self.runtime.passes.of(self.name, x)
        mode = self.runtime.mode_of(batch, self.name, training)
        if mode == "dense" or self._is_watched():
            return _Call(x, None)
        budget = self.budget if mode == "sparse" else Budget()
        if self.selection_override is not None:
            self._count_call()
            parts = list(self.selection_override)
            return _Call(x, parts, ["predicted"] * len(parts), budget.gradient)
        classes = self.runtime.classes_in(batch, self.name, x)
        groups = _groups(classes, budget)
        everything = len(groups) == 1 and groups[0][1] is None and groups[0][2] is None
        if everything and not torch.is_grad_enabled():
            return _Call(x, None)
        parts = [self._part(x, rows, k, training, token_class) for token_class, rows, k in groups]
        if not budget.exact:
            self._count_call()
        padded = classes if classes is not None and classes.padding else None
        return _Call(x, parts, [token_class for token_class, *_ in groups], budget.gradient, padded)

    def _count_call(self) -> None:
        self.calls += 1
        self.runtime.idle_steps = None

    def _is_watched(self) -> bool:
        """Whether hooks on the modules between the projections would see compact activations."""
        watched = any(module._forward_hooks or module._forward_pre_hooks for module in self.between)
        if watched:
            self.runtime.idle_steps = None  # that no MLP runs sparse has a reason then
            logger.warning_once(
                f"{type(self.parent).__name__} runs dense, as forward hooks on its activation expect its input's shape"
                ": remove them to make it sparse"
            )
        return watched

    def _part(self, x: Tensor, rows: Tensor | None, k: int | None, training: bool, token_class: TokenClass) -> Part:
        """A group of the tokens x [..., d], with the neurons selected for it. What an audit needs is kept."""
        tokens = x.detach().reshape(-1, x.shape[-1])
        count = len(tokens) if rows is None else len(rows)
        if not k:
            return Part(rows, count, idle=k == 0)
        tokens = (tokens if rows is None else tokens.index_select(0, rows)).to(compute_dtype(x))
        size, order = self.runtime.config.tile_size, self.runtime.config.tile_order
        # So few tokens are those of a generation step, one a sequence: each gets neurons of its own.
        size = 1 if not training and _FEW * count <= size else size
        # Without autocast, so that the audit, made outside of it, judges the same.
        with without_autocast(tokens.device):
            selection = self.index.select(tokens, k, size, order)
        if self.auditing and training:
            some = slice(None, None, -(-len(selection.neurons) // _AUDITED_TILES))
            self.audited[token_class] = tokens[selection.tiles.slots[some]], selection.neurons[some]
        return Part(rows, count, selection)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_calls": {}, "_cast": {}, "audited": {}}


@dataclass
class _Call:
    """A forward pass in progress, from an MLP's first input projection to its output projection.

    Attributes:
        x: the MLP's input [..., d].
        parts: which tokens compute which neurons; None if the pass is dense.
        classes: the token class of each part.
        gradient: precision of the output gradient that is passed back.
        padded: the classes of x, if it has padding that is skipped.
        waiting: compact activations that wait for their input projection to be called.
    """

    x: Tensor
    parts: list[Part] | None
    classes: Sequence[TokenClass] = ()
    gradient: float = 1.0
    padded: TokenClasses | None = None
    waiting: dict["InputProjection", Tensor] = field(default_factory=dict)

    @property
    def tiled(self) -> bool:
        """Whether some part gathers weight rows."""
        return any(part.selection is not None for part in self.parts or ())


def _groups(classes: TokenClasses | None, budget: Budget) -> list[tuple[TokenClass, Tensor | None, int | None]]:
    """Class, rows (None: all) and neurons (None: all) of tokens that are treated alike."""
    if classes is None:
        return [("predicted", None, budget.predicted)]
    if budget.predicted == budget.context:
        real = classes.real
        return [("predicted", real, budget.predicted)] if real is None or len(real) else []
    by_class: dict[TokenClass, Tensor] = {"predicted": classes.predicted, "context": classes.context}
    return [(name, rows, budget.neurons(name)) for name, rows in by_class.items() if len(rows)]


class InputProjection(NeuronProjection):
    """Projection into neurons: [..., d] to a flat compact tensor when sparse, to [..., m] when dense. If gate and up
    rows are stacked in one matrix, m stands for their number."""

    is_input = True
    mlp: SparseMLP

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # selection is not part of a graph
    def forward(self, x: Tensor) -> Tensor:
        compact = self.mlp.up_project(self, x)
        return self.dense(x) if compact is None else compact


class OutputProjection(NeuronProjection):
    """Projection out of neurons: a flat compact tensor to [..., d] when sparse, [..., m] to [..., d] when dense."""

    is_input = False
    mlp: SparseMLP

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, a: Tensor) -> Tensor:
        y = self.mlp.down_project(a)
        return self.dense(a) if y is None else y


def current_forward(module: nn.Module) -> Any:
    """The function that a module runs as its forward, even if it was rebound on the instance or its class."""
    kind: Any = next(kind for kind in type(module).__mro__ if not is_fsdp(kind))  # `fully_shard` derives a class
    forward = vars(module).get("forward", kind.forward)
    return getattr(forward, "__func__", forward)
