"""From what the processes measured to the numbers that are reported: one dictionary, per-step rows, a table."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

BASELINES = ("vanilla", "lora")

DEFINITIONS = {
    "step_seconds": "one Trainer step: forward, backward, gradient clipping, optimizer and the method's callbacks; "
    "fetching the batch, evaluating and waiting for the turn are not in it",
    "seconds_to_vanilla_loss": "training seconds (set-up, such as patching, included; evaluations not) until the dense "
    "held-out loss first was at or below vanilla's last one; measured at evaluations only",
    "speedup": "median step time of the baseline over that of subquad; the spread is over rounds of turns, each the "
    "ratio of the medians of one round",
    "amdahl_limit": "t / (t - sum over patched MLPs of t_mlp * (1 - share)): the baseline with its patched MLPs' time "
    "multiplied by their share of active neurons, all else unchanged. t and t_mlp are from extra steps of the baseline "
    "after its training. t_mlp is the span from the entry of the MLP's first projection to the exit of its last one, "
    "and back, so activation, weight gradients and adapters are in it. It is no bound on what subquad can save "
    "elsewhere: against vanilla it also saves optimizer and clipping time of weights that it does not train",
    "peak_memory_bytes": "resident memory of the method's process while it stepped (on a GPU: allocated memory); "
    "memory_before_model_bytes of it are Python and its libraries",
}


def summarise(results: Mapping[str, Mapping[str, Any]], untimed_steps: int) -> dict[str, Any]:
    """The measured part of the report; see DEFINITIONS.

    Args:
        results: by method, what `measured_training.measure` returned.
        untimed_steps: first steps to leave out of medians.

    Raises:
        ValueError: the methods were not trained on the same data.
    """
    if len({result["digest"] for result in results.values()}) > 1:
        raise ValueError(f"the methods saw other data: { {n: r['digest'] for n, r in results.items()} }")
    goal = results["vanilla"]["eval_loss_dense"] if "vanilla" in results else None
    summary: dict[str, Any] = {
        "methods": {name: _method(result, untimed_steps, goal) for name, result in results.items()}
    }
    patched = results["subquad"]["patched"] if "subquad" in results else []
    for baseline in BASELINES:
        both = baseline in results and "subquad" in results
        ratios = _ratios(results[baseline], results["subquad"], untimed_steps) if both else None
        medians = [summary["methods"][name]["step_seconds_median"] for name in (baseline, "subquad") if both]
        summary[f"speedup_vs_{baseline}"] = medians[0] / medians[1] if both else None
        summary[f"speedup_vs_{baseline}_spread"] = _spread(ratios) if ratios else None
        profile = results[baseline]["profile"] if both else None
        summary[f"amdahl_limit_vs_{baseline}"] = amdahl_limit(profile, patched) if profile else None
    neurons = sum(mlp["neurons"] for mlp in patched)
    return summary | {
        "active_share": sum(mlp["active"] for mlp in patched) / neurons if patched else None,
        "patched": [{key: mlp[key] for key in ("name", "neurons", "active")} for mlp in patched],
        "definitions": DEFINITIONS,
    }


def amdahl_limit(profile: Sequence[Mapping[str, Any]], patched: Sequence[Mapping[str, Any]]) -> float:
    """Median over the profiled steps of t / (t - sum of t_mlp (1 - share))."""
    limits = []
    for row in profile:
        saved = sum(row["mlp_seconds"][mlp["name"]] * (1 - mlp["active"] / mlp["neurons"]) for mlp in patched)
        limits.append(row["step_seconds"] / (row["step_seconds"] - saved))
    return median(limits)


def _method(result: Mapping[str, Any], untimed_steps: int, goal: float | None) -> dict[str, Any]:
    timed = result["steps"][untimed_steps:]
    seconds = [row["seconds"] for row in timed]
    profile = result["profile"]
    return {
        "step_seconds_median": median(seconds),
        "step_seconds_spread": _spread(seconds),
        "tokens_per_second": median(row["tokens"] / row["seconds"] for row in timed),
        "peak_memory_bytes": result["peak_memory_bytes"],
        "memory_before_model_bytes": result["memory_before_model_bytes"],
        "eval_loss_dense": result["eval_loss_dense"],
        "eval_loss_sparse": result["eval_loss_sparse"],
        "seconds_to_vanilla_loss": _seconds_to(result["evaluations"], goal),
        "setup_seconds": result["setup_seconds"],
        "training_seconds": result["setup_seconds"] + sum(row["seconds"] for row in result["steps"]),
        "trained_parameters": result["trained_parameters"],
        "total_parameters": result["total_parameters"],
        "patched_mlp_share_of_step": median(sum(row["mlp_seconds"].values()) / row["step_seconds"] for row in profile)
        if profile
        else None,
        "waiting_cpu_seconds": result["waiting_cpu_seconds"],
        "evaluations": result["evaluations"],
        "steps": result["steps"],
        "logs": result["logs"],
    }


def _seconds_to(evaluations: Sequence[Mapping[str, Any]], goal: float | None) -> float | None:
    if goal is None:
        return None
    return next((row["seconds"] for row in evaluations if row["eval_loss"] <= goal), None)


def _ratios(baseline: Mapping[str, Any], ours: Mapping[str, Any], untimed_steps: int) -> list[float]:
    """Per round of turns: baseline's median step time over ours."""
    medians = []
    for result in (baseline, ours):
        rounds: dict[int, list[float]] = {}
        for row in result["steps"][untimed_steps:]:
            rounds.setdefault(row["round"], []).append(row["seconds"])
        medians.append({number: median(seconds) for number, seconds in rounds.items()})
    return [medians[0][number] / medians[1][number] for number in medians[0].keys() & medians[1].keys()]


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"min": min(values), "quarter": low, "three_quarters": high, "max": max(values), "count": len(values)}


