"""Training steps with the head on labelled positions, against the stock head: seconds, peak memory, loss.

    python scripts/benchmarks/head.py --model CHECKPOINT --data gsm8k/train.jsonl --dtype fp32 --json head.json

Questions are prompts without loss, answers carry it; batches are padded to their longest row, as the default collator
does. Every round runs each variant once, in a process of its own.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2] / "recipes")]

from comparison.apart import OnProgress, run_apart
from comparison.inputs import DTYPES, padded_batches
from comparison.memory import PeakMemory
from reporting import conclude
from settings import LmSettings

from hf_subquad import patch_head


def measure(argument: tuple[argparse.Namespace, str, str], report: OnProgress) -> dict[str, Any]:
    """Steps of one variant; then its head and loss alone, forward and backward, on the hidden states of a batch."""
    args, method, head = argument
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=DTYPES[args.dtype], attn_implementation="sdpa")
    root = model
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    model.train()
    if head == "labelled":
        patch_head(model, args.megabytes)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    recipe = LmSettings(
        model=args.model, method="vanilla", output_dir="", train_file=args.data, eval_file=args.data,
        prompt_template="Question: {question}\nAnswer: ", answer_template="{answer}", loss_on="answers",
        max_length=args.max_length, max_train_rows=args.batch_size * args.steps,
    )  # fmt: skip
    batches = padded_batches(recipe, "train", args.batch_size)
    memory, seconds, losses = PeakMemory("cpu"), [], []
    for number, batch in enumerate([batches[0], *batches]):  # the first is a warm-up
        memory.start()
        started = time.perf_counter()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number:
            seconds.append(time.perf_counter() - started)
            losses.append(loss.item())
            memory.stop()
    return {
        "method": method,
        "head": head,
        "step_seconds": seconds,
        "losses": losses,
        "peak_memory_bytes": memory.bytes,
        "head_and_loss_seconds": head_and_loss_seconds(root, batches[0], args.steps),
        "labelled_share": statistics.mean((b["labels"] != -100).float().mean().item() for b in batches),
    }


def head_and_loss_seconds(model: nn.Module, batch: dict[str, Tensor], times: int) -> list[float]:
    with torch.no_grad():
        hidden = model.base_model(batch["input_ids"], batch["attention_mask"], use_cache=False).last_hidden_state
    hidden.requires_grad_()
    model.base_model.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden)
    seconds = []
    for _ in range(times + 1):
        started = time.perf_counter()
        model(**batch, use_cache=False).loss.backward()
        seconds.append(time.perf_counter() - started)
        model.zero_grad()
    return seconds[1:]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians by method and head, and the ratios that count."""
    found: dict[str, Any] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        of = {}
        for head in ("stock", "labelled"):
            runs = [row for row in rows if (row["method"], row["head"]) == (method, head)]
            of[head] = {
                "step_seconds_median": statistics.median(s for run in runs for s in run["step_seconds"]),
                "head_and_loss_seconds_median": statistics.median(s for r in runs for s in r["head_and_loss_seconds"]),
                "peak_memory_bytes": statistics.median(run["peak_memory_bytes"] for run in runs),
                "losses": runs[0]["losses"],
            }
        stock, ours = of["stock"], of["labelled"]
        found[method] = {
            **of,
            "step_speedup": stock["step_seconds_median"] / ours["step_seconds_median"],
            "head_and_loss_speedup": stock["head_and_loss_seconds_median"] / ours["head_and_loss_seconds_median"],
            "peak_memory_saved_share": 1 - ours["peak_memory_bytes"] / stock["peak_memory_bytes"],
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal LM whose body is `base_model`")
    parser.add_argument("--data", required=True, help=".jsonl, with 'question' and 'answer'")
    parser.add_argument("--methods", nargs="+", choices=("vanilla", "lora"), default=["vanilla", "lora"])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for _ in range(args.rounds):
        for method in args.methods:
            for head in ("stock", "labelled"):
                rows.append(run_apart(f"{method}, {head}", measure, (args, method, head), start="spawn"))
                print(method, head, statistics.median(rows[-1]["step_seconds"]), rows[-1]["peak_memory_bytes"])
    report = {"summary": summary(rows), "rows": rows}
    conclude(report, json.dumps(report["summary"], indent=2), args)


if __name__ == "__main__":
    main()
