"""Which structure keeps fired sets fastest? One pass, trees of maxima, and buckets of margins, on one Gauss-Newton run.

    python scripts/studies/fired_sets.py --widths 1024,4096,16384 --samples 64 --json out/fired_sets.json

All three follow the same steps of the same wide net, interleaved, and must report the same sets. A row is one width and
one iteration: seconds (median over rounds) and multiply-adds of each structure, and how many pairs of sample and neuron
changed between firing and not.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reporting import conclude, text_table
from studies.wide_nets import smooth_task

from hf_subquad.theory import GaussNewton, WideNet


class OnePass:
    """Everything is updated by one dense product and compared in one pass."""

    def __init__(self, pre: Tensor, thresholds: Tensor, kernel: Tensor) -> None:
        self.pre, self.thresholds, self.kernel = pre.clone(), thresholds, kernel
        self.multiply_adds = 0

    def move(self, direction: Tensor) -> Tensor:
        self.pre.addmm_(self.kernel, direction, alpha=-1)
        self.multiply_adds += direction.numel() * len(direction)
        return self.pre > self.thresholds


class MaxTrees:
    """A binary tree of maxima over the neurons of each sample (as in Song, Yang and Zhang 2021).

    An update moves the leaves where any sample's direction is not zero, and their ancestors; a query descends from the
    root to where the maximum exceeds the threshold. All samples are worked on together, level by level.
    """

    def __init__(self, pre: Tensor, thresholds: Tensor, kernel: Tensor) -> None:
        samples, width = pre.shape
        size = 1 << (width - 1).bit_length()
        self.width, self.thresholds, self.kernel = width, thresholds, kernel
        self.levels = [torch.nn.functional.pad(pre, (0, size - width), value=-torch.inf)]
        while self.levels[-1].shape[1] > 1:
            self.levels.append(self.levels[-1].view(samples, -1, 2).amax(2))
        self.multiply_adds = 0

    def move(self, direction: Tensor) -> Tensor:
        nodes = direction.any(0).nonzero()[:, 0]
        self.levels[0][:, nodes] -= self.kernel @ direction[:, nodes]
        self.multiply_adds += len(nodes) * len(direction) ** 2
        for below, level in zip(self.levels, self.levels[1:], strict=False):
            nodes = torch.unique_consecutive(nodes // 2)
            level[:, nodes] = torch.maximum(below[:, 2 * nodes], below[:, 2 * nodes + 1])
        return self._query()

    def _query(self) -> Tensor:
        root = self.levels[-1]
        sample, node = (root > self.thresholds).nonzero(as_tuple=True)
        for level in reversed(self.levels[:-1]):
            sample, node = sample.repeat(2), torch.cat([2 * node, 2 * node + 1])
            kept = level[sample, node] > self.thresholds[sample, 0]
            sample, node = sample[kept], node[kept]
        fired = torch.zeros(len(root), self.width, dtype=torch.bool)
        fired[sample, node] = True
        return fired


class MarginBuckets:
    """Pairs of sample and neuron wait in buckets by their margin; one is looked at when it can have been used up.

    In a step, no pre-activation of sample i moves by more than sum_j |K_ij| max_r |D_jr|. A pair whose margin is wider
    than all its sample may have moved since sorting is not computed. Others are, from the accumulated direction, in n
    multiply-adds a pair. When a sample may have moved by half of its widest margin, all pairs are computed and sorted
    anew.
    """

    def __init__(self, pre: Tensor, thresholds: Tensor, kernel: Tensor, buckets: int = 64) -> None:
        self.thresholds, self.kernel, self.buckets = thresholds, kernel, buckets
        self.multiply_adds = 0
        self._sort(pre.clone())

    def _sort(self, pre: Tensor) -> None:
        samples, width = pre.shape
        self.start, self.fired = pre, pre > self.thresholds
        self.total = pre.new_zeros(width, samples)  # accumulated directions, by neuron
        self.moved = pre.new_zeros(samples)
        margin = (pre - self.thresholds).abs()
        self.reach = margin.amax(1) / 2
        self.scale = self.buckets / self.reach
        bucket = (margin * self.scale[:, None]).long().clamp_(max=self.buckets)
        place = (bucket + (self.buckets + 1) * torch.arange(samples)[:, None]).flatten()
        counts = place.bincount(minlength=samples * (self.buckets + 1))
        self.order, self.ends = place.argsort(), counts.cumsum(0).view(samples, self.buckets + 1)

    def move(self, direction: Tensor) -> Tensor:
        sample, neuron = direction.nonzero(as_tuple=True)
        self.total[neuron, sample] += direction[sample, neuron]
        self.moved += self.kernel.abs() @ direction.abs().amax(1)
        if (self.moved >= self.reach).any():
            self._sort(self.start - self.kernel @ self.total.t())
            self.multiply_adds += direction.numel() * len(direction)
            return self.fired
        opened = (self.moved * self.scale).long()
        first = torch.cat([torch.zeros(1, dtype=torch.long), self.ends[:-1, -1]])
        last = self.ends.gather(1, opened[:, None])[:, 0]
        pairs = torch.cat([self.order[a:b] for a, b in zip(first.tolist(), last.tolist(), strict=True)])
        sample, neuron = pairs // self.start.shape[1], pairs % self.start.shape[1]
        change = (self.kernel[sample] * self.total[neuron]).sum(1)
        self.multiply_adds += len(pairs) * len(direction)
        self.fired[sample, neuron] = self.start[sample, neuron] - change > self.thresholds[sample, 0]
        return self.fired


STRUCTURES = {"one pass": OnePass, "max trees": MaxTrees, "margin buckets": MarginBuckets}


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
            started = time.perf_counter()
            structures[name] = kind(start, thresholds, state.kernel)
            setup[name].append(time.perf_counter() - started)
        counts = {name: [0] for name in STRUCTURES}
        for iteration, direction in enumerate(directions):
            for name, structure in structures.items():
                started = time.perf_counter()
                found = structure.move(direction)
                seconds[name][iteration].append(time.perf_counter() - started)
                counts[name].append(structure.multiply_adds)
                differing = (found != fired[iteration + 1]).sum().item()
                assert differing <= 1e-6 * found.numel() + 3, f"{name}: {differing} pairs differ"  # rounding
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


def main(argv: Sequence[str] | None = None) -> None:
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
    conclude({"rows": rows}, table(rows), options)


if __name__ == "__main__":
    main()
