"""The plan: how many neurons each MLP computes, and what that is predicted to cost and to gain. Pure data."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from .atomic_files import write_atomically
from .config import TileOrder
from .errors import PlanError

_FORMAT = 1


@dataclass(frozen=True)
class LayerPlan:
    """One MLP's budget and the measurements behind it. Times are of one forward and backward pass.

    Attributes:
        name: path of the MLP in the model.
        neurons: m.
        active: k, the neurons that a tile computes; m where the MLP runs dense.
        break_even: the least k from which dense is as fast as sparse.
        error: relative error of the MLP's output at k, with the index's own selection; 0 where dense.
        sensitivity: nats per token that the model's predictions move, per squared `error` of this MLP alone.
        full_ms: the MLP as it was before the patch, its weights trained if they were trainable.
        dense_ms: the patched MLP with all its neurons: frozen weights, low-rank updates.
        sparse_ms: the patched MLP at k; equal to `dense_ms` where dense.
    """

    name: str
    neurons: int
    active: int
    break_even: int
    error: float
    sensitivity: float
    full_ms: float
    dense_ms: float
    sparse_ms: float

    @property
    def dense(self) -> bool:
        return self.active == self.neurons


@dataclass(frozen=True)
class Plan:
    """Budgets for all patched MLPs of a model, for one batch shape on one machine.

    Attributes:
        tolerance: the largest `loss_increase` asked for, in nats per predicted token.
        loss_increase: mean Kullback-Leibler divergence of the sparse model's predictions from the dense model's,
            measured with all budgets together. It is the expected increase of the loss, in nats per predicted token,
            of a model whose predictions fit the data.
        step_ms: forward and backward of the whole model with every MLP dense (`dense_ms`).
        tokens, dtype, device: of the batch that was timed.
        tile_size, tile_order: the settings that it was measured with.
        layers: in the model's order.
    """

    tolerance: float
    loss_increase: float
    step_ms: float
    tokens: int
    dtype: str
    device: str
    tile_size: int
    tile_order: TileOrder
    layers: tuple[LayerPlan, ...]

    @property
    def mlp_speedup(self) -> float:
        """Predicted: time of the patched MLPs before the patch, over their time in this plan."""
        return sum(layer.full_ms for layer in self.layers) / sum(layer.sparse_ms for layer in self.layers)

    @property
    def step_speedup(self) -> float:
        """Predicted: forward and backward of the whole model before the patch, over the same in this plan."""
        before = self.step_ms + sum(layer.full_ms - layer.dense_ms for layer in self.layers)
        return before / (self.step_ms + sum(layer.sparse_ms - layer.dense_ms for layer in self.layers))

    def with_active(self, active: Sequence[int]) -> "Plan":
        """The plan with other budgets, as after changes during training; what was measured for it stays."""
        layers = (dataclasses.replace(layer, active=k) for layer, k in zip(self.layers, active, strict=True))
        return dataclasses.replace(self, layers=tuple(layers))

    def table(self) -> str:
        """The plan for people to read."""
        width = max(len("MLP"), *(len(layer.name) for layer in self.layers))
        lines = [
            f"{'MLP':<{width}} {'neurons':>8} {'active':>8} {'share':>6} {'error':>6} "
            f"{'full ms':>8} {'dense ms':>8} {'sparse ms':>9} {'speed-up':>8}"
        ]
        for layer in self.layers:
            active = "dense" if layer.dense else str(layer.active)
            lines.append(
                f"{layer.name:<{width}} {layer.neurons:>8} {active:>8} {layer.active / layer.neurons:>6.1%} "
                f"{layer.error:>6.3f} {layer.full_ms:>8.1f} {layer.dense_ms:>8.1f} {layer.sparse_ms:>9.1f} "
                f"{layer.full_ms / layer.sparse_ms:>7.2f}x"
            )
        lines.append(
            f"Predicted for batches of {self.tokens} tokens in {self.dtype} on {self.device}: "
            f"these MLPs {self.mlp_speedup:.2f}x, the whole step {self.step_speedup:.2f}x faster; "
            f"loss of the sparse forward +{self.loss_increase:.4f} (tolerance {self.tolerance:g})"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return {"format": _FORMAT, **dataclasses.asdict(self), "layers": [dataclasses.asdict(x) for x in self.layers]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        """Inverse of `to_dict`. What is no plan of this format is a `PlanError`."""
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
        if not layers or not all(1 <= layer.active <= layer.neurons for layer in layers):
            raise PlanError("this plan has no MLPs, or an MLP with an impossible number of active neurons")
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically.

        Raises:
            OutputError: the file could not be written; nothing is left of it.
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
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{path} is not JSON: {error}") from error
        try:
            return cls.from_dict(values)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


def _check(part: Plan | LayerPlan) -> None:
    """Raises PlanError if a field holds what it cannot."""
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if field.type is int:
            good = type(value) is int and value >= 1
        elif field.type is float:
            good = type(value) in (int, float) and 0 <= value <= sys.float_info.max
            good = good and (value > 0 or not field.name.endswith("_ms"))
        elif field.name == "tile_order":
            good = value in get_args(TileOrder)
        else:
            good = isinstance(value, tuple if field.name == "layers" else str)
        if not good:
            raise PlanError(f"this is not a plan: {field.name} is {value!r}")
