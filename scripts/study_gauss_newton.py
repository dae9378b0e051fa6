"""Is a Gauss-Newton step worth its cost in fine-tuning? AdamW against the Gram-Gauss-Newton step, through the Trainer.

    python scripts/study_gauss_newton.py length --steps 60 --seeds 1 2 --json out/length.json

Trained are the low-rank updates of the patched MLPs and the head. Both methods are tuned in the same number of trials
on one seed, and trained with the best settings on others. Costs are measured apart, on one batch, in turns.

Tiles are whole sequences, so that a sequence alone computes what it computes in a batch: the rows of J are
the exact Jacobian of the forward that AdamW trains with.
"""

import argparse
import datetime
import itertools
import math
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import transformers
from compare_vanilla import write_json
from environment import commit, machine, versions
from study.gauss_newton import GaussNewtonTrainer, direction, rows_of, set_gradients, trained
from study.report import text_table
from study.sequence_tasks import TASKS, Rows, Task, patched
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainingArguments, default_data_collator

Settings = Mapping[str, float]

GRIDS: dict[str, dict[str, Sequence[float]]] = {
    "adamw": {"alpha": (16.0, 256.0), "learning_rate": (1e-3, 3e-3, 1e-2, 3e-2)},
    # With alpha = 16 the head makes 99.9% of the diagonal of J J^T on `length`, and the updates hardly move.
    "gauss-newton": {"alpha": (256.0, 2048.0), "damping": (0.1, 1.0), "learning_rate": (0.3, 1.0)},
}
TUNING_SEED = 0

DEFINITIONS = {
    "loss": "as the head reports it: mean cross-entropy in nats, or mean squared error",
    "train_loss": "mean over the last quarter of the steps of the batch's loss before the step, sparse forward",
    "eval_loss": "of the dense forward at the end: `trials` on rows that choose settings, `runs` on other held-out "
    "rows (memorise: on the training rows)",
    "costs": "CPU seconds, medians over rounds in which all parts take turns; ratios are medians over rounds",
    "gauss_newton": "J by a forward and a backward pass for each sequence, Gram matrix, solve, J^T z, step",
    "bound": "what a fused implementation could reach at best: one forward and backward pass of the batch, Gram "
    "matrix, solve, J^T z, step; it would keep J as well (`jacobian_bytes`)",
}


