"""At equal time, whose held-out loss is lowest? Two studies of which neurons sparse MLPs compute.

    python scripts/study_selection.py allocation --json out/allocation.json
    python scripts/study_selection.py granularity --shares 0.125 0.25 --steps 60 --png out/granularity.png

`allocation` spends the same predicted MLP milliseconds in three ways: the same share of neurons for every MLP, the same
output error for every MLP, and the library's global allocation. Nothing is trained.

`granularity` compares which tokens share a selection of neurons: all of training (`fixed`), a sequence (`sequence`),
or T tokens that follow each other (`consecutive-T`) or resemble each other (`similar-T`, this library); with
`+compensation`, and with `+plan`: the global allocation of the time that the uniform share would take. With --steps,
each is fine-tuned too, in turns of a few steps. `dense` is the same patch with all neurons: frozen weights and low-rank
updates.

Without files, the text is what Python carries: `--corpus source` is of the kind that the embedded model was trained on,
`--corpus reference` is what the demo fine-tunes on.
"""

import argparse
import copy
import itertools
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import torch
import transformers
from comparison.plots import plots_available
from comparison.report import write_json, write_whole
from comparison.run_settings import RunSettings
from environment import provenance
from study.inputs import HeldOut, Inputs, load, mean_loss, mlp_tokens, write_corpus
from study.report import Panel, at_equal_x, draw, lines_of, text_table
from study.selections import Budgets, Method, install, token_importance
from study.spending import (
    WAYS,
    allocated,
    forward_backward,
    predicted_ms,
    time_mlps,
    uniform,
)
from study.training import Run, Training, train_in_turns
from torch import Tensor, nn
from tqdm import tqdm

from hf_subquad import SubquadConfig, compensate, dense_forward, patch_model, sparse_forward, sparse_mlps
from hf_subquad.layers.preserve_mode_and_rng import preserve_mode_and_rng
from hf_subquad.planning.allocation import budgets
from hf_subquad.planning.calibration import MeasuredMLP, measure_mlps
from hf_subquad.planning.measurements import share_of
from hf_subquad.planning.mlp_timing import timed

FOLDER = Path(__file__).resolve().parent
METHODS = (
    "dense", "fixed", "sequence", "consecutive-64", "similar-32", "similar-64", "similar-128",
    "similar-64+compensation", "similar-64+compensation+plan",
)  # fmt: skip

DEFINITIONS = {
    "loss_increase": "loss of the sparse forward minus that of the dense one on held-out text, nats per token",
    "kl": "mean Kullback-Leibler divergence of the sparse forward's predictions from the dense one's on that text",
    "predicted_kl": "the same on the last calibration batch, whose tokens no compensation was fitted to",
    "predicted_sum": "sum over MLPs of sensitivity times squared output error, which allocation minimises",
    "predicted_ms": "forward and backward of all patched MLPs, on the straight line through two timed budgets; "
    "`predicted_time` is its share of the same with all neurons",
    "asked": "share of every MLP's neurons, or with --times of the dense MLPs' time; `reached`: it can be that fast",
    "tiles": "number and tokens of the tiles on one training batch, by MLP; `distinct`: sets of neurons among them",
    "mlp_ms": "median over rounds of the measured forward and backward of all patched MLPs on one training batch, "
    "selection and compensation included; all settings take turns in every round",
    "held_out_loss_dense": "after fine-tuning, of the dense forward, which is what is saved",
    "step_seconds": "median of forward, backward, gradient clipping, optimizer and sync; the first step of each turn "
    "is left out",
}


# Allocation


def allocation_study(options: argparse.Namespace, inputs: Inputs) -> dict[str, Any]:
    """Rows by target time and way to spend it."""
    model = patch_model(copy.deepcopy(inputs.model), subquad_config(options, tile_size=options.tile_size))
    held_out = HeldOut(model, inputs.held_out)
    with preserve_mode_and_rng(model):
        measured, judged, _ = measure_mlps(model, inputs.calibration)
    dense_ms = sum(one.timing.dense for one in measured)
    rows = []
    for target, (way, spend) in tqdm([*itertools.product(options.times, WAYS.items())], unit="row", desc="allocation"):
        active = spend(measured, target * dense_ms)
        Budgets(active, [one.outputs.compensation(k) for one, k in zip(measured, active, strict=True)]).apply(model)
        with preserve_mode_and_rng(model), sparse_forward(model):
            predicted_kl = judged.divergence()
        spent = [one.option(k) for one, k in zip(measured, active, strict=True)]
        ms = sum(option.ms for option in spent)
        rows.append(
            {
                "way": way,
                "target": target,
                "predicted_ms": ms,
                "predicted_time": ms / dense_ms,
                "reached": ms <= target * dense_ms,
                "predicted_sum": sum(option.loss for option in spent),
                "predicted_kl": predicted_kl,
                **held_out.damage(),
                "active": active,
            }
        )
    return {"dense_loss": held_out.dense_loss, "mlps": [_measurements(one) for one in measured], "rows": rows}


