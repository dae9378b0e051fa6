"""From what the processes measured to the numbers that are reported: one dictionary, a picture, a table."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from reporting import Bars, Panel, draw, text_table

from hf_subquad import Plan

BASELINES = ("vanilla", "lora")
_CLASSES = ("predicted", "context")
_ENDS = 2  # points: a line from the first to the last loss shows no course

DEFINITIONS = {
    "step_seconds": "one Trainer step: forward, backward, gradient clipping, optimizer and the method's callbacks; "
    "fetching the batch and evaluating are not in it. Its median and spread, tokens_per_second and mlp_seconds are "
    "over all turns: in each round every method trains a few steps on the same batches, each in a fresh process",
    "training_seconds": "set-up, such as patching and planning, and steps so far times step_seconds_median",
    "seconds_to_vanilla_loss": "training_seconds until the dense held-out loss first was at or below vanilla's last "
    "one; measured at evaluations only",
    "speedup": "median step time of the baseline over that of subquad; the spread is over rounds, each the ratio of "
    "the medians of one round",
    "mlp_speedup": "the same of mlp_seconds: what the patched MLPs take of a step, forward and backward, from steps of "
    "their own at the end of each turn; activation, weight gradients, adapters and selection are in it",
    "amdahl_limit": "1 / (1 - share of the baseline's step that these MLPs take): the speed-up if they took no time",
    "steps": "of the one full training of each method, which gives losses and peak memory; not timed in turns",
    "predicted_share": "of the patched MLPs' neurons, computed for tokens at which the loss looks; context_share: for "
    "the other tokens, but for padding",
    "planned": "what the plan predicted for a step, and its fidelity; None without a plan",
    "peak_memory_bytes": "resident memory of the method's process while it stepped (on a GPU: allocated memory); "
    "memory_before_model_bytes of it are Python and its libraries",
}


def summarise(
    runs: Mapping[str, Mapping[str, Any]], turns: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """The measured part of the report; see DEFINITIONS.

    Args:
        runs: by method, what `measure.full_run` returned.
        turns: by method and round, what `measure.turn` returned.

    Raises:
        ValueError: the methods were not trained on the same data.
    """
    for each in (runs.values(), [turn for of_method in turns.values() for turn in of_method]):
        if len({result["digest"] for result in each}) > 1:
            raise ValueError("the methods saw other data; their tokens differ")
    methods = {name: _method(run, turns[name]) for name, run in runs.items()}
    goal = methods["vanilla"]["eval_loss_dense"] if "vanilla" in methods else None
    for method in methods.values():
        reached = (row["seconds"] for row in method["evaluations"] if goal is not None and row["eval_loss"] <= goal)
        method["seconds_to_vanilla_loss"] = next(reached, None)
    medians = {name: method["step_seconds_median"] for name, method in methods.items()}
    summary: dict[str, Any] = {"methods": methods}
    for baseline in BASELINES:
        both = baseline in methods and "subquad" in methods
        ratios = _ratios(turns[baseline], turns["subquad"], "steps", "seconds") if both else []
        of_mlps = _ratios(turns[baseline], turns["subquad"], "profile", "mlp_seconds") if both else []
        share = methods[baseline]["mlp_share_of_step"] if both else None
        summary[f"speedup_vs_{baseline}"] = medians[baseline] / medians["subquad"] if both else None
        summary[f"speedup_vs_{baseline}_spread"] = _spread(ratios) if ratios else None
        summary[f"mlp_speedup_vs_{baseline}"] = median(of_mlps) if of_mlps else None
        summary[f"amdahl_limit_vs_{baseline}"] = 1 / (1 - share) if share else None
    patched = runs["subquad"]["patched"] if "subquad" in runs else []
    neurons = sum(mlp["neurons"] for mlp in patched)
    kept = ("name", "neurons", "predicted", "context", "gradient")
    return summary | {
        **{f"{of}_share": sum(mlp[of] for mlp in patched) / neurons if patched else None for of in _CLASSES},
        "patched": [{key: mlp[key] for key in kept} for mlp in patched],
        "planned": _planned(runs["subquad"].get("plan")) if patched else None,
        "definitions": DEFINITIONS,
    }


def _planned(plan: str | None) -> dict[str, float] | None:
    if plan is None:
        return None
    found = Plan.from_dict(json.loads(plan))
    kept = ("step_speedup", "step_speedup_over_dense", "mlp_speedup_over_dense", "saved_elsewhere_ms", "step_ms")
    kept += ("loss_increase", "gradient_cosine", "gradient_noise", "planning_seconds")
    return {name: getattr(found, name) for name in kept}


def _method(run: Mapping[str, Any], turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [row for turn in turns for row in turn["steps"]]
    profile = [row for turn in turns for row in turn["profile"] if row["mlp_seconds"]]
    step = median(row["seconds"] for row in rows)

    def until(steps_done: int) -> float:
        return run["setup_seconds"] + steps_done * step

    kept = ("eval_loss_dense", "eval_loss_sparse", "peak_memory_bytes", "memory_before_model_bytes", "setup_seconds")
    return {
        "step_seconds_median": step,
        "step_seconds_spread": _spread([row["seconds"] for row in rows]),
        "tokens_per_second": median(row["tokens"] / row["seconds"] for row in rows),
        "mlp_seconds_median": median(row["mlp_seconds"] for row in profile) if profile else None,
        "mlp_share_of_step": median(row["mlp_seconds"] / row["seconds"] for row in profile) if profile else None,
        **{name: run[name] for name in kept},
        "training_seconds": until(len(run["steps"])),
        "trained_parameters": run["trained_parameters"],
        "total_parameters": run["total_parameters"],
        "evaluations": [row | {"seconds": until(row["step"])} for row in run["evaluations"]],
        "steps": [row | {"training_seconds": until(row["step"])} for row in run["steps"]],
        "turns": [{"steps": turn["steps"], "profile": turn["profile"]} for turn in turns],
        "logs": run["logs"],
    }


def _ratios(
    baseline: Sequence[Mapping[str, Any]], ours: Sequence[Mapping[str, Any]], part: str, key: str
) -> list[float]:
    """Per round, the baseline's median over ours."""
    pairs = [[[row[key] for row in turn[part]] for turn in both] for both in zip(baseline, ours, strict=True)]
    return [median(theirs) / median(mine) for theirs, mine in pairs if any(theirs) and any(mine)]


