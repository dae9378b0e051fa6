"""How fast does each method bring the loss of a wide net to zero, by iteration and by second?

    python scripts/studies/wide_net_methods.py --width 4096 --samples 64 --json out/methods.json --png out/methods.png

All methods train the same m x m matrix of the same net on the same realisable task, in turns of one iteration, until
the loss is --goal of its start. Gauss-Newton: the library's with each solver, and dense. Gradient descent, with step
sizes in units of 1 / (largest eigenvalue of the Gram matrix at the start): `maintained` with the library's
pre-activations (a step of it has rank n too), `dense` by autograd. Adam: by autograd; its steps have full rank, so
nothing can be maintained. All step sizes are reported, the best are drawn. Fewer --features bring samples closer to
each other, and the Gram matrix closer to a singular one.
"""

import argparse
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from reporting import Panel, conclude, draw, plots_available, text_table
from studies.wide_nets import TASKS, DenseGaussNewton

from hf_subquad.theory import GaussNewton, MaintainedState, WideNet
from hf_subquad.theory.solvers import gram

SOLVERS = ("cholesky", "tensor_sketch", "tensor_srht")

DEFINITIONS = {
    "losses": "||f - y||^2 / 2 before each iteration",
    "seconds": "of each iteration; `setup_seconds` (the one pass over the matrix) come before the first",
    "iterations_to_goal": "until the loss was at most `goal` of its start; null: not reached",
    "least_fall": "the smallest ratio of successive losses on the way to the goal: at least 2 is halved each time",
    "used": "iterations of conjugate gradients in each step",
}


