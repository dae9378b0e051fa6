"""How does the time of an iteration grow with the width m? The paper's loop, dense twins, and the fine-tuning layer.

    python scripts/studies/scaling.py --max-width 16384 --samples 64 --json out/scaling.json --png out/scaling.png

First part: Gauss-Newton on a wide net with n samples, whose trained matrix is m x m. `subquad` is the library's;
`dense` computes H W^T and W -= D^T H in each iteration; `sparse` does so at non-zeros only, and like `dense` keeps
nothing from one iteration to the next. The solve is the same in all three. They run interleaved: a round is a few
iterations of subquad and one of each twin.

Second part: one MLP layer of the fine-tuning side, forward and backward, with d = m / 4 and ceil(m^0.8) neurons,
selection included, beside the dense layer, trained fully and with LoRA (scripts/benchmarks/layer.py).

Memory, about: 12 bytes for each of m x m entries, 4 less for each twin that is left out of --methods.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import layer
from reporting import Panel, conclude, draw, plots_available, text_table
from studies.wide_nets import DenseGaussNewton, SparseGaussNewton, smooth_task

from hf_subquad.theory import GaussNewton, Step, WideNet

METHODS = {"subquad": GaussNewton, "dense": DenseGaussNewton, "sparse": SparseGaussNewton}
PARTS = ("forward", "solve", "update", "maintenance")
LAYERS = {"subquad": "subquad", "dense": "dense_full", "lora": "dense_lora"}
FITTED_FROM = 4096
_RESAMPLES = 2000
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 95%, by degrees of freedom
_SHOWN_LOSSES = 10

DEFINITIONS = {
    "seconds": "of one Gauss-Newton iteration by part, one value a round, which for subquad is the median of --repeats "
    "iterations that follow each other, as in training: forward (predictions and fired share), solve "
    "(Gram matrix, Cholesky factor, direction), update (pre-activations and fired sets; in the twins the matrix), "
    "maintenance (the step as a factor, for whoever reads the matrix later); total is their sum",
    "multiply_adds": "of one iteration, as executed: products with zeros count in dense products",
    "initialisation_seconds": "the one pass over the matrix that subquad makes before the first iteration: features, K "
    "and pre-activations; `drawing_seconds` is drawing the random network",
    "slope": "least squares of log median seconds against log m over the widths that are listed; bootstrap_95 "
    "resamples rounds, line_95 is Student's interval from the distances to the line",
    "speedup_at_max_width": "median over rounds of the total of dense over the total of subquad",
    "fired_share": "mean over samples of the share of neurons that fire, the largest over iterations; "
    "`fired_share_limit` is m^(-1/5)",
    "losses": "training loss before each of the first iterations",
}


# Wide nets


def widths_between(least: int, most: int) -> list[int]:
    """`least` doubled again and again, and `most`; geometric means between those to fit. Multiples of 4."""
    found = [least * 2**step for step in range(1 + int(math.log2(most / least)))]
    found += [4 * round(width * 2**0.5 / 4) for width in found if width >= FITTED_FROM]
    return sorted({width for width in found if width < most} | {most})


def multiply_adds(method: str, optimizer: GaussNewton) -> dict[str, int]:
    """Of the next iteration, by part."""
    state = optimizer.state
    n, m = state.margins.shape
    p = state.derivatives.shape[1]
    counted = {"forward": n * m * p, "solve": (n * p) ** 2 * m + (n * p) ** 3 // 3 + n * m * p}
    if method == "subquad":
        return counted | {"update": n * n * m, "maintenance": n * m}
    if method == "dense":
        return counted | {"forward": counted["forward"] + n * m * m, "update": n * m * m, "maintenance": 0}
    features, fired = state.features.count_nonzero(1), state.fired.count_nonzero(1)
    counted["forward"] += int(features.sum()) * m
    return counted | {"update": int((features * fired).sum()), "maintenance": 0}


def measure_width(width: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows by method."""
    x, y = smooth_task(options.samples)
    started = time.perf_counter()
    network = WideNet(x.shape[1], width)
    drawing = time.perf_counter() - started
    optimizers = {name: METHODS[name](network, x, y) for name in options.methods}
    steps: dict[str, list[list[Step]]] = {name: [] for name in optimizers}
    for _ in range(options.warmup + options.rounds):
        for name, optimizer in optimizers.items():
            repeats = options.repeats if name == "subquad" else 1
            steps[name].append([optimizer.step() for _ in range(repeats)])
    rows = []
    for name, optimizer in optimizers.items():
        timed, done = steps[name][options.warmup :], [step for turn in steps[name] for step in turn]
        seconds = {part: [median(step.seconds[part] for step in turn) for turn in timed] for part in PARTS}
        counted = multiply_adds(name, optimizer)
        rows.append(
            {
                "method": name,
                "width": width,
                "samples": options.samples,
                "seconds": seconds | {"total": [sum(values) for values in zip(*seconds.values(), strict=True)]},
                "multiply_adds": counted | {"total": sum(counted.values())},
                "fired_share": max(step.fired_share for step in done),
                "fired_share_limit": width**-0.2,
                "losses": [step.loss for step in done[:_SHOWN_LOSSES]],
                "drawing_seconds": drawing,
                "initialisation_seconds": optimizers["subquad"].seconds,
            }
        )
    return rows


