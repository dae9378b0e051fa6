"""Compare a training step of subquad with the plain Trainer and with PEFT LoRA: same data, seed and steps, in turns.

    python scripts/compare_vanilla.py --shape hidden=2048,intermediate=8192,layers=4,vocab=8192,arch=opt --steps 10
    python scripts/compare_vanilla.py --model facebook/opt-125m --train-file train.txt --eval-file test.txt \\
        --steps 100 --learning-rate vanilla=2e-5 lora=2e-4 subquad=2e-4 --json out/comparison.json

First each method trains for all --steps, which gives losses, memory and the cost of set-up. Then they take turns of a
few steps on the same batches, round after round, which gives times: so all see the same moods of the machine. Every
run has a process of its own with the real Trainer (SDPA attention, fused AdamW), one at a time, so that memory is
needed for one method only.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from comparison.apart import WorkerError, run_apart
from comparison.measure import expected_memory, full_run, turn
from comparison.memory import available_bytes, memory_bytes
from comparison.report import summarise, table, write_plot
from comparison.settings import RunSettings, Shape
from environment import provenance
from reporting import plots_available, write_json
from tqdm import tqdm

METHODS = ("vanilla", "lora", "subquad")
LEARNING_RATES = {"vanilla": 2e-5, "lora": 2e-4, "subquad": 2e-4}


def compare(runs: Mapping[str, RunSettings]) -> dict[str, Any]:
    """Run the methods, with a progress bar.

    Args:
        runs: by method; they differ in `method`, `learning_rate` and `save_to` only.

    Returns:
        The report; see report.py.

    Raises:
        WorkerError: a method's process failed or was killed; the message says which and how.
    """
    common = next(iter(runs.values()))
    apart = partial(run_apart, start="spawn" if common.device == "cuda" else "forkserver")
    print(_memory_note(runs), flush=True)
    turn_steps = common.untimed_steps + common.turn_steps + common.profile_steps
    losses: dict[str, str] = {}
    whole, turns = {}, {name: [] for name in runs}
    with (
        tqdm(total=len(runs) * (common.steps + common.rounds * turn_steps), unit="step") as bar,
        tempfile.TemporaryDirectory() as folder,
    ):

        def progress(name: str, of: Mapping[str, Any]) -> None:
            bar.update()
            if of["eval_loss"] is not None:
                losses[name] = f"{of['eval_loss']:.3f}"
                bar.set_postfix(losses)

        for name in sorted(runs, key=("subquad", *METHODS).index):  # it says which MLPs are to be timed
            bar.set_description(f"{name}, training")
            whole[name] = apart(name, full_run, runs[name], lambda of, name=name: progress(name, of))
        timed = dict(runs)
        mlps = {mlp["name"]: mlp["projections"] for mlp in whole["subquad"]["patched"]} if "subquad" in runs else {}
        if "subquad" in runs and whole["subquad"]["plan"]:
            plan = Path(folder, "plan.json")
            plan.write_text(whole["subquad"]["plan"], encoding="utf-8")
            timed["subquad"] = replace(runs["subquad"], plan=str(plan))  # planned once
        names = list(runs)
        for number in range(common.rounds):
            first = number % len(names)  # so that nobody always follows the same neighbour
            for name in names[first:] + names[:first]:
                bar.set_description(f"{name}, round {number + 1} of {common.rounds}")
                argument = (timed[name], mlps)
                label = f"{name}, round {number + 1}"
                turns[name].append(apart(label, turn, argument, lambda of, name=name: progress(name, of)))
    settings = asdict(common)
    for name in ("method", "learning_rate", "save_to"):
        settings.pop(name)
    return summarise({name: whole[name] for name in runs}, turns) | {
        "settings": settings | {"learning_rates": {name: run.learning_rate for name, run in runs.items()}},
        **provenance(),
    }


def _memory_note(runs: Mapping[str, RunSettings]) -> str:
    """What memory each method will take, about."""
    common = next(iter(runs.values()))
    expected = run_apart("the estimate of memory", expected_memory, common)
    needs = {
        name: expected["full" if name == "vanilla" or (name == "subquad" and run.rest == "full") else "low_rank"]
        for name, run in runs.items()
    }
    text = ", ".join(f"{name} up to about {need / 1e9:.1f} GB" for name, need in needs.items())
    note = (
        f"memory: {text}, one at a time; {available_bytes() / 1e9:.1f} of {memory_bytes() / 1e9:.1f} GB are available"
    )
    if common.device == "cpu" and max(needs.values()) > available_bytes():
        note += "\nThis may not fit. Reduce --batch-size or --seq-length, or end other programs."
    return note


# Options that are fields of RunSettings, with their defaults.
_NUMBERS = {
    "steps": "of the whole training",
    "batch_size": "",
    "seq_length": "tokens of a sequence, at most",
    "lr_warmup_steps": "",
    "eval_every": "steps; 0: at both ends only",
    "seed": "",
    "threads": "",
    "rank": "of LoRA and of subquad's updates",
    "alpha": "",
    "rounds": "of timing; in each every method has a turn",
    "turn_steps": "timed steps of a turn",
    "untimed_steps": "before them, to warm up",
    "profile_steps": "after them, to time MLPs in; 0: no MLP times and Amdahl limits",
}


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    defaults = RunSettings(method="vanilla", learning_rate=0.0)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder or Hub name of a causal language model")
    source.add_argument(
        "--shape", type=_shape, help="random weights and tokens: hidden=..,intermediate=..,"
        "layers=..,vocab=..,arch=opt|llama,padding=SHARE,context=SHARE; losses of held-out text are then null",
    )  # fmt: skip

    data = parser.add_argument_group("data (with --model)")
    data.add_argument("--train-file", help=".txt or .jsonl")
    data.add_argument("--eval-file", help=".txt or .jsonl, held out")
    data.add_argument("--text-column", help="of JSONL rows of plain text (default: text)")
    data.add_argument("--prompt-template", help="e.g. 'Question: {question}\\nAnswer:' (\\n is a line break)")
    data.add_argument("--answer-template", help="e.g. ' {answer}'")
    data.add_argument("--loss-on", choices=("answers", "all"), help="with templates")
    data.add_argument("--chat", action="store_true", help="prompts and answers in the tokenizer's chat template")
    data.add_argument("--packing", action="store_true", help="join prompts and answers into blocks of --seq-length")
    data.add_argument("--max-eval-rows", type=int, help="evaluate on the first sequences only")

    run = parser.add_argument_group("training and measurement")
    for name, text in _NUMBERS.items():
        default = getattr(defaults, name)
        run.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=text)
    run.add_argument("--methods", type=_methods, default=METHODS, help="default: vanilla,lora,subquad")
    run.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights and computation")
    run.add_argument("--quantize", choices=("nf4",), help="the frozen linear layers (QLoRA); with --model, not vanilla")
    run.add_argument("--autocast", action="store_true", help="the Trainer's bf16=True, on weights of --dtype")
    run.add_argument("--gradient-checkpointing", action="store_true")
    run.add_argument("--liger", action="store_true", help="the Trainer's use_liger_kernel=True")
    run.add_argument(
        "--learning-rate", nargs="+", type=_rate, default=[], metavar="METHOD=RATE",
        help=f"default: {' '.join(f'{name}={rate:g}' for name, rate in LEARNING_RATES.items())}",
    )  # fmt: skip
    run.add_argument("--scheduler", default=defaults.scheduler, help="the Trainer's lr_scheduler_type")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument("--json", type=Path, metavar="FILE", help="report; .png of the same name beside")
    run.add_argument("--save-to", help="folder for subquad's plain checkpoint (with --model)")

    ours = parser.add_argument_group("subquad")
    ours.add_argument("--rest", choices=("lora", "frozen", "full"), default="lora", help="how it trains the rest")
    ours.add_argument("--plan", help="JSON file; by default it plans")
    ours.add_argument("--active", type=_value, help="--set active=..: number or share of neurons")
    ours.add_argument("--layers", type=_value, help="--set layers_to_transform=..: all, all_but_first, [1, 2]")
    ours.add_argument(
        "--set", nargs="+", type=_setting, action="extend", default=[], metavar="NAME=VALUE",
        dest="settings", help="any field of SubquadConfig; values are YAML",
    )  # fmt: skip

    options = parser.parse_args(argv)
    if options.model and not (options.train_file and options.eval_file):
        parser.error("--model needs --train-file and --eval-file")
    if options.quantize and (options.shape or "vanilla" in options.methods):
        parser.error("--quantize needs --model, and --methods lora,subquad: vanilla would train quantised weights")
    if options.gradient_checkpointing and options.profile_steps:
        parser.error("--gradient-checkpointing needs --profile-steps 0: MLPs are computed again, but not to their ends")
    for name in ("steps", "rounds", "turn_steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    return options


def runs_of(options: argparse.Namespace) -> dict[str, RunSettings]:
    """Settings by method."""
    data = {
        name: getattr(options, name)
        for name in ("text_column", "prompt_template", "answer_template", "loss_on", "chat", "packing")
        if getattr(options, name) not in (None, False)
    }
    for name in ("prompt_template", "answer_template"):
        if name in data:
            data[name] = data[name].replace("\\n", "\n")
    named = {"active": options.active, "layers_to_transform": options.layers}
    subquad = {name: value for name, value in named.items() if value is not None} | dict(options.settings)
    rates = LEARNING_RATES | dict(options.learning_rate)
    same = {
        name: getattr(options, name)
        for name in RunSettings.__dataclass_fields__
        if name not in ("method", "learning_rate", "data", "subquad", "plan", "save_to")
    }
    return {
        method: RunSettings(
            method=method,
            learning_rate=rates[method],
            data=data,
            subquad=subquad,
            plan=options.plan if method == "subquad" else None,
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
        if plots_available():
            write_plot(report, options.json.with_suffix(".png"), options.model or "random weights and tokens")
        print(f"wrote {options.json} and what is beside it")
    return 0


def _shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error  # a ValueError's message would not be shown


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if set(names) - set(METHODS) or len(set(names)) < len(names):
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