def train(
    task: Task, options: argparse.Namespace, method: str, settings: Settings, seed: int, judged: Rows
) -> dict[str, Any]:
    """One run from a fresh model: a row with its losses in training and on the rows `judged`."""
    model, callbacks = patched(task, options.active, settings["alpha"], seed)
    common: dict[str, Any] = {
        "model": model, "train_dataset": task.train, "data_collator": default_data_collator, "callbacks": callbacks
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder, "max_steps": options.steps, "learning_rate": settings["learning_rate"],
            "per_device_train_batch_size": task.batch_size, "per_device_eval_batch_size": 64, "logging_steps": 1,
            "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
            "use_cpu": True, "seed": seed, "warmup_steps": options.warmup_steps,
        }  # fmt: skip
        if method == "adamw":
            trainer = Trainer(args=TrainingArguments(optim="adamw_torch", **arguments), **common)
        else:
            trainer = GaussNewtonTrainer(
                args=TrainingArguments(optim="sgd", max_grad_norm=0.0, **arguments),
                output_of=task.output_of, damping=settings["damping"], **common,
            )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return {
            "method": method,
            "settings": dict(settings),
            "seed": seed,
            "train_loss": mean(losses[-max(1, len(losses) // 4) :]),
            "eval_loss": trainer.evaluate(judged)["eval_loss"],
            "losses": losses,
        }


def costs(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds of the parts of both methods' steps on one batch."""
    model, _ = patched(task, options.active, 16.0, TUNING_SEED)
    model.train()
    weights = trained(model)
    batch = default_data_collator(task.train[: task.batch_size])
    adamw, sgd = torch.optim.AdamW(weights, lr=0.0), torch.optim.SGD(weights, lr=0.0)
    rows = rows_of(model, batch, task.output_of, weights)
    loss = torch.tensor(0.0)

    def update() -> None:
        nn.utils.clip_grad_norm_(weights, 1.0)
        adamw.step()

    def solve() -> None:
        set_gradients(weights, direction(*rows, 1.0))
        sgd.step()

    def forward() -> None:
        nonlocal loss
        model.zero_grad()
        loss = model(**batch).loss

    parts: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "backward": lambda: loss.backward(),
        "adamw_update": update,
        "jacobian": lambda: rows_of(model, batch, task.output_of, weights),
        "gram_and_solve": solve,
    }
    rounds: list[dict[str, float]] = []
    for number in range(options.rounds + 1):
        seconds = {name: _cpu_seconds(part) for name, part in parts.items()}
        if number:  # the first one warms up
            seconds["adamw"] = seconds["forward"] + seconds["backward"] + seconds["adamw_update"]
            seconds["gauss_newton"] = seconds["jacobian"] + seconds["gram_and_solve"]
            seconds["bound"] = seconds["forward"] + seconds["backward"] + seconds["gram_and_solve"]
            rounds.append(seconds)
    return {
        "trained_weights": rows[0].shape[1],
        "jacobian_bytes": rows[0].nbytes,
        "seconds": {name: median(one[name] for one in rounds) for name in rounds[0]},
        "gauss_newton_against_adamw": median(one["gauss_newton"] / one["adamw"] for one in rounds),
        "bound_against_adamw": median(one["bound"] / one["adamw"] for one in rounds),
        "rounds": rounds,
    }


def _cpu_seconds(part: Callable[[], Any]) -> float:
    started = time.process_time()
    part()
    return time.process_time() - started


def study(options: argparse.Namespace) -> dict[str, Any]:
    """Trials, runs and costs of one task, with what is needed to repeat them."""
    torch.set_num_threads(1)
    task = TASKS[options.task]()
    trials: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    with tqdm(desc=options.task, unit="run") as bar:
        for method in options.methods:
            grid = GRIDS[method]
            settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
            tried = []
            for one in settings[: options.trials]:
                tried.append(train(task, options, method, one, TUNING_SEED, task.tuning))
                bar.update()
            best = min(tried, key=_eval_loss)["settings"]
            trials += tried
            for seed in options.seeds:
                runs.append(train(task, options, method, best, seed, task.held_out))
                bar.update()
    return {
        "task": options.task,
        "runs": runs,
        "trials": trials,
        "costs": costs(task, options),
        "definitions": DEFINITIONS,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _eval_loss(row: Mapping[str, Any]) -> float:
    """Infinite where training diverged."""
    return row["eval_loss"] if math.isfinite(row["eval_loss"]) else math.inf


def table(report: Mapping[str, Any]) -> str:
    """A line for each method: final losses, means over seeds, and the cost of a step against AdamW's."""
    lines = []
    for method in report["settings"]["methods"]:
        rows = [row for row in report["runs"] if row["method"] == method]
        against = (
            [1.0, 1.0]
            if method == "adamw"
            else [report["costs"][f"{kind}_against_adamw"] for kind in ("gauss_newton", "bound")]
        )
        settings = " ".join(f"{name}={value:g}" for name, value in rows[0]["settings"].items())
        losses = [f"{mean(row[f'{kind}_loss'] for row in rows):.4g}" for kind in ("train", "eval")]
        lines.append([method, settings, *losses, *(f"{ratio:.2f}" for ratio in against)])
    head = ["method", "settings", "training loss", "evaluation loss", "step, measured", "step, bound"]
    return text_table(head, lines)


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help=f"tuning has seed {TUNING_SEED}")
    parser.add_argument("--methods", choices=GRIDS, nargs="+", default=list(GRIDS))
    parser.add_argument("--warmup-steps", type=int, default=0, help="of the learning rate, which then falls linearly")
    parser.add_argument("--active", type=float, default=0.25, help="share of the neurons; 1.0: dense")
    parser.add_argument("--rounds", type=int, default=5, help="of cost measurement")
    parser.add_argument("--trials", type=int, help="first settings of each grid; default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all rows")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    report = study(options)
    print(table(report))
    if options.json:
        write_json(report, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