def summary(rows: list[dict[str, Any]], names: Iterable[str], parts: Sequence[str]) -> dict[str, Any]:
    """Rows; their slopes, by method and part, over widths from FITTED_FROM up, or over all if those are not two; and
    what they say of the largest width."""
    widths = sorted({row["width"] for row in rows})
    fitted = [width for width in widths if width >= FITTED_FROM]
    fitted = fitted if len(fitted) > 1 else widths
    found: dict[str, Any] = {}
    for name in names if len(fitted) > 1 else ():
        chosen = {row["width"]: row["seconds"] for row in rows if row["method"] == name}
        found[name] = {
            part: measured_slope({width: chosen[width][part] for width in fitted})
            for part in parts
            if min(min(chosen[width][part]) for width in fitted) > 0
        }
    last = {row["method"]: row["seconds"]["total"] for row in rows if row["width"] == widths[-1]}
    return {
        **{f"slope_{name}": of_parts["total"]["slope"] for name, of_parts in found.items()},
        "speedup_at_max_width": median(a / b for a, b in zip(last["dense"], last["subquad"], strict=True)),
        "slopes": found,
        "rows": rows,
    }


# The fine-tuning layer


def layer_scaling(widths: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    """The second part of the report."""
    rows = []
    for width in tqdm(widths, unit="width", desc="fine-tuning layer"):
        point = argparse.Namespace(
            tokens=options.tokens, hidden=width // 4, intermediate=width, active=None, tile=128, dtype="fp32",
            rank=16, gated=False, classes=False, device="cpu", rounds=options.layer_rounds, warmup=1,
        )  # fmt: skip
        (row,) = layer.bench(point)
        for name, kind in LAYERS.items():
            share = row["share"] if name == "subquad" else 1.0
            seconds = {"total": row["round_seconds"][kind]}
            rows.append({"method": name, "width": width, "seconds": seconds, "share": share})
    return summary(rows, LAYERS, ("total",))


# Exponents


def fitted_slope(points: Mapping[float, float]) -> tuple[float, float | None]:
    """Least-squares slope of log y against log x, and half of its 95% interval from the residuals, of 3 points up."""
    xs, ys = [math.log(x) for x in points], [math.log(y) for y in points.values()]
    x_mean, y_mean, freedom = sum(xs) / len(xs), sum(ys) / len(ys), len(xs) - 2
    spread = sum((x - x_mean) ** 2 for x in xs)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread
    missed = sum((y - y_mean - slope * (x - x_mean)) ** 2 for x, y in zip(xs, ys, strict=True))
    return slope, _STUDENT[min(freedom, 10) - 1] * math.sqrt(missed / freedom / spread) if freedom > 0 else None


def measured_slope(repeats: Mapping[int, Sequence[float]], seed: int = 0) -> dict[str, Any]:
    """Slope of the medians of repeated measurements by width. `bootstrap_95` resamples the repeats of each width: what
    the slope owes to noise; `line_95` is from the distances to the line: how well a power law fits."""
    slope, half = fitted_slope({width: median(values) for width, values in repeats.items()})
    draw = random.Random(seed)
    resampled = sorted(
        fitted_slope({width: median(draw.choices(values, k=len(values))) for width, values in repeats.items()})[0]
        for _ in range(_RESAMPLES)
    )
    return {
        "slope": slope,
        "bootstrap_95": [resampled[round(share * (_RESAMPLES - 1))] for share in (0.025, 0.975)],
        "line_95": None if half is None else [slope - half, slope + half],
        "widths": list(repeats),
    }


# What is printed and drawn


def table(report: Mapping[str, Any]) -> str:
    """Milliseconds by width, then slopes."""
    text = []
    for part, parts in (("wide net", ("total", *PARTS)), ("layer", ("total",))):
        of_part = report if part == "wide net" else report["layer"]
        if of_part is None:
            continue
        lines = [
            [row["method"], f"{row['width']:,}", *(f"{1000 * median(row['seconds'][name]):.2f}" for name in parts)]
            for row in of_part["rows"]
        ]
        text.append(text_table([part, "m", *(f"{name} (ms)" for name in parts)], lines))
        lines = [
            [name, each, f"{slope['slope']:.2f}", " to ".join(f"{end:.2f}" for end in slope["bootstrap_95"])]
            for name, of_name in of_part["slopes"].items()
            for each, slope in of_name.items()
        ]
        text.append(text_table([f"{part}, slopes", "part", "slope", "bootstrap 95%"], lines))
        text.append(f"speed-up at the largest m: {of_part['speedup_at_max_width']:.1f}x")
    return "\n\n".join(text)


def panels(report: Mapping[str, Any]) -> list[Panel]:
    def of(rows: Sequence[Mapping[str, Any]], y: Callable[[Mapping[str, Any]], float]) -> Any:
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:  # in order of the widths
            lines.setdefault(row["method"], []).append((row["width"], y(row)))
        return lines

    def ms(row: Mapping[str, Any]) -> float:
        return 1000 * median(row["seconds"]["total"])

    rows, logs = report["rows"], ("log", "log")
    drawn = [
        Panel("width m" + _slope_note(report), "one Gauss-Newton iteration (ms)", of(rows, ms), *logs),
        Panel("width m", "multiply-adds of it", of(rows, lambda row: row["multiply_adds"]["total"]), *logs),
    ]
    if report["layer"]:
        label = "width m, d = m / 4" + _slope_note(report["layer"])
        drawn.append(
            Panel(label, "fine-tuning layer, forward and backward (ms)", of(report["layer"]["rows"], ms), *logs)
        )
    return drawn


def _slope_note(part: Mapping[str, Any]) -> str:
    return "; slopes: " + ", ".join(f"{name} {of['total']['slope']:.2f}" for name, of in part["slopes"].items())


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-width", type=int, default=16384, help="a multiple of 4")
    parser.add_argument("--min-width", type=int, default=1024, help="a multiple of 4")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="subquad and dense always")
    parser.add_argument("--rounds", type=int, default=9, help="that are timed")
    parser.add_argument("--repeats", type=int, default=9, help="iterations of subquad in a round")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    parser.add_argument("--tokens", type=int, default=1024, help="of the fine-tuning layer; 0 leaves it out")
    parser.add_argument("--layer-rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="all rows")
    parser.add_argument("--png", type=Path, metavar="FILE", help="picture")
    options = parser.parse_args(argv)
    options.methods = [name for name in METHODS if name in {"subquad", "dense", *options.methods}]
    if not 0 < options.min_width <= options.max_width or options.min_width % 4 or options.max_width % 4:
        parser.error("--min-width and --max-width must be multiples of 4, the first not above the second")
    if options.png and not plots_available():
        parser.error("--png needs matplotlib (pip install 'hf-subquad[plots]')")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(argv)
    torch.set_num_threads(options.threads)
    widths = widths_between(options.min_width, options.max_width)
    rows = [row for width in tqdm(widths, unit="width", desc="wide nets") for row in measure_width(width, options)]
    report = summary(rows, options.methods, ("total", *PARTS))
    report["layer"] = layer_scaling(widths, options) if options.tokens else None
    conclude(report | {"definitions": DEFINITIONS}, table(report), options)
    if options.png:
        draw(panels(report), "time against width", options.png)


if __name__ == "__main__":
    main()
