"""The plan: the budget of each MLP, with its predicted error and speed. Pure data."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from .atomic_files import write_atomically
from .config import COSINE_PER_TOLERANCE, DIVERGENCE_PER_TOLERANCE, NOISE_PER_TOLERANCE, TileOrder
from .errors import PlanError

_FORMAT = 3
_WORTHWHILE = 1.02  # of a step's time: less is noise
_LEAST_TIME = 0.05  # of a dense step: its parts were timed one by one, with errors


@dataclass(frozen=True)
class LayerPlan:
    """One MLP's budget and the measurements behind it. Times are of one forward and backward pass.

    Attributes:
        name: path of the MLP in the model.
        neurons: m.
        predicted: k, the number of neurons for tokens at which the loss is computed, or for all tokens where classes
            are not known; m: all.
        context: the number of neurons for the other tokens that are not padding, 0 to m.
        gradient: 1 minus the expected squared error of the output gradient that is propagated back through the MLP, as
            a share of its squared norm; 1: the whole gradient.
        error: relative error of the MLP's output at predicted tokens, after correction; 0 if they compute all neurons.
        context_error: the same at context tokens.
        full_ms: the MLP as it was before the patch, its weights trained if they were trainable.
        dense_ms: the patched MLP with all its neurons for all tokens: frozen weights, low-rank updates.
        sparse_ms: the patched MLP with this budget.
        why_all: why the MLP computes all neurons for all tokens, in a few words; empty if it does not.
    """

    name: str
    neurons: int
    predicted: int
    context: int
    gradient: float
    error: float
    context_error: float
    full_ms: float
    dense_ms: float
    sparse_ms: float
    why_all: str = ""


@dataclass(frozen=True)
class Plan:
    """Budgets for all patched MLPs of a model, for one batch shape on one machine.

    Attributes:
        tolerance: what may be lost, as in `SubquadConfig`.
        loss_increase: mean Kullback-Leibler divergence of the sparse model's predictions from the dense model's, in
            nats per predicted token, measured with all budgets together. It is the expected increase of the loss of a
            model whose predictions fit the data.
        gradient_cosine: cosine with the exact gradient of the trained parameters that some MLP's output depends on,
            with all budgets together and no rows left out.
        step_ms: forward and backward of the whole model with every MLP dense (`dense_ms`).
        planning_seconds: time that planning took.
        padding_share, context_share: shares of the tokens of the last batch, on which times were measured.
        tokens, dtype, device: of that batch.
        tile_size, tile_order: the settings used for the measurements.
        saved_elsewhere_ms: what a step saves outside of the MLPs: no padding, logits at labelled positions only.
        layers: in the model's order.
        gradient_noise: expected squared error of that gradient by sampled rows, as a share of its squared norm.
    """

    tolerance: float
    loss_increase: float
    gradient_cosine: float
    step_ms: float
    planning_seconds: float
    padding_share: float
    context_share: float
    tokens: int
    dtype: str
    device: str
    tile_size: int
    tile_order: TileOrder
    saved_elsewhere_ms: float
    layers: tuple[LayerPlan, ...]
    gradient_noise: float = 0.0

    @property
    def mlp_speedup_over_dense(self) -> float:
        """Predicted: time of the patched MLPs with all neurons for all tokens, divided by their time in this plan."""
        return sum(layer.dense_ms for layer in self.layers) / sum(layer.sparse_ms for layer in self.layers)

    @property
    def step_speedup(self) -> float:
        """Predicted: time of the model's forward and backward pass before the patch, divided by that in this plan."""
        before = self.step_ms + sum(layer.full_ms - layer.dense_ms for layer in self.layers)
        return before / self._planned_ms

    @property
    def step_speedup_over_dense(self) -> float:
        """Predicted: the same time with all MLPs dense and low-rank updates (LoRA), divided by that in this plan."""
        return self.step_ms / self._planned_ms

    @property
    def _planned_ms(self) -> float:
        saved = self.saved_elsewhere_ms + sum(layer.dense_ms - layer.sparse_ms for layer in self.layers)
        return max(self.step_ms - saved, _LEAST_TIME * self.step_ms)

    def with_neurons(self, neurons: Sequence[tuple[int, int]]) -> "Plan":
        """The plan with other numbers of neurons (predicted, context), as changed during training. The measurements
        are kept."""
        layers = (
            dataclasses.replace(layer, predicted=predicted, context=context)
            for layer, (predicted, context) in zip(self.layers, neurons, strict=True)
        )
        return dataclasses.replace(self, layers=tuple(layers))

    def table(self) -> str:
        """The plan as text."""
        width = max(len("MLP"), *(len(layer.name) for layer in self.layers))
        lines = [
            f"{'MLP':<{width}} {'neurons':>8} {'predicted':>9} {'context':>8} {'gradient':>8} {'work':>6} "
            f"{'full ms':>8} {'dense ms':>8} {'planned ms':>10}  why all"
        ]
        for layer in self.layers:
            predicted, context = ("all" if k == layer.neurons else str(k) for k in (layer.predicted, layer.context))
            lines.append(
                f"{layer.name:<{width}} {layer.neurons:>8} {predicted:>9} {context:>8} {layer.gradient:>8.1%} "
                f"{layer.sparse_ms / layer.dense_ms if layer.dense_ms else 1:>6.0%} {layer.full_ms:>8.1f} "
                f"{layer.dense_ms:>8.1f} {layer.sparse_ms:>10.1f}  {layer.why_all}".rstrip()
            )
        predicted_share = 1 - self.padding_share - self.context_share
        allowed = self.tolerance
        noise = f", noise of {self.gradient_noise:.1%} of the squared gradient " if self.gradient_noise else ""
        noise += f"(at most {NOISE_PER_TOLERANCE * allowed:.1%})" if noise else ""
        lines += [
            f"Of {self.tokens} tokens a batch, {self.padding_share:.0%} are padding, {self.context_share:.0%} context "
            f"and {predicted_share:.0%} predicted. Columns: neurons for predicted tokens and for context tokens; 100% "
            "less the squared error of the sampled gradient that is propagated back; share of the dense time; "
            "milliseconds before the patch, with all neurons, and as planned; why all tokens compute all neurons.",
            f"Predicted for {self.dtype} on {self.device}: these MLPs are {self.mlp_speedup_over_dense:.2f}x and the "
            f"step is {self.step_speedup_over_dense:.2f}x as fast as with all neurons and low-rank updates (LoRA); the "
            f"step is {self.step_speedup:.2f}x as fast as before the patch. Divergence {self.loss_increase:.4f} nats "
            f"per token (at most {DIVERGENCE_PER_TOLERANCE * allowed:g}), gradient cosine {self.gradient_cosine:.4f} "
            f"(at least {1 - COSINE_PER_TOLERANCE * allowed:g}){noise}, at a tolerance of {allowed:g}. Planning took "
            f"{self.planning_seconds:.0f} s.",
        ]
        if self.saved_elsewhere_ms:
            lines.append(
                f"Of the step's {self.step_ms:.0f} ms, {self.saved_elsewhere_ms:.0f} are saved outside of the MLPs, on "
                "padding and on logits without a label."
            )
        if self.step_speedup_over_dense < _WORTHWHILE:
            lines.append(
                "Nothing is gained here. Longer prompts with labels of -100, padded batches or wider MLPs would help; "
                "otherwise train without the patch (unpatch_model)."
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {"format": _FORMAT, **dataclasses.asdict(self), "layers": [dataclasses.asdict(x) for x in self.layers]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        """Inverse of `to_dict`. Anything but a plan of this format raises a `PlanError`."""
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise PlanError(f"this is not a plan of format {_FORMAT}")
        try:
            rest = {name: value for name, value in values.items() if name not in ("format", "layers")}
            layers = tuple(LayerPlan(**fields) for fields in values["layers"])
            plan = cls(**rest, layers=layers)
            _check(plan)
            for layer in layers:
                _check(layer)
        except (TypeError, KeyError, AttributeError) as error:
            raise PlanError(f"this is not a plan: {error}") from error
        if not layers or not all(
            1 <= layer.predicted <= layer.neurons and 0 <= layer.context <= layer.neurons and 0 < layer.gradient <= 1
            for layer in layers
        ):
            raise PlanError("this plan has no MLPs, or an MLP with an impossible budget")
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically.

        Raises:
            OutputError: the file could not be written; no partial file is left.
        """
        write_atomically(Path(path), (json.dumps(self.to_dict(), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Inverse of `save`.

        Raises:
            FileNotFoundError: there is no such file.
            PlanError: it holds no plan.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:  # of json, or a PlanError
            raise PlanError(f"{path} holds no plan: {error}") from error


def _check(part: Plan | LayerPlan) -> None:
    """Raise a PlanError if a field has an impossible value."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.type is int:
            good = type(value) is int and value >= (field.name != "context")
        elif field.type is float:
            good = type(value) in (int, float) and abs(value) <= sys.float_info.max
            good = good and (value >= 0 or field.name == "gradient_cosine")
            good = good and (value > 0 or not field.name.endswith("_ms") or field.name == "saved_elsewhere_ms")
        elif field.name == "tile_order":
            good = value in get_args(TileOrder)
        else:
            good = isinstance(value, tuple if field.name == "layers" else str)
        if not good:
            raise PlanError(f"this is not a plan: {field.name} is {value!r}")