def _measurements(measured: MeasuredMLP) -> dict[str, Any]:
    return {
        "name": measured.mlp.name,
        "neurons": measured.mlp.index.neurons,
        "sensitivity": measured.sensitivity,
        "full_ms": measured.timing.full,
        "dense_ms": measured.timing.dense,
        "sparse_ms": measured.timing.sparse,
        "errors": [{"active": k, "error": measured.outputs.error(k)} for k in budgets(measured.mlp.index.neurons)],
    }


def allocation_table(report: Mapping[str, Any]) -> str:
    head = ["way", "target", "predicted", "ms", "predicted KL", "held-out KL", "loss increase", "active"]
    return text_table(
        head,
        (
            [
                row["way"],
                f"{row['target']:.0%}",
                f"{row['predicted_time']:.1%}" + ("" if row["reached"] else " (too slow)"),
                f"{row['predicted_ms']:.1f}",
                f"{row['predicted_kl']:.4f}",
                f"{row['kl']:.4f}",
                f"{row['loss_increase']:+.4f}",
                " ".join(map(str, row["active"])),
            ]
            for row in sorted(report["rows"], key=lambda row: -row["target"])
        ),
    )


def allocation_panels(report: Mapping[str, Any]) -> list[Panel]:
    rows = [row | {"line": row["way"]} for row in report["rows"]]
    x_label = "predicted time of the patched MLPs (share of dense)"
    return [
        Panel(x_label, "increase of held-out loss (nats per token)", _lines(rows, "predicted_time", "loss_increase")),
        Panel(x_label, "held-out KL divergence (nats per token)", _lines(rows, "predicted_time", "kl")),
    ]


