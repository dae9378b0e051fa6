"""Plans without a clock: times that follow a formula, and plans written by hand."""

import itertools
import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from hf_subquad import LayerPlan, Plan, SubquadConfig, sparse_mlps
from hf_subquad.layers.budget import Budget
from hf_subquad.layers.sparse_mlp import SparseMLP
from hf_subquad.ops.row_sampling import keep_probabilities
from hf_subquad.planning import make_plan, measured_mlp, step_timing
from hf_subquad.planning.divergence import Predictions
from hf_subquad.planning.measured_token_class import MLPCall
from hf_subquad.planning.mlp_timing import MLPTiming

from .models import CONFIG, NEURONS, VOCABULARY, WIDTH, build, tokens

STEP_MS = 1000.0
PLANNED = SubquadConfig(**{**CONFIG.to_dict(), "active": None})


def set_times(
    monkeypatch: pytest.MonkeyPatch,
    overhead: float | Callable[[MLPCall], float] = 0.2,
    idle: float = 0.1,
    backward: float = 0.0,
) -> None:
    """An MLP of m neurons takes 3 m ms in full and 2 m ms dense; a step takes a second, planned or not.

    Of these, each class takes its share of the tokens: with k neurons a share of overhead * m + k ms, with none of
    idle * m ms. Sparse is faster than dense below k = (2 - overhead) m. Rows that pass no gradients save a share
    `backward` of the time of what is dense. An `overhead` that is a function gets what the MLP saw.
    """

    def time_mlp(mlp: SparseMLP, call: MLPCall, budgets: Sequence[Budget], padding: int = 0) -> MLPTiming:
        m = mlp.index.neurons
        fixed = (overhead if isinstance(overhead, float) else overhead(call)) * m
        real = call.energy > 0

        torch.rand(random.randrange(4))  # as many rounds as the machine allows draw rows

        def ms(budget: Budget) -> float:
            passing = keep_probabilities(call.energy.sqrt(), budget.gradient).sum().item() / max(1, int(real.sum()))
            dense = 2.0 * m * (1 - backward * (1 - passing))
            total = 0.0
            for name, rows in call.rows().items():
                k = budget.neurons(name)
                total += len(rows) / len(call.tokens) * (dense if k is None else fixed + k if k else idle * m)
            return total

        return MLPTiming(3.0 * m, 2.0 * m, {budget: ms(budget) for budget in budgets})

    ticks = itertools.count()
    monkeypatch.setattr(measured_mlp, "time_mlp", time_mlp)
    monkeypatch.setattr(step_timing, "timed", taking(STEP_MS))
    monkeypatch.setattr(make_plan, "time", SimpleNamespace(perf_counter=lambda: next(ticks) * STEP_MS / 1000))


def taking(*ms: float) -> Callable[[Callable[[], object], torch.device], float]:
    """A stand-in for `timed`, by which work takes these times in turns."""
    times = itertools.cycle(ms)

    def timed(work: Callable[[], object], device: torch.device) -> float:
        work()
        return next(times) / 1000

    return timed


def hand_plan(model: nn.Module, active: Sequence[int | tuple[int, int]], **of_layers: Any) -> Plan:
    """A plan with these neurons, or pairs for predicted and for context tokens, for a patched model; `of_layers` are
    fields of every MLP."""
    mlps = sparse_mlps(model)
    layers = []
    for mlp, ks in zip(mlps, active, strict=True):
        m = mlp.index.neurons
        predicted, context = (ks, ks) if isinstance(ks, int) else ks
        values = {"gradient": 1.0, "error": 0.0 if predicted == m else 0.3,
                  "context_error": 0.0 if context == m else 0.3, "full_ms": 3.0 * m, "dense_ms": 2.0 * m,
                  "sparse_ms": 2.0 * m if predicted == context == m else 1.0 * max(predicted, 1)}  # fmt: skip
        layers.append(
            LayerPlan(name=mlp.name, neurons=m, predicted=predicted, context=context, **{**values, **of_layers})
        )
    config = mlps[0].runtime.config
    return Plan(
        tolerance=0.02, loss_increase=0.0123, gradient_cosine=0.98, step_ms=STEP_MS, planning_seconds=3.0,
        padding_share=0.25, context_share=0.5, tokens=15, dtype="float32", device="cpu", tile_size=config.tile_size,
        tile_order=config.tile_order, saved_elsewhere_ms=0.0, layers=tuple(layers),
    )  # fmt: skip


def is_dense(layer: LayerPlan) -> bool:
    """Whether it computes all neurons for all tokens and propagates the whole gradient."""
    return layer.predicted == layer.context == layer.neurons and layer.gradient == 1


def text_batches(*seeds: int, shape: tuple[int, int] = (3, 5), prompt: int = 0) -> list[dict[str, Tensor]]:
    """Batches of random tokens with themselves as labels, but for a prompt of so many tokens."""
    batches = []
    for seed in seeds:
        labels = tokens(seed, shape)
        labels[:, :prompt] = -100
        batches.append({"input_ids": tokens(seed, shape), "labels": labels})
    return batches


def budgets_of(model: nn.Module) -> list[int]:
    """Neurons that each MLP computes for predicted tokens."""
    return [mlp.k for mlp in sparse_mlps(model)]


def trained_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take predictions of small random models for those of a trained head, whose divergence is not scaled up."""
    monkeypatch.setattr(Predictions, "_information", lambda self: 1.0)


def text_model(family: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    return build(family), text_batches(0, 1, 2, shape=(4, 9))


def bert_classifier(num_labels: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Padded rows; labels are classes, or numbers for a regression."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=NEURONS, num_hidden_layers=3, num_labels=num_labels,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.8 / parameter.shape[-1] ** 0.5)
    mask = torch.ones(9, 11, dtype=torch.long)
    mask[1, 3:] = 0
    labels = torch.linspace(-1, 2, 9) if num_labels == 1 else torch.arange(9) % num_labels
    return model, [{"input_ids": tokens(seed, (9, 11)), "attention_mask": mask, "labels": labels} for seed in range(3)]


def t5(family: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Fewer tokens in the decoder than in the encoder."""
    return build(family), [{"input_ids": tokens(s, (4, 11)), "labels": tokens(s + 9, (4, 7))} for s in range(3)]


def neurons_of(plan: Plan) -> list[tuple[int, int]]:
    return [(layer.predicted, layer.context) for layer in plan.layers]