CSV_COLUMNS = (
    "method",
    "step",
    "round",
    "timed",
    "seconds",
    "training_seconds",
    "tokens",
    "train_loss",
    "eval_loss_dense",
)


def step_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per method and step, and one for the evaluation before the first step (step 0)."""
    rows = []
    for name, method in report["methods"].items():
        losses = {row["step"]: row["eval_loss"] for row in method["evaluations"]}
        passed = method["setup_seconds"]
        if 0 in losses:
            rows.append({"method": name, "step": 0, "training_seconds": passed, "eval_loss_dense": losses[0]})
        for row in method["steps"]:
            passed += row["seconds"]
            rows.append(
                {"method": name, "training_seconds": passed, "eval_loss_dense": losses.get(row["step"])}
                | {"timed": row["step"] > report["settings"]["untimed_steps"]}
                | row
            )
    return rows


def table(report: Mapping[str, Any]) -> str:
    """The comparison for people."""
    head = ["", "step (s)", "quartiles", "tokens/s", "memory (GB)", "loss, dense", "sparse", "to vanilla's loss"]
    lines = [head]
    for name, method in report["methods"].items():
        spread, reached = method["step_seconds_spread"], method["seconds_to_vanilla_loss"]
        lines.append(
            [
                name,
                f"{method['step_seconds_median']:.4g}",
                f"{spread['quarter']:.3g}-{spread['three_quarters']:.3g}",
                f"{method['tokens_per_second']:,.0f}",
                f"{method['peak_memory_bytes'] / 1e9:.2f}",
                _number(method["eval_loss_dense"], ".4f"),
                _number(method["eval_loss_sparse"], ".4f"),
                "not reached" if reached is None and method["evaluations"] else _number(reached, ".1f", " s"),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    for baseline in BASELINES:
        speedup, spread = report[f"speedup_vs_{baseline}"], report[f"speedup_vs_{baseline}_spread"]
        if speedup is not None:
            limit = _number(report[f"amdahl_limit_vs_{baseline}"], ".2f", "x")
            text.append(
                f"step of subquad against {baseline}: {speedup:.2f}x "
                f"(quartiles {spread['quarter']:.2f}-{spread['three_quarters']:.2f} of {spread['count']} rounds; "
                f"Amdahl limit of the patched MLPs {limit})"
            )
    if report["active_share"] is not None:
        text.append(f"{len(report['patched'])} MLPs patched, {report['active_share']:.1%} of neurons active")
    return "\n".join(text)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None or math.isnan(value) else f"{value:{form}}{unit}"


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Create `path` with what `write` puts into a file, or leave what was there: never a half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(report: Mapping[str, Any], path: Path) -> None:
    write_whole(path, lambda file: file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8"))
