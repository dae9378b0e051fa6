"""Section `layers`: forward and backward of one MLP, dense, with LoRA and sparse, in turns."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from bench_layer import peak_bytes, saved_bytes
from torch import Tensor, nn

from .bench import Bench, Case, Row, dtype_name
from .clock import Work
from .mlps import forward_backward, mlp, sparse, tokens
from .shapes import Shape


@dataclass(frozen=True)
class Budget:
    """Neurons that a tile computes, and tokens of a tile."""

    active: int
    tile: int


def cases(bench: Bench) -> list[Case]:
    """By token count; the main shape before the others."""
    shapes = (bench.sizes.main, *bench.sizes.others)
    return [
        (f"{shape.name}, {count} tokens", partial(_point, bench, shape, count))
        for count in bench.sizes.tokens
        for shape in shapes
    ]


def _budgets(bench: Bench, shape: Shape, count: int) -> list[Budget]:
    """The paper's share first, at the main point with other tiles too."""
    sizes = bench.sizes
    paper = shape.paper_active
    tiles = sizes.tiles if (shape, count) == (sizes.main, sizes.tokens[0]) else ()
    shares = [round(share * shape.intermediate) for share in sizes.shares]
    return [
        Budget(paper, sizes.tile),
        *(Budget(paper, tile) for tile in tiles),
        *(Budget(active, sizes.tile) for active in shares if abs(active - paper) > 0.005 * shape.intermediate),
    ]


def _point(bench: Bench, shape: Shape, count: int) -> Iterator[Row]:
    full, lora, subquad = (mlp(bench, shape, kind) for kind in ("full", "lora", "subquad"))
    x, grad = tokens(bench, shape, count)
    budgets = _budgets(bench, shape, count)

    def run(layer: nn.Module) -> None:
        forward_backward(layer, x, grad)

    works: dict[object, Work] = {"full": lambda: run(full), "lora": lambda: run(lora)}
    for budget in budgets:
        works[budget] = lambda budget=budget: run(_with(subquad, budget))
    times = bench.clock.interleaved(works)
    memory = {f"{name}_{key}": value for name, layer in (("full", full), ("lora", lora))
              for key, value in _memory(layer, x, grad).items()}  # fmt: skip
    for budget in budgets:
        yield {
            "what": "MLP forward and backward", "shape": shape.name, "tokens": count,
            "hidden": shape.hidden, "intermediate": shape.intermediate, "gated": shape.gated,
            "dtype": dtype_name(bench.dtype), "rank": bench.sizes.rank, **_asked(bench, shape, budget),
            **_speed(times, budget),
            **_selection(bench, _with(subquad, budget), x, times[budget], replay=budget.active == shape.paper_active),
            **(_replayed(bench, {"lora": lora, "subquad": subquad}, x, grad) if budget == budgets[0] else {}),
            "subquad_host_ms": bench.clock.host_ms(works[budget]),
            **memory, **{f"subquad_{key}": value for key, value in _memory(subquad, x, grad).items()},
            "main": shape == bench.sizes.main and count == bench.sizes.tokens[0] and budget == budgets[0],
        }  # fmt: skip
    for layer in (full, lora, subquad):
        layer.zero_grad(set_to_none=True)


def _with(layer: nn.Module, budget: Budget) -> nn.Module:
    mlp = sparse(layer)
    mlp.set_active(budget.active)
    mlp.runtime.config = replace(mlp.runtime.config, tile_size=budget.tile)
    return layer


def _asked(bench: Bench, shape: Shape, budget: Budget) -> Row:
    """Neurons asked for, and what the backend rounds them up to."""
    computed = sparse(mlp(bench, shape, "subquad")).index.backend(bench.device).round_up_k(budget.active)
    return {
        "active": budget.active,
        "share": budget.active / shape.intermediate,
        "computed": min(computed, shape.intermediate),
        "tile": budget.tile,
    }


def _speed(times: dict[object, list[float]], budget: Budget) -> Row:
    """Medians, and medians of the ratios within a round."""
    ours = times[budget]
    row: Row = {"rounds": len(ours), "subquad_ms": statistics.median(ours), "subquad_range_ms": _range(ours)}
    for name in ("full", "lora"):
        row[f"{name}_ms"] = statistics.median(times[name])
        row[f"{name}_range_ms"] = _range(times[name])
        row[f"{name}_over_subquad"] = statistics.median(a / b for a, b in zip(times[name], ours, strict=True))
    return row


def _selection(bench: Bench, layer: nn.Module, x: Tensor, whole: list[float], replay: bool) -> Row:
    """Selection by itself: launched, and replayed as a CUDA graph."""
    mlp, config = sparse(layer), sparse(layer).runtime.config
    held, layer_ms = x.detach(), statistics.median(whole)

    def select() -> object:
        return mlp.index.select(held, mlp.k, config.tile_size, config.tile_order)

    launched = bench.clock.median(select, total_ms=50)
    graph, why_not = bench.clock.device_ms(select, total_ms=50) if replay else (None, None)  # capturing takes a while
    return {
        "selection_ms": launched,
        "selection_share": launched / layer_ms,
        "selection_graph_ms": graph,
        "selection_graph_share": graph and graph / layer_ms,
        "selection_graph_note": why_not,
    }


def _replayed(bench: Bench, layers: dict[str, nn.Module], x: Tensor, grad: Tensor) -> Row:
    """Forward and backward as CUDA graphs: what is left where launching takes no time."""
    row: Row = {}
    for name, layer in layers.items():
        wanted = [x, *(weight for weight in layer.parameters() if weight.requires_grad)]
        work = partial(_gradients, layer, wanted, grad)
        row[f"{name}_graph_ms"], row[f"{name}_graph_note"] = bench.clock.device_ms(work, total_ms=100)
    return row


def _gradients(layer: nn.Module, wanted: list[Tensor], grad: Tensor) -> object:
    return torch.autograd.grad(layer(wanted[0]), wanted, grad)


def _memory(layer: nn.Module, x: Tensor, grad: Tensor) -> Row:
    return {"kept_bytes": saved_bytes(layer, x), "peak_bytes": peak_bytes(layer, x, grad)}


def _range(values: list[float]) -> list[float]:
    return [min(values), max(values)]