class GradientStep:
    """A solver that does not solve: z = rate * r makes a Gauss-Newton step one of gradient descent."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def solve(self, state: MaintainedState, residual: Tensor) -> Tensor:
        return self.rate * residual


@dataclass
class Run:
    """One method on its way to the goal."""

    name: str
    kind: str  # all but the step size
    step: Callable[[], float]
    setup_seconds: float
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    solver: Any = None
    used: list[int] = field(default_factory=list)

    def advance(self) -> None:
        started = time.perf_counter()
        self.losses.append(self.step())
        self.seconds.append(time.perf_counter() - started)
        if hasattr(self.solver, "used"):
            self.used.append(self.solver.used)


def gauss_newton(
    name: str, kind: str, network: WideNet, x: Tensor, y: Tensor, solver: Any, make: type[GaussNewton] = GaussNewton
) -> Run:
    optimizer = make(network, x, y, solver=solver)
    return Run(name, kind, lambda: optimizer.step().loss, optimizer.seconds, solver=optimizer.solver)


def by_autograd(
    name: str, kind: str, network: WideNet, x: Tensor, y: Tensor,
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> Run:  # fmt: skip
    """A torch optimizer on the whole matrix, with the features computed once."""
    started = time.perf_counter()
    with torch.no_grad():
        features = network.features(x)
    weight = network.trained.weight.detach().clone().requires_grad_(True)
    optimizer = make([weight])

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = (network.layer(features, features @ weight) @ network.output.t() - y).square().sum() / 2
        loss.backward()
        optimizer.step()
        return loss.item()

    return Run(name, kind, step, time.perf_counter() - started)


def runs(options: argparse.Namespace) -> list[Run]:
    x, y = TASKS[options.task](options.samples, options.features)

    def network() -> WideNet:
        return WideNet(x.shape[1], options.width)

    rate = 1 / torch.linalg.eigvalsh(gram(MaintainedState(network(), x)).double())[-1].item()
    found = []
    for solver in SOLVERS:
        name = f"Gauss-Newton, {solver}"
        found.append(gauss_newton(name, name, network(), x, y, solver))
    name = "Gauss-Newton, dense"
    found.append(gauss_newton(name, name, network(), x, y, "cholesky", DenseGaussNewton))
    for share in options.descent_rates:
        kinds = [f"gradient descent, {how}" for how in ("maintained", "dense")]
        names = [f"{kind}, {share:g}" for kind in kinds]
        step = GradientStep(share * rate)
        found.append(gauss_newton(names[0], kinds[0], network(), x, y, step))
        found.append(by_autograd(names[1], kinds[1], network(), x, y, functools.partial(torch.optim.SGD, lr=step.rate)))
    for lr in options.adam_rates:
        make = functools.partial(torch.optim.Adam, lr=lr)
        found.append(by_autograd(f"Adam, {lr:g}", "Adam", network(), x, y, make))
    return found


def compare(options: argparse.Namespace) -> dict[str, Any]:
    going = everyone = runs(options)
    with tqdm(total=options.iterations, unit="iteration") as bar:
        for _ in range(options.iterations):
            going = [run for run in going if not run.losses or run.losses[-1] > options.goal * run.losses[0]]
            for run in going:
                run.advance()
            bar.update()
            bar.set_postfix(methods=len(going))
    return {"methods": {run.name: _row(run, options.goal) for run in everyone}}


def _row(run: Run, goal: float) -> dict[str, Any]:
    reached = next((i for i, loss in enumerate(run.losses) if loss <= goal * run.losses[0]), None)
    path = run.losses[: None if reached is None else reached + 1]
    return {
        "kind": run.kind,
        "iterations_to_goal": reached,
        "seconds_to_goal": None if reached is None else sum(run.seconds[:reached]),
        "setup_seconds": run.setup_seconds,
        "least_fall": min((a / b for a, b in itertools.pairwise(path)), default=None),
        "losses": run.losses,
        "seconds": run.seconds,
        "used": run.used,
    }


def table(report: Mapping[str, Any]) -> str:
    head = ["method", "iterations", "seconds", "setup (s)", "ms an iteration", "least fall", "last loss"]
    lines = []
    for name, row in report["methods"].items():
        reached = row["iterations_to_goal"] is not None
        lines.append(
            [
                name,
                str(row["iterations_to_goal"]) if reached else f"over {len(row['losses'])}",
                f"{row['seconds_to_goal']:.4f}" if reached else "-",
                f"{row['setup_seconds']:.3f}",
                f"{1000 * sorted(row['seconds'])[len(row['seconds']) // 2]:.2f}",
                f"{row['least_fall']:.3g}" if row["least_fall"] else "-",
                f"{row['losses'][-1]:.1e}",
            ]
        )
    return text_table(head, lines)


def panels(report: Mapping[str, Any]) -> list[Panel]:
    """Loss by iteration and by second, of each kind at the step size that came furthest."""
    best: dict[str, Mapping[str, Any]] = {}
    for row in report["methods"].values():
        if row["kind"] not in best or _progress(row) > _progress(best[row["kind"]]):
            best[row["kind"]] = row
    by_iteration = {kind: [(i + 1.0, loss) for i, loss in enumerate(row["losses"])] for kind, row in best.items()}
    by_second = {}
    for kind, row in best.items():
        times = itertools.accumulate(row["seconds"], initial=row["setup_seconds"])
        by_second[kind] = list(zip(times, row["losses"], strict=False))
    return [
        Panel("iteration", "training loss before it", by_iteration, "log", "log"),
        Panel("seconds, the pass over the matrix at the start included", "training loss", by_second, "log", "log"),
    ]


def _progress(row: Mapping[str, Any]) -> tuple[float, float]:
    """Fewer iterations to the goal first, then the lower loss."""
    reached = row["iterations_to_goal"]
    return (-reached if reached is not None else -math.inf), -row["losses"][-1]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--task", choices=TASKS, default="teacher")
    parser.add_argument("--goal", type=float, default=1e-6)
    parser.add_argument("--iterations", type=int, default=200, help="the most")
    parser.add_argument("--descent-rates", type=float, nargs="*", default=[1.0, 1.9])
    parser.add_argument("--adam-rates", type=float, nargs="*", default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    if options.png and not plots_available():
        parser.error("--png needs matplotlib (pip install 'hf-subquad[plots]')")
    torch.set_num_threads(options.threads)
    report = compare(options)
    conclude(report | {"definitions": DEFINITIONS}, table(report), options)
    if options.png:
        draw(panels(report), f"m = {options.width}, n = {options.samples}", options.png)


if __name__ == "__main__":
    main()
