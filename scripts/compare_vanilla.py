"""Compare a training step of subquad with the plain Trainer and with PEFT LoRA: same data, seed and steps, in turns.

    python scripts/compare_vanilla.py --shape hidden=2048,intermediate=8192,layers=4,vocab=8192,arch=opt --steps 10
    python scripts/compare_vanilla.py --model facebook/opt-125m --train-file train.txt --eval-file test.txt \\
        --steps 100 --learning-rate vanilla=2e-5 lora=2e-4 subquad=2e-4 --json out/comparison.json

Each method trains in a process of its own with the real Trainer (SDPA attention, fused AdamW); the processes take
turns of a few steps, so that exactly one computes at a time and all see the same moods of the machine.
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from comparison.plots import plot_loss_against_time, plots_available
from comparison.report import CSV_COLUMNS, step_rows, summarise, table, write_json, write_whole
from comparison.run_method import run_method
from comparison.run_settings import RunSettings, Shape
from comparison.turns import WorkerError, run_in_turns
from environment import provenance
from tqdm import tqdm

METHODS = ("vanilla", "lora", "subquad")
LEARNING_RATES = {"vanilla": 2e-5, "lora": 2e-4, "subquad": 2e-4}


def compare(runs: Mapping[str, RunSettings]) -> dict[str, Any]:
    """Run the methods in turns, with a progress bar.

    Args:
        runs: by method; they differ in `method`, `learning_rate` and `save_to` only.

    Returns:
        The report; see report.py.

    Raises:
        WorkerError: a method's process failed; the message has its traceback.
    """
    common = next(iter(runs.values()))
    state: dict[str, Mapping[str, Any]] = {}
    with tqdm(total=common.steps * len(runs), unit="step", desc="comparison") as bar:

        def on_turn(name: str, progress: Mapping[str, Any]) -> None:
            if not progress:
                return
            bar.update(progress["step"] - state.get(name, {"step": 0})["step"])
            state[name] = progress
            losses = {n: f"{p['eval_loss']:.3f}" for n, p in state.items() if p["eval_loss"] is not None}
            bar.set_postfix(losses)

        results = run_in_turns(run_method, runs, on_turn)
        bar.update(bar.total - bar.n)
    settings = asdict(common)
    for name in ("method", "learning_rate", "save_to"):
        settings.pop(name)
    return summarise({name: results[name] for name in runs}, common.untimed_steps) | {
        "settings": settings | {"learning_rates": {name: run.learning_rate for name, run in runs.items()}},
        **provenance(),
    }


def write_csv(report: Mapping[str, Any], path: Path) -> None:
    """Per-step rows of all methods."""

    def write(file: Path) -> None:
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, CSV_COLUMNS)
            writer.writeheader()
            writer.writerows(step_rows(report))

    write_whole(path, write)


def write_plot(report: Mapping[str, Any], path: Path, title: str = "") -> None:
    write_whole(path, lambda file: plot_loss_against_time(report, file, title))


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    defaults = RunSettings(method="vanilla", learning_rate=0.0)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder or Hub name of a causal language model")
    source.add_argument(
        "--shape", type=_checked(Shape.parse), help="random weights and tokens: hidden=..,intermediate=..,"
        "layers=..,vocab=..,arch=opt|llama; losses of held-out text are then null",
    )  # fmt: skip

    data = parser.add_argument_group("data (with --model)")
    data.add_argument("--train-file", help=".txt or .jsonl")
    data.add_argument("--eval-file", help=".txt or .jsonl, held out")
    data.add_argument("--text-column", help="of JSONL rows of plain text (default: text)")
    data.add_argument("--prompt-template", help="e.g. 'Question: {question}\\nAnswer:' (\\n is a line break)")
    data.add_argument("--answer-template", help="e.g. ' {answer}'")
    data.add_argument("--loss-on", choices=("answers", "all"), help="with templates")
    data.add_argument("--max-eval-rows", type=int, help="evaluate on the first sequences only")

    run = parser.add_argument_group("training")
    run.add_argument("--methods", type=_methods, default=METHODS, help="default: vanilla,lora,subquad")
    run.add_argument("--steps", type=int, default=defaults.steps)
    run.add_argument("--batch-size", type=int, default=defaults.batch_size)
    run.add_argument("--seq-length", type=int, default=defaults.seq_length)
    run.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights and computation")
    run.add_argument("--autocast", action="store_true", help="the Trainer's bf16=True, on weights of --dtype")
    run.add_argument(
        "--learning-rate", nargs="+", type=_rate, default=[], metavar="METHOD=RATE",
        help=f"default: {' '.join(f'{name}={rate:g}' for name, rate in LEARNING_RATES.items())}",
    )  # fmt: skip
    run.add_argument("--scheduler", default=defaults.scheduler, help="the Trainer's lr_scheduler_type")
    run.add_argument("--lr-warmup-steps", type=int, default=defaults.lr_warmup_steps)
    run.add_argument("--eval-every", type=int, default=defaults.eval_every, help="0: at both ends only")
    run.add_argument("--seed", type=int, default=defaults.seed)
    run.add_argument("--threads", type=int, default=defaults.threads)
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")

    ours = parser.add_argument_group("methods")
    ours.add_argument("--rank", type=int, default=defaults.rank, help="of LoRA and of subquad's updates")
    ours.add_argument("--alpha", type=float, default=defaults.alpha)
    ours.add_argument(
        "--rest", choices=("lora", "frozen", "full"), default="lora", help="how subquad trains what it does not patch"
    )
    ours.add_argument("--active", type=_value, help="--set active=..: number or share of neurons")
    ours.add_argument("--tile-size", type=int, help="--set tile_size=..")
    ours.add_argument("--layers", type=_value, help="--set layers_to_transform=..: all, all_but_first, [1, 2]")
    ours.add_argument(
        "--set", nargs="+", type=_setting, action="extend", default=[], metavar="NAME=VALUE",
        dest="settings", help="any field of SubquadConfig; values are YAML",
    )  # fmt: skip

    measure = parser.add_argument_group("measurement")
    measure.add_argument("--turn-steps", type=int, default=defaults.turn_steps, help="steps of a turn")
    measure.add_argument("--untimed-steps", type=int, default=defaults.untimed_steps, help="left out of medians")
    measure.add_argument(
        "--profile-steps", type=int, default=defaults.profile_steps,
        help="extra steps of each baseline to time its MLPs in; 0: no Amdahl limits",
    )  # fmt: skip
    measure.add_argument("--json", type=Path, metavar="FILE", help="report; .csv and .png of the same name beside")
    measure.add_argument("--plot", type=Path, metavar="FILE", help="the PNG, elsewhere (or without --json)")
    measure.add_argument("--save-to", help="folder for subquad's plain checkpoint (with --model)")

    options = parser.parse_args(argv)
    if options.model and not (options.train_file and options.eval_file):
        parser.error("--model needs --train-file and --eval-file")
    if options.steps <= options.untimed_steps:
        parser.error(f"--steps must exceed --untimed-steps ({options.untimed_steps}), got {options.steps}")
    if options.plot and not plots_available():
        parser.error("--plot needs matplotlib (pip install 'hf-subquad[plots]')")
    return options


def runs_of(options: argparse.Namespace) -> dict[str, RunSettings]:
    """Settings by method."""
    data = {
        name: getattr(options, name)
        for name in ("text_column", "prompt_template", "answer_template", "loss_on")
        if getattr(options, name) is not None
    }
    for name in ("prompt_template", "answer_template"):
        if name in data:
            data[name] = data[name].replace("\\n", "\n")
    named = {
        "active": options.active,
        "tile_size": options.tile_size,
        "layers_to_transform": options.layers,
    }
    subquad = {name: value for name, value in named.items() if value is not None} | dict(options.settings)
    rates = LEARNING_RATES | dict(options.learning_rate)
    same = {
        name: getattr(options, name)
        for name in RunSettings.__dataclass_fields__
        if name not in ("method", "learning_rate", "data", "subquad", "save_to")
    }
    return {
        method: RunSettings(
            method=method,
            learning_rate=rates[method],
            data=data,
            subquad=subquad,
            save_to=options.save_to if method == "subquad" else None,
            **same,
        )
        for method in options.methods
    }


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    try:
        report = compare(runs_of(options))
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(report))
    if options.json:
        write_json(report, options.json)
        write_csv(report, options.json.with_suffix(".csv"))
        print(f"wrote {options.json} and {options.json.with_suffix('.csv')}")
    plot = options.plot or (options.json.with_suffix(".png") if options.json else None)
    if plot and plots_available():
        write_plot(report, plot, options.model or "random weights and tokens")
        print(f"wrote {plot}")
    return 0


def _checked(parse: Any) -> Any:
    """As an argparse type whose own message is shown."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not names or set(names) - set(METHODS) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(METHODS)}, got {text!r}")
    return names


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"not YAML: {text!r}") from error


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, _value(value)


def _rate(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    if name not in METHODS:
        raise argparse.ArgumentTypeError(f"expected METHOD=RATE with one of {','.join(METHODS)}, got {text!r}")
    return name, float(value)


if __name__ == "__main__":
    sys.exit(main())
