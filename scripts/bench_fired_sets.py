"""Which structure keeps fired sets fastest? One pass, trees of maxima, and buckets of margins, on one Gauss-Newton run.

    python scripts/bench_fired_sets.py --widths 1024,4096,16384 --samples 64 --json out/fired_sets.json

All three follow the same steps of the same wide net, interleaved, and must report the same sets. A row is one width and
one iteration: seconds (median over rounds) and multiply-adds of each structure, and how many pairs of sample and neuron
changed between firing and not.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from comparison.report import write_json
from environment import provenance
from study.report import text_table
from tqdm import tqdm
from wide_nets.fired_sets import STRUCTURES
from wide_nets.tasks import smooth_task

from hf_subquad.planning.mlp_timing import timed
from hf_subquad.theory import GaussNewton, WideNet


def bench(width: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows by iteration."""
    x, y = smooth_task(options.samples)
    optimizer = GaussNewton(WideNet(x.shape[1], width), x, y)
    state = optimizer.state
    start, directions, losses, fired = state.margins.clone(), [], [], [state.fired]
    for _ in range(options.iterations):
        with torch.no_grad():
            before = state.predictions() - y
            directions.append(state.direction(optimizer.solver.solve(state, before)))
        losses.append(optimizer.step().loss)
        fired.append(state.fired)
    thresholds = torch.zeros(options.samples, 1)
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in directions] for name in STRUCTURES}
    setup: dict[str, list[float]] = {name: [] for name in STRUCTURES}
    for _ in range(options.rounds):
        structures = {}
        for name, kind in STRUCTURES.items():
            setup[name].append(
                timed(lambda: structures.update({name: kind(start, thresholds, state.kernel)}), x.device)  # noqa: B023
            )
        counts = {name: [0] for name in STRUCTURES}
        for iteration, direction in enumerate(directions):
            for name, structure in structures.items():
                found: list[torch.Tensor] = []
                seconds[name][iteration].append(
                    timed(lambda: found.append(structure.move(direction)), x.device)  # noqa: B023
                )
                counts[name].append(structure.multiply_adds)
                differing = (found[0] != fired[iteration + 1]).sum().item()
                assert differing <= 1e-6 * found[0].numel() + 3, f"{name}: {differing} pairs differ"  # rounding
    return [
        {
            "width": width,
            "samples": options.samples,
            "iteration": iteration + 1,
            "loss": losses[iteration],
            "changed_pairs": (fired[iteration] != fired[iteration + 1]).sum().item(),
            "seconds": {name: statistics.median(seconds[name][iteration]) for name in STRUCTURES},
            "multiply_adds": {name: counts[name][iteration + 1] - counts[name][iteration] for name in STRUCTURES},
            "setup_seconds": {name: statistics.median(setup[name]) for name in STRUCTURES},
        }
        for iteration in range(len(directions))
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = ["width", "iteration", "loss", "changed", *(f"{name} (ms)" for name in STRUCTURES)]
    return text_table(
        head,
        (
            [
                str(row["width"]), str(row["iteration"]), f"{row['loss']:.1e}", str(row["changed_pairs"]),
                *(f"{1000 * row['seconds'][name]:.2f}" for name in STRUCTURES),
            ]
            for row in rows
        ),
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=lambda text: [int(part) for part in text.split(",")], default=[1024, 4096])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = [row for width in tqdm(options.widths, unit="width") for row in bench(width, options)]
    print(table(rows))
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        write_json({"rows": rows, "settings": settings, **provenance()}, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
