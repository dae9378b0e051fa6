"""What was hoped for, beside what was measured. Light to import."""

from statistics import median
from typing import Any

Row = dict[str, Any]

LAYER_SPEEDUP = 3.5
SELECTION_SHARE = 0.08
DENSE_RATE = 0.6
STEP_SPEEDUP = 1.8

_PRODUCTS = ("gathered_up", "gathered_up, two matrices", "gathered_down", "gathered_down, two matrices")


def targets(sections: Row) -> list[Row]:
    """One row a target: target, wanted, measured (or None) and reached (or None)."""
    layer = next((row for row in _rows(sections, "layers") if row.get("main")), {})
    kernels = {row["kernel"]: row for row in _rows(sections, "kernels") if row.get("main")}
    steps = step_summary(_rows(sections, "step"))
    point = f" ({layer['shape']}, {layer['tokens']} tokens, {layer['share']:.1%}, T = {layer['tile']})" if layer else ""
    return [
        _at_least(
            "MLP forward and backward over dense with LoRA" + point, LAYER_SPEEDUP, layer.get("lora_over_subquad")
        ),
        _at_most("selection's share of that MLP, as a CUDA graph", layer.get("selection_graph_share")),
        _at_most("selection's share of that MLP, launched by itself", layer.get("selection_share")),
        *(_rate(name, kernels.get(name, {}).get("of_dense_rate")) for name in _PRODUCTS),
        *(
            _at_least(f"Trainer step over PEFT's: {name}", STEP_SPEEDUP, steps.get(name, {}).get("over_subquad"))
            for name in ("lora", "lora_same_dtype")
        ),
    ]


def step_summary(rows: list[Row]) -> dict[str, Row]:
    """By method, over its turns: ms and range_ms of a step, peak_bytes, and over_subquad, the median of the rounds'
    ratios of medians; None where there is nothing to compare."""
    turns: dict[str, dict[int, Row]] = {}
    for row in rows:
        if "ms" in row:
            turns.setdefault(row["method"], {})[row["round"]] = row
    ours = turns.get("subquad", {})
    summary = {}
    for method, rounds in turns.items():
        ms = [value for row in rounds.values() for value in row["ms"]]
        ratios = [median(row["ms"]) / median(ours[number]["ms"]) for number, row in rounds.items() if number in ours]
        summary[method] = {
            **next(iter(rounds.values())),
            "ms": median(ms),
            "range_ms": [min(ms), max(ms)],
            "over_subquad": median(ratios) if ratios else None,
            "peak_bytes": max((row["peak_bytes"] or 0 for row in rounds.values()), default=0),
        }
    return summary


def _rows(sections: Row, name: str) -> list[Row]:
    return sections.get(name, {}).get("rows", [])


def _at_least(target: str, wanted: float, measured: float | None) -> Row:
    return {
        "target": target,
        "wanted": f"at least {wanted}x",
        "measured": measured and f"{measured:.2f}x",
        "reached": None if measured is None else measured >= wanted,
    }


def _at_most(target: str, measured: float | None) -> Row:
    return {
        "target": target,
        "wanted": f"at most {SELECTION_SHARE:.0%}",
        "measured": measured and f"{measured:.1%}",
        "reached": None if measured is None else measured <= SELECTION_SHARE,
    }


def _rate(name: str, measured: float | None) -> Row:
    return {
        "target": f"{name}: share of the dense GEMM's FLOP/s",
        "wanted": f"at least {DENSE_RATE:.0%}",
        "measured": measured and f"{measured:.0%}",
        "reached": None if measured is None else measured >= DENSE_RATE,
    }
