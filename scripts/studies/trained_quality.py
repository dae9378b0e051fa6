"""Quality after training, and time of a step: a plan, all neurons, and SparseLoRA's recipe, on the same batches.

    python scripts/studies/trained_quality.py --model smollm2-135m --train-file train.jsonl --eval-file test.jsonl

SparseLoRA (Khaki et al., ICML 2025) is made from this library's parts: neurons of a token's MLP are chosen by a rank-8
SVD of the weights, one set for all context tokens of a sequence; tokens at which the loss looks run dense, and so do
the first 5% of the steps. All have the same low-rank updates, LoRA on attention, and the exact savings; `dense` has all
neurons.

Budgets are planned here, or are those that a run of compare_vanilla.py reports (`--budgets answers.json`), so that
what was timed is what is trained.

Before training: the cosine of the gradient with the exact one, on a batch that no plan saw. Then all are trained from
the same start on the same batches, and the dense model's loss is measured on held-out rows.
"""

import argparse
import copy
import dataclasses
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "recipes")]

from comparison.inputs import padded_batches
from lm_data import NO_LOSS
from methods import apply_method
from reporting import conclude, text_table
from settings import LmSettings

from hf_subquad import (
    SubquadConfig,
    calibrate,
    compensate,
    dense_forward,
    patch_head,
    sparse_mlps,
    sync_model,
    unpatch_head,
)
from hf_subquad.index.choose_neurons import ActivationIndex, Selection
from hf_subquad.layers.budget import Budget
from hf_subquad.layers.classify_tokens import classify
from hf_subquad.ops.group_tokens import TokenTiles
from hf_subquad.planning.fidelity import DenseReference

Batch = dict[str, Tensor]
Wanted = tuple[str, list[Budget] | None, float | None]  # name; budgets of a plan; SparseLoRA's share

SVD_RANK = 8
SCORED_ONE_IN = 4  # tokens, as of this library's tiles of 64
DENSE_STEPS = 0.05  # share of the steps, at the start
PLANNED_ON = 3  # batches
METHODS = ("dense", "plan", "SparseLoRA")

DEFINITIONS = {
    "step_seconds": "median over rounds in which all take turns: forward, backward, clipping, AdamW and sync_model; "
    "null if none were asked for",
    "cosine, gradient_error, divergence": "of the gradient of all trained parameters, and of the predictions, against "
    "the dense forward, before training, with all rows of the gradient",
    "noise": "squared error that one sample of rows adds to that gradient, as a share of the squared gradient",
    "loss": "held-out, of the dense forward after training; nats per token that carries loss",
    "match": "share of held-out rows whose whole answer greedy decoding gives",
}


class SequenceSets:
    """In place of an index's `select`: one set of neurons for the context tokens of each sequence."""

    def __init__(self, index: ActivationIndex, counts: list[int]) -> None:
        self.index, self.counts = index, counts

    @torch.no_grad()
    def __call__(self, x: Tensor, k: int, tile_size: int, order: str) -> Selection:
        tiles = sequence_tiles(self.counts, len(x), x.device)
        scores = self.index.tile_scores(x[tiles.slots[:, ::SCORED_ONE_IN]])
        return Selection(tiles, self.index.backend(x.device).top_neurons(scores, self.index.round_up_k(k)))


def sequence_tiles(counts: Sequence[int], tokens: int, device: torch.device) -> TokenTiles:
    """A tile for each sequence, of `counts` tokens that follow each other; shorter ones are filled with spare slots."""
    counts = [count for count in counts if count]
    assert sum(counts) == tokens, f"{tokens} context tokens, expected {counts}"
    size = max(counts)
    real = torch.arange(size)[None] < torch.tensor(counts)[:, None]
    entries = torch.empty(len(counts), size, dtype=torch.long)
    entries[real] = torch.arange(tokens)
    entries[~real] = torch.arange(tokens, entries.numel())
    return TokenTiles(entries.to(device), tokens)


