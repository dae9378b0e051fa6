"""Plans without a clock: times that follow a formula, and plans written by hand."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_subquad import LayerPlan, Plan, sparse_mlps
from hf_subquad.layers.sparse_mlp import SparseMLP
from hf_subquad.planning import calibration, measurements
from hf_subquad.planning.mlp_timing import MLPTiming

from .models import tokens

STEP_MS = 1000.0


def set_times(monkeypatch: pytest.MonkeyPatch, overhead: float | Callable[[Tensor], float] = 0.2) -> None:
    """An MLP of m neurons takes 3 m ms in full, 2 m ms dense, and overhead * m + k ms sparse; a step takes a second.

    Sparse is faster than dense below k = (2 - overhead) m. An `overhead` that is a function gets the tokens [N, d].
    """

    def time_mlp(mlp: SparseMLP, x: Tensor, ks: Sequence[int]) -> MLPTiming:
        m = mlp.index.neurons
        fixed = (overhead if isinstance(overhead, float) else overhead(x)) * m
        return MLPTiming(3.0 * m, 2.0 * m, {k: fixed + k for k in ks})

    def timed(work: Callable[[], object], device: torch.device) -> float:
        work()
        return STEP_MS / 1000

    monkeypatch.setattr(measurements, "time_mlp", time_mlp)
    monkeypatch.setattr(calibration, "timed", timed)


def hand_plan(model: nn.Module, active: Sequence[int], **of_layers: Any) -> Plan:
    """A plan with these budgets for a patched model; `of_layers` are fields of every MLP."""
    mlps = sparse_mlps(model)
    layers = []
    for mlp, k in zip(mlps, active, strict=True):
        m = mlp.index.neurons
        values = {"error": 0.0 if k == m else 0.3, "sensitivity": 0.1, "break_even": m, "full_ms": 3.0 * m,
                  "dense_ms": 2.0 * m, "sparse_ms": 2.0 * m if k == m else 1.0 * k}  # fmt: skip
        layers.append(LayerPlan(name=mlp.name, neurons=m, active=k, **{**values, **of_layers}))
    config = mlps[0].runtime.config
    return Plan(
        tolerance=0.02, loss_increase=0.0123, step_ms=STEP_MS, tokens=15, dtype="float32", device="cpu",
        tile_size=config.tile_size, tile_order=config.tile_order, layers=tuple(layers),
    )  # fmt: skip


def text_batches(*seeds: int, shape: tuple[int, int] = (3, 5)) -> list[dict[str, Tensor]]:
    """Batches of random tokens with themselves as labels."""
    return [{"input_ids": tokens(seed, shape), "labels": tokens(seed, shape)} for seed in seeds]


def budgets_of(model: nn.Module) -> list[int]:
    """Neurons that each MLP computes."""
    return [mlp.active for mlp in sparse_mlps(model)]


def trained_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take predictions of small random models for those of a trained head, whose divergence is not scaled up."""
    monkeypatch.setattr("hf_subquad.planning.predictions._information", lambda scores: 1.0)