def _lines(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> dict[str, list[tuple[float, float]]]:
    return lines_of((row for row in rows if y in row), "line", x, y)


# Granularity


@dataclass(frozen=True)
class Setup:
    """A method and its budgets at one share or target time, all that a patched copy of the model needs."""

    method: Method
    asked: float
    predicted_ms: float | None  # where MLPs were timed to find budgets
    reached: bool  # the method can be as fast as asked
    budgets: Budgets
    importance: Mapping[str, Tensor]
    sequences: int

    def prepare(self, model: nn.Module) -> None:
        install(model, self.method, self.importance, self.sequences)
        self.budgets.apply(model)


def granularity_study(options: argparse.Namespace, inputs: Inputs) -> dict[str, Any]:
    """Rows by method and share (or target time): before training and, with --steps, after it."""
    config = subquad_config(options)
    model = patch_model(copy.deepcopy(inputs.model), config)
    held_out = HeldOut(model, inputs.held_out)
    tokens = mlp_tokens(model, inputs.calibration[-1])
    importance = token_importance(model, inputs.calibration)
    setups, rows = [], []
    for method in tqdm(options.methods, unit="method", desc="before training"):
        for setup in _setups(model, method, options, inputs, tokens, importance):
            setup.prepare(model)
            setups.append(setup)
            rows.append({**_describe(setup, model, tokens), **held_out.damage()})
    for row, rounds in zip(rows, time_in_turns(model, setups, tokens, options.timing_rounds), strict=True):
        row |= {"mlp_ms": median(rounds), "mlp_ms_rounds": rounds}
    if options.steps:
        for row, trained in zip(rows, _train(setups, config, options, inputs), strict=True):
            row |= trained
    return {"dense_loss": held_out.dense_loss, "rows": rows}


def _setups(
    model: nn.Module, method: Method, options: argparse.Namespace, inputs: Inputs,
    tokens: Mapping[str, Tensor], importance: Mapping[str, Tensor],
) -> Iterator[Setup]:  # fmt: skip
    """A method at every share or target time. The model is left with its selection and the last budgets."""
    mlps = sparse_mlps(model)
    if method.sharing == "dense":
        dense = Budgets([mlp.index.neurons for mlp in mlps], [None] * len(mlps))
        yield Setup(method, 1.0, None, True, dense, importance, options.batch_size)
        return
    install(model, method, importance, options.batch_size)
    measured, timings = [], []
    if method.planned:
        with preserve_mode_and_rng(model):
            measured, *_ = measure_mlps(model, inputs.calibration)
        timings = [one.timing for one in measured]
    elif options.times:
        timings = time_mlps(model, tokens, method.compensated)
    for asked in options.times or options.shares:
        if options.times:
            ms = asked * sum(timing.dense for timing in timings)
            active = uniform(mlps, timings, ms)
        else:
            active = [share_of(mlp, asked) for mlp in mlps]
            ms = predicted_ms(active, mlps, timings) if timings else None
        if method.planned:
            active = allocated(measured, ms)
        budgets = Budgets(active, [None] * len(mlps))
        if method.compensated:
            budgets.apply(model)
            compensate(model, inputs.calibration)
            budgets = Budgets(active, [mlp.compensation for mlp in mlps])
        predicted = predicted_ms(active, mlps, timings) if timings else None
        yield Setup(
            method, asked, predicted, predicted is None or predicted <= ms, budgets, importance, options.batch_size
        )


def _describe(setup: Setup, model: nn.Module, tokens: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a prepared model selects on `tokens`: `tiles` is (n, T) by MLP, `distinct` the sets of neurons among them;
    both are None where an MLP runs dense."""
    tiles, distinct = [], []
    config = sparse_mlps(model)[0].runtime.config
    for mlp in sparse_mlps(model):
        selection = None
        if not mlp.dense:
            selection = mlp.index.select(tokens[mlp.name], mlp.k, config.tile_size, config.tile_order)
        tiles.append(list(selection.tiles.shape) if selection else None)
        distinct.append(len({tuple(sorted(chosen.tolist())) for chosen in selection.neurons}) if selection else None)
    return {
        "method": setup.method.name,
        "asked": setup.asked,
        "predicted_ms": setup.predicted_ms,
        "reached": setup.reached,
        "active": list(setup.budgets.active),
        "active_share": sum(mlp.active for mlp in sparse_mlps(model))
        / sum(m.index.neurons for m in sparse_mlps(model)),
        "tiles": tiles,
        "distinct": distinct,
    }


def time_in_turns(
    model: nn.Module, setups: Sequence[Setup], tokens: Mapping[str, Tensor], rounds: int
) -> list[list[float]]:
    """Milliseconds of all patched MLPs, forward and backward on their tokens [N, d], by setup and round."""
    inputs = {name: x.detach().requires_grad_(True) for name, x in tokens.items()}
    found: list[list[float]] = [[] for _ in setups]
    for _ in tqdm(range(rounds), unit="round", desc="timing MLPs"):
        for setup, ms in zip(setups, found, strict=True):
            setup.prepare(model)
            with sparse_forward(model):
                first, *_ = mlps = sparse_mlps(model)
                forward_backward(first, inputs[first.name])  # in training, too, caches hold what is like it
                seconds = [
                    timed(lambda mlp=mlp: forward_backward(mlp, inputs[mlp.name]), inputs[mlp.name].device)
                    for mlp in mlps
                ]
            ms.append(1000 * sum(seconds))
    return found


def _train(
    setups: Sequence[Setup], config: SubquadConfig, options: argparse.Namespace, inputs: Inputs
) -> list[dict[str, Any]]:
    """By setup: median `step_seconds`, held-out losses dense and sparse, and all `steps`."""
    training = Training(options.learning_rate, options.steps, options.turn_steps, options.seed)
    runs = [Run(inputs.model, config, setup.prepare, training) for setup in setups]
    with tqdm(total=len(runs) * options.steps, unit="step", desc="training in turns") as bar:
        train_in_turns(runs, inputs.train, options.turn_steps, bar.update)
    return [
        {
            "step_seconds": median(row["seconds"] for row in run.rows if row["timed"]),
            **_held_out_losses(run.model, inputs),
            "steps": run.rows,
        }
        for run in tqdm(runs, unit="run", desc="held-out losses")
    ]


def _held_out_losses(model: nn.Module, inputs: Inputs) -> dict[str, float]:
    with dense_forward(model):
        dense = mean_loss(model, inputs.held_out)
    with sparse_forward(model):
        return {"held_out_loss_dense": dense, "held_out_loss_sparse": mean_loss(model, inputs.held_out)}


def granularity_table(report: Mapping[str, Any]) -> str:
    trained = "step_seconds" in report["rows"][0]
    head = ["method", "asked", "active", "tiles", "MLP ms", "loss increase", "KL"]
    head += ["step (s)", "loss, dense", "sparse"] if trained else []
    lines = []
    for row in report["rows"]:
        shape = next((shape for shape in row["tiles"] if shape), None)
        asked = f"{row['asked']:.1%}" + ("" if row["reached"] else " (too slow)")
        line = [row["method"], asked, f"{row['active_share']:.1%}"]
        line += [f"{shape[0]} x {shape[1]}" if shape else "-", f"{row['mlp_ms']:.1f}"]
        line += [f"{row['loss_increase']:+.4f}", f"{row['kl']:.4f}"]
        if trained:
            line += [f"{row['step_seconds']:.3f}"]
            line += [f"{row[key]:.4f}" for key in ("held_out_loss_dense", "held_out_loss_sparse")]
        lines.append(line)
    return text_table(head, lines)


def granularity_panels(report: Mapping[str, Any]) -> list[Panel]:
    rows = [row | {"line": row["method"]} for row in report["rows"]]
    panels = [
        Panel(
            "measured time of the patched MLPs, forward and backward (ms)",
            "increase of held-out loss before training (nats per token)",
            _lines(rows, "mlp_ms", "loss_increase"),
        )
    ]
    if "step_seconds" in rows[0]:
        x_label = "median training step (s)"
        for kind in ("dense", "sparse"):
            y_label = f"held-out loss after training, {kind} forward (nats per token)"
            panels.append(Panel(x_label, y_label, _lines(rows, "step_seconds", f"held_out_loss_{kind}")))
    return panels


# Both


STUDIES = {
    "allocation": (allocation_study, allocation_table, allocation_panels),
    "granularity": (granularity_study, granularity_table, granularity_panels),
}


def subquad_config(options: argparse.Namespace, **settings: Any) -> SubquadConfig:
    return SubquadConfig(
        rank=options.rank,
        alpha=options.alpha,
        layers_to_transform=options.layers,
        seed=options.seed,
        refresh_steps=0,  # budgets stay what a row says they are
        **settings,
    )


def run_settings(options: argparse.Namespace) -> RunSettings:
    """Where model and data come from, in the terms of compare_vanilla.py."""
    templates = {name: getattr(options, name) for name in ("prompt_template", "answer_template", "loss_on")}
    data = {name: text.replace("\\n", "\n") for name, text in templates.items() if text is not None}
    return RunSettings(
        method="subquad",
        learning_rate=options.learning_rate,
        model=options.model,
        train_file=options.train_file,
        eval_file=options.eval_file,
        data=data | {"text_column": options.text_column, "max_train_rows": options.max_rows},
        dtype=options.dtype,
        steps=options.steps,
        batch_size=options.batch_size,
        seq_length=options.seq_length,
        seed=options.seed,
    )


def study(options: argparse.Namespace) -> dict[str, Any]:
    """The report of a study, with what is needed to repeat it."""
    torch.set_num_threads(options.threads)
    transformers.set_seed(options.seed)
    with ExitStack() as stack:
        if options.train_file is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            vars(options).update(write_corpus(options.corpus, folder))
        inputs = load(run_settings(options), options.max_eval_rows, options.calibration_batches)
    measured, _, panels = STUDIES[options.study]
    report = measured(options, inputs)
    return report | {
        "at_equal_time": [
            {"x": panel.x_label, "y": panel.y_label, "lines": at_equal_x(panel.lines)} for panel in panels(report)
        ],
        "definitions": DEFINITIONS,
        "settings": _settings(options),
        **provenance(),
    }


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    if options.corpus:
        del values["train_file"], values["eval_file"]
    if "methods" in values:
        values["methods"] = [method.name for method in options.methods]
    return values


def equal_time_table(report: Mapping[str, Any]) -> str:
    """Every line of the pictures read off at the same times, the best first."""
    tables = []
    for panel in report["at_equal_time"]:
        lines = sorted(panel["lines"].items(), key=lambda line: sum(y for _, y in line[1]))
        if lines:
            head = [f"{panel['y']}, at {panel['x']}:", *(f"{x:.4g}" for x, _ in lines[0][1])]
            tables.append(text_table(head, ([name, *(f"{y:.4f}" for _, y in points)] for name, points in lines)))
    return "\n\n".join(tables)


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    data = common.add_argument_group("model and data")
    data.add_argument("--model", default=str(FOLDER / "demo_model"), help="folder or Hub name (default: the embedded)")
    data.add_argument("--train-file", help=".txt or .jsonl; for calibration too")
    data.add_argument("--eval-file", help=".txt or .jsonl, held out")
    data.add_argument("--corpus", choices=("source", "reference"), help="text that Python carries, in place of files")
    data.add_argument("--text-column", default="text", help="of JSONL rows of plain text")
    data.add_argument("--prompt-template", help="e.g. 'Question: {question}\\nAnswer:' (\\n is a line break)")
    data.add_argument("--answer-template", help="e.g. ' {answer}'")
    data.add_argument("--loss-on", choices=("answers", "all"), help="with templates")
    data.add_argument("--max-rows", type=int, help="read the first rows of the training data only")
    data.add_argument("--max-eval-rows", type=int, default=64, help="sequences, spread over the evaluation data")
    data.add_argument("--calibration-batches", type=int, default=3, help="the last one judges")
    data.add_argument("--batch-size", type=int, default=8)
    data.add_argument("--seq-length", type=int, default=256)
    patch = common.add_argument_group("patch")
    patch.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights and computation")
    patch.add_argument("--rank", type=int, default=16, help="of updates and adapters")
    patch.add_argument("--alpha", type=float, default=16.0)
    patch.add_argument("--layers", choices=("all", "all_but_first"), default="all_but_first")
    common.add_argument("--seed", type=int, default=0)
    common.add_argument("--threads", type=int, default=2)
    common.add_argument("--json", type=Path, metavar="FILE", help="all rows")
    common.add_argument("--png", type=Path, metavar="FILE", help="picture")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    studies = parser.add_subparsers(dest="study", required=True)
    allocation = studies.add_parser("allocation", parents=[common], help="ways to spend the same time")
    allocation.add_argument("--times", type=float, nargs="+", default=[0.6, 0.45, 0.35, 0.25], help="shares of dense")
    allocation.add_argument("--tile-size", type=int, default=64)
    allocation.set_defaults(default_corpus="source", steps=0, learning_rate=0.0)
    granularity = studies.add_parser("granularity", parents=[common], help="which tokens share a selection")
    granularity.add_argument("--methods", type=_method, nargs="+", default=[Method.parse(name) for name in METHODS])
    granularity.add_argument("--shares", type=float, nargs="+", default=[0.0625, 0.125, 0.25, 0.5], help="of neurons")
    granularity.add_argument(
        "--times", type=float, nargs="+", default=[],
        help="in place of --shares: as many neurons as take this share of the dense MLPs' time with each method",
    )  # fmt: skip
    granularity.add_argument("--steps", type=int, default=0, help="of fine-tuning; 0: none")
    granularity.add_argument("--turn-steps", type=int, default=4)
    granularity.add_argument("--learning-rate", type=float, default=1e-3)
    granularity.add_argument("--timing-rounds", type=int, default=5)
    granularity.set_defaults(default_corpus="reference")

    options = parser.parse_args(argv)
    if (options.train_file is None) != (options.eval_file is None):
        parser.error("--train-file and --eval-file go together")
    if options.train_file and options.corpus:
        parser.error("--corpus is for want of files: leave it out")
    if options.png and not plots_available():
        parser.error("--png needs matplotlib (pip install 'hf-subquad[plots]')")
    if not options.train_file:
        options.corpus = options.corpus or options.default_corpus
    del options.default_corpus
    return options


def _method(text: str) -> Method:
    try:
        return Method.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_options(argv)
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    report = study(options)
    _, table, panels = STUDIES[options.study]
    print(f"held-out loss of the dense model: {report['dense_loss']:.4f}")
    print(table(report))
    print(f"\n{equal_time_table(report)}")
    if options.json:
        write_json(report, options.json)
    if options.png:
        write_whole(options.png, lambda file: draw(panels(report), Path(options.model).name, file))
    return 0


if __name__ == "__main__":
    sys.exit(main())