class Candidate:
    """A model in training, and how its budgets are set.

    Args:
        share: SparseLoRA's, of the neurons; None for a plan, or for all neurons if there is none.
    """

    def __init__(
        self, base: nn.Module, options: argparse.Namespace, budgets: list[Budget] | None, share: float | None
    ) -> None:
        self.share, self.budgets = share, budgets
        config = SubquadConfig(
            rank=options.rank, alpha=options.alpha, layers_to_transform="all", seed=options.seed, refresh_steps=0,
            sketch_rank=SVD_RANK if share is not None else SubquadConfig().sketch_rank,
        )  # fmt: skip
        self.autocast = partial(torch.autocast, options.device, torch.bfloat16, enabled=options.autocast)
        transformers.set_seed(options.seed)  # so that adapters start from the same values
        self.model, _ = apply_method(copy.deepcopy(base), "subquad", rank=options.rank, alpha=options.alpha,
                                     subquad=config, rest="lora")  # fmt: skip
        self.model.train()
        self.counts: list[int] = []
        self.mlps = sparse_mlps(self.model)
        self.trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=options.learning_rate, weight_decay=0.0, fused=True)
        if share is not None:
            for mlp in self.mlps:
                mlp.index.select = SequenceSets(mlp.index, self.counts)  # type: ignore[method-assign, assignment]
        self.done = 0
        sync_model(self.model, 0)

    def prepare(self, calibration: Sequence[Batch]) -> "Candidate":
        """Set the budgets that it trains with."""
        if self.budgets is not None:
            for mlp, budget in zip(self.mlps, self.budgets, strict=True):
                mlp.set_budget(budget)
            with self.autocast():
                compensate(self.model, calibration)
        else:
            self.set_share(self.share)
        return self

    def set_share(self, share: float | None) -> None:
        for mlp in self.mlps:
            mlp.set_budget(Budget() if share is None else Budget(context=round(share * mlp.index.neurons)))

    def see(self, batch: Batch) -> Batch:
        """Call it before every forward: it counts the context tokens of each sequence."""
        (classes,) = classify(self.model, batch).stacks.values()
        rows, columns = classes.shape
        self.counts[:] = torch.bincount(classes.context // columns, minlength=rows).tolist()
        return batch

    def step(self, batch: Batch) -> float:
        """Seconds of one training step."""
        self.see(batch)
        started = self.now()
        with self.autocast():
            loss = self.model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        sync_model(self.model, self.done, self.optimizer)
        return self.now() - started

    def now(self) -> float:
        if self.trained[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def train(self, batches: Sequence[Batch], tick: Callable[[], Any]) -> None:
        if self.share is None:  # whose sets are those of padded rows
            patch_head(self.model)  # exact
        for number, batch in enumerate(batches):
            if self.share is not None:
                self.set_share(None if number < DENSE_STEPS * len(batches) else self.share)
            self.step(batch)
            tick()
        if self.share is None:
            unpatch_head(self.model)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The dense model's mean loss per labelled token, and the share of rows of which each labelled token is the
        most likely one, so that greedy decoding gives the whole answer."""
        self.model.eval()
        total, tokens, matches, rows = 0.0, 0, 0, 0
        with dense_forward(self.model), self.autocast():
            for batch in batches:
                labels, outputs = batch["labels"][:, 1:], self.model(**self.see(batch))
                labelled = labels != NO_LOSS
                total, tokens = total + float(outputs.loss) * int(labelled.sum()), tokens + int(labelled.sum())
                matches += int(((outputs.logits[:, :-1].argmax(-1) == labels) | ~labelled).all(1).sum())
                rows += len(labels)
        self.model.train()
        return {"loss": total / tokens, "match": matches / rows}

    def fidelity(self, batch: Batch) -> dict[str, float]:
        """Against the dense forward; the budgets stay."""
        before = [mlp.budget for mlp in self.mlps]
        with self.autocast():
            with dense_forward(self.model):
                reference = DenseReference(self.model, self.see(batch))
            sampled = reference.fidelity()
            for mlp in self.mlps:
                mlp.set_budget(dataclasses.replace(mlp.budget, gradient=1.0))
            found = reference.fidelity()
        for mlp, budget in zip(self.mlps, before, strict=True):
            mlp.set_budget(budget)
        noise = sampled.gradient_error**2 - found.gradient_error**2
        return {
            "cosine": found.cosine, "gradient_error": found.gradient_error, "divergence": found.divergence,
            "noise": noise,
        }  # fmt: skip


def study(options: argparse.Namespace) -> dict[str, Any]:
    base, train, held_out = load(options)
    calibration, judged, training = train[:PLANNED_ON], train[PLANNED_ON], train[PLANNED_ON + 1 :]
    random.Random(options.seed).shuffle(training)
    if options.budgets:
        rows = json.loads(Path(options.budgets).read_text())["patched"]
    else:
        dense = Candidate(base, options, None, None)
        with dense.autocast():
            plan = calibrate(dense.model, calibration, tolerance=options.tolerance)
        print(plan.table())
        rows = [dataclasses.asdict(layer) for layer in plan.layers]
        del dense
    budgets = [Budget(row["predicted"], row["context"], options.gradient or row["gradient"]) for row in rows]

    wanted: list[Wanted] = [("dense", None, None), ("plan", budgets, None)]
    wanted += [(f"SparseLoRA, {share:.0%} for context", None, share) for share in options.shares]
    wanted = [one for one in wanted if one[0].startswith(tuple(options.methods))]
    times = time_in_turns(base, options, wanted, calibration, training) if options.rounds else {}
    found = []
    with tqdm(total=len(wanted) * options.steps, unit="step", desc="training") as bar:
        for name, planned, share in wanted:
            candidate = Candidate(base, options, planned, share).prepare(calibration)
            row = {"method": name, "step_seconds": times.get(name), **candidate.fidelity(judged)}
            row["start"] = candidate.evaluate(held_out)["loss"]
            candidate.train(training[: options.steps], bar.update)
            found.append(row | candidate.evaluate(held_out))
            tqdm.write(json.dumps(found[-1]))  # a study takes hours: what is known is on record if it is cut off
            del candidate
            gc.collect()
    return {"rows": found}


def time_in_turns(
    base: nn.Module, options: argparse.Namespace, wanted: Sequence[Wanted],
    calibration: Sequence[Batch], batches: Sequence[Batch],
) -> dict[str, float]:  # fmt: skip
    """Median seconds of a training step, by method."""
    candidates = {name: Candidate(base, options, *how).prepare(calibration) for name, *how in wanted}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in tqdm(range(options.rounds + 1), unit="round", desc="timing in turns"):
        for name, candidate in candidates.items():
            taken = candidate.step(batches[number % len(batches)])
            if number:  # the first round warms up
                seconds[name].append(taken)
    return {name: median(values) for name, values in seconds.items()}


def load(options: argparse.Namespace) -> tuple[nn.Module, list[Batch], list[Batch]]:
    """The model, batches to train on, and batches to judge by. Rows above the maximal length are dropped, so twice as
    many are read as the training takes."""
    settings = LmSettings(
        model=options.model, method="subquad", output_dir="", train_file=options.train_file,
        eval_file=options.eval_file, prompt_template=options.prompt_template.replace("\\n", "\n"),
        answer_template=options.answer_template, chat=options.chat, loss_on="answers", max_length=options.max_length,
        max_train_rows=2 * options.batch_size * (options.steps + PLANNED_ON + 1), max_eval_rows=options.max_eval_rows,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    train, held_out = (
        [{name: value.to(options.device) for name, value in batch.items()} for batch in batches]
        for batches in (padded_batches(settings, part, options.batch_size) for part in ("train", "eval"))
    )
    return model.to(options.device), train, held_out


def table(report: Mapping[str, Any]) -> str:
    head = ["method", "step (s)", "cosine", "divergence", "loss", "against dense", "match"]
    exact = next((row["loss"] for row in report["rows"] if row["method"] == "dense"), None)
    return text_table(
        head,
        (
            [
                row["method"], "" if row["step_seconds"] is None else f"{row['step_seconds']:.3g}",
                f"{row['cosine']:.4f}", f"{row['divergence']:.4f}", f"{row['loss']:.4f}",
                "" if exact is None else f"{row['loss'] / exact - 1:+.2%}", f"{row['match']:.1%}",
            ]
            for row in report["rows"]
        ),
    )  # fmt: skip


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train-file", required=True, help=".jsonl")
    parser.add_argument("--eval-file", required=True, help=".jsonl, held out")
    parser.add_argument("--prompt-template", default="Question: {question}\\nAnswer:")
    parser.add_argument("--answer-template", default=" {answer}")
    parser.add_argument("--chat", action="store_true", help="in the tokenizer's chat template")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--max-eval-rows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--tolerance", type=float, default=SubquadConfig().tolerance, help="of the plan")
    parser.add_argument("--budgets", metavar="FILE", help="a report of compare_vanilla.py, not a plan")
    parser.add_argument("--gradient", type=float, help="precision of the gradient in every MLP, in place of the plan's")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="that are trained")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.5], help="of SparseLoRA's neurons for context")
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0: nothing is timed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--autocast", action="store_true", help="forward passes in bf16, on weights in fp32")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(argv)
    torch.set_num_threads(options.threads)
    report = study(options)
    conclude(report | {"definitions": DEFINITIONS}, table(report), options)


if __name__ == "__main__":
    main()