def _spread(values: Sequence[float]) -> dict[str, float]:
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"min": min(values), "quarter": low, "three_quarters": high, "max": max(values), "count": len(values)}


def write_plot(report: Mapping[str, Any], path: Path, title: str = "") -> None:
    """Seconds of a step and peak memory, by method; and where a run is long enough, dense held-out loss, or training
    loss if there was no evaluation, against training seconds."""
    methods: Mapping[str, Any] = report["methods"]
    # MLPs were timed in steps of their own, on other batches.
    mlps = {name: (m["mlp_share_of_step"] or 0.0) * m["step_seconds_median"] for name, m in methods.items()}
    rest = {name: method["step_seconds_median"] - mlps[name] for name, method in methods.items()}
    memory = {name: method["peak_memory_bytes"] / 1e9 for name, method in methods.items()}
    panels: list[Panel | Bars] = [
        Bars("seconds a step (median)", {"MLPs": mlps, "rest": rest} if any(mlps.values()) else {"step": rest}),
        Bars("peak memory (GB)", {"memory": memory}),
    ]
    evaluated = any(method["evaluations"] for method in methods.values())
    lines = {
        name: [(row["seconds"], row["eval_loss"]) for row in method["evaluations"]]
        if evaluated
        else [(row["training_seconds"], row["train_loss"]) for row in method["steps"]]
        for name, method in methods.items()
    }
    if max(map(len, lines.values())) > _ENDS:
        kind = "held-out loss, dense" if evaluated else "training loss"
        panels.insert(0, Panel("training time (s), evaluations excluded", f"{kind} (nats per token)", lines))
    draw(panels, title, path)


def table(report: Mapping[str, Any]) -> str:
    """The comparison for people."""
    head = ["", "step (s)", "quartiles", "MLPs (s)", "tokens/s", "memory (GB)", "trained", "loss, dense", "sparse",
            "to vanilla's loss"]  # fmt: skip
    lines = []
    for name, method in report["methods"].items():
        spread, reached = method["step_seconds_spread"], method["seconds_to_vanilla_loss"]
        lines.append(
            [
                name,
                f"{method['step_seconds_median']:.4g}",
                f"{spread['quarter']:.3g}-{spread['three_quarters']:.3g}",
                _number(method["mlp_seconds_median"], ".3g"),
                f"{method['tokens_per_second']:,.0f}",
                f"{method['peak_memory_bytes'] / 1e9:.2f}",
                f"{method['trained_parameters'] / 1e6:,.1f}M",
                _number(method["eval_loss_dense"], ".4f"),
                _number(method["eval_loss_sparse"], ".4f"),
                "not reached" if reached is None and method["evaluations"] else _number(reached, ".1f", " s"),
            ]
        )
    text = [text_table(head, lines)]
    for baseline in BASELINES:
        speedup, spread = report[f"speedup_vs_{baseline}"], report[f"speedup_vs_{baseline}_spread"]
        if speedup is not None:
            text.append(
                f"step of subquad against {baseline}: {speedup:.2f}x "
                f"({spread['min']:.2f}-{spread['max']:.2f} in {spread['count']} rounds), "
                f"its MLPs {_number(report[f'mlp_speedup_vs_{baseline}'], '.2f', 'x')}; "
                f"MLPs that take no time would give {_number(report[f'amdahl_limit_vs_{baseline}'], '.2f', 'x')}"
            )
    if report["patched"]:
        shares = " and ".join(f"{report[f'{of}_share']:.1%} for {of} tokens" for of in _CLASSES)
        text.append(f"{len(report['patched'])} MLPs patched; of their neurons {shares} are computed")
    return "\n".join(text)


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
